"""Streamed answers over loopback: none lost, wrong or mixed up, and memory steady."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from token_sparse_attention import bundled
from token_sparse_attention.info import provenance
from vllm_plugin.engines import additional_config, generate, prompt_ids

pytestmark = pytest.mark.vllm
REQUESTS = int(os.environ.get("TSA_STRESS_REQUESTS", "24"))
RESULT = os.environ.get("TSA_STRESS_RESULT")
LENGTHS = (80, 95, 400, 900, 1301, 2048, 2700)
CONCURRENCY = (1, 4, 16)
ROUNDS = 4
MEMORY_GROWTH = 1.03  # from the first two rounds to the last two, at most


@pytest.fixture
def prompts():
    """As many different prompts as make sense, in an order without a pattern."""
    draw = random.Random(5)
    different = [prompt_ids(LENGTHS[seed % len(LENGTHS)], seed) for seed in range(REQUESTS // 2)]
    return [draw.choice(different) for _ in range(REQUESTS)]


def test_a_storm_of_requests(engines, prompts, tmp_path):
    import vllm

    from vllm_plugin.server import serve, storm

    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    expected = {
        tuple(ids): tokenizer.decode(generate(engines(), [ids])[0], skip_special_tokens=True)
        for ids in {tuple(ids): ids for ids in prompts}.values()
    }
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = os.environ | {
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    # With chunked prefill on, a full step cuts a prompt in two, whatever its length.
    arguments = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"]
    arguments += ["--dtype", "float32", "--max-model-len", "4096"]
    arguments += ["--kv-cache-memory-bytes", str(2**30)]
    storms, memory, wrong = [], [], []
    with serve(tmp_path, additional_config(), environment, *arguments) as server:
        # Allocators and caches fill up first.
        storm(server.url, prompts[:REQUESTS], max(CONCURRENCY))
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
    kept = re.search(r"^token_sparse_attention_tokens_kept_total (\S+)", published, re.M)
    assert float(kept.group(1)) > 0
