"""Streamed answers over loopback: none lost, wrong or mixed up, and memory steady.

Prefix caching and chunked prefill are on, and the expected replies are those of whole prompts
that were alone in an engine without a cached prefix.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from token_sparse_attention import bundled
from token_sparse_attention.info import provenance
from vllm_plugin.engines import SAMPLING, additional_config, generate, prompt_ids

pytestmark = pytest.mark.vllm
REQUESTS = int(os.environ.get("TSA_STRESS_REQUESTS", "24"))
RESULT = os.environ.get("TSA_STRESS_RESULT")
# In few layers: else a rounding error that changes one sample changes everything after it.
CONFIG = dataclasses.replace(
    SAMPLING, block_size=256, sliding_window=256, num_samples=8, dense_queries=32,
    sparse_layers=(2, 5, 8),
)  # fmt: skip
LENGTHS = (80, 95, 400, 900, 1301, 2048, 2700)
DIFFERENT = 63  # prompts, at most
SHARED, TAILS = 1000, (150, 333, 700)  # tokens of a common beginning, and behind it
CHUNK = 1024
CONCURRENCY = (1, 4, 16)
ROUNDS = 4
MEMORY_GROWTH = 1.03  # from the first two rounds to the last two, at most


@pytest.fixture
def prompts():
    """Different prompts, a third of which begin as others do, in an order without a pattern."""
    draw = random.Random(5)
    documents = [prompt_ids(SHARED, seed) for seed in (101, 102, 103)]
    different = []
    for seed in range(min(REQUESTS // 2, DIFFERENT)):
        if seed % 3:
            different.append(prompt_ids(LENGTHS[seed % len(LENGTHS)], seed))
        else:
            tail = prompt_ids(TAILS[seed // 3 % len(TAILS)], seed)
            different.append(documents[seed % len(documents)] + tail)
    return [draw.choice(different) for _ in range(REQUESTS)]


def metric(published, name):
    """Return a number from what a server publishes, summed over its labels."""
    lines = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", published, re.M)
    return sum(map(float, lines))


def test_a_storm_of_requests(engines, prompts, tmp_path):
    import vllm

    from vllm_plugin.server import serve, storm

    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    settings = additional_config(config=CONFIG.to_dict())
    alone = engines(additional_config=settings)
    expected = {
        tuple(ids): tokenizer.decode(generate(alone, [ids])[0], skip_special_tokens=True)
        for ids in {tuple(ids): ids for ids in prompts}.values()
    }
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = os.environ | {
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    arguments = ["--enable-prefix-caching", "--enable-chunked-prefill"]
    arguments += [
        "--max-num-batched-tokens",
        str(CHUNK),
        "--dtype",
        "float32",
        "--max-model-len",
        "4096",
    ]
    arguments += ["--kv-cache-memory-bytes", str(2**30)]
    storms, memory, wrong = [], [], []
    with serve(tmp_path, settings, environment, *arguments) as server:
        # Allocators and caches fill up first.
        storm(server.url, [list(ids) for ids in expected], max(CONCURRENCY))
        for number in range(ROUNDS):
            for place, concurrency in enumerate(CONCURRENCY):
                part = prompts[number::ROUNDS][place :: len(CONCURRENCY)]
                storms.append(storm(server.url, part, concurrency, aborts=0.25))
                wrong += [
                    (reply, expected[tuple(ids)])
                    for ids, reply in zip(part, storms[-1].replies)
                    if reply != expected[tuple(ids)]
                ]
            memory.append(server.memory_mib())
        published = server.get("/metrics")
        log = server.log.read_text()
    pieces = [count for one in storms for count in one.pieces]
    record = {
        "kind": "vllm-stress",
        **provenance("cpu"),
        "vllm": vllm.__version__,
        "requests": len(pieces),
        "aborted": sum(one.aborted for one in storms),
        "different_prompts": len(expected),
        "prompt_tokens": {"min": min(map(len, prompts)), "max": max(map(len, prompts))},
        "tokens_per_step": CHUNK,
        "tokens_from_cached_prefixes": metric(published, "vllm:prefix_cache_hits_total"),
        "tokens_looked_up": metric(published, "vllm:prefix_cache_queries_total"),
        "concurrency": list(CONCURRENCY),
        "seconds": round(sum(one.seconds for one in storms), 1),
        "wrong_or_lost": len(wrong),
        "streamed_pieces": {"min": min(pieces), "max": max(pieces)},
        "memory_mib_of_processes_per_round": memory,
        "last_log_line": re.findall(r"Token sparse attention: \d.*", log)[-1],
    }
    if RESULT:
        Path(RESULT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    assert not wrong, wrong[:3]
    assert record["requests"] == REQUESTS
    assert min(pieces) > 1, "replies came in one piece"
    totals = [sum(one) for one in memory]
    assert min(totals[-2:]) < max(totals[:2]) * MEMORY_GROWTH, memory
    assert 'token_sparse_attention_prefills_total{path="sparse",reason=""}' in published
    assert 'path="dense",reason="context too short' in published
    assert metric(published, "token_sparse_attention_tokens_kept_total") > 0
    assert 0 < record["tokens_from_cached_prefixes"] < record["tokens_looked_up"]
