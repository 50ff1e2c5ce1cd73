"""On a released model, which `make test-released` downloads; skipped where it is not there."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from token_sparse_attention import KVSamplingConfig, bundled
from token_sparse_attention.cli import main
from token_sparse_attention.integrations.transformers import apply

MODEL = os.environ.get("TSA_RELEASED_MODEL", "")
pytestmark = pytest.mark.skipif(not MODEL, reason="make test-released downloads the model")
LENGTH = 1200
CONFIG = KVSamplingConfig(
    block_size=256, sliding_window=256, num_samples=256, dense_queries=64, crossover="off"
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = Path(bundled.DEMO_DOCUMENT).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH]
    assert ids.shape[1] == LENGTH
    return ids


@torch.no_grad()
def logits_of(model, ids, config=None, cuts=()):
    """The logits of a prompt, in one call or in several on one cache."""
    cache, parts = DynamicCache(), []
    edges = [0, *cuts, ids.shape[1]]
    pieces = [ids[:, a:b] for a, b in itertools.pairwise(edges)]
    if config is None:
        return model(ids).logits
    with apply(model, config) as report:
        for piece in pieces:
            parts.append(model(piece, past_key_values=cache).logits)
        assert any("sparse" in record.paths for record in report)
    return torch.cat(parts, 1)


def test_all_keys_sampled_are_dense_attention(model, ids):
    config = dataclasses.replace(CONFIG, num_samples=LENGTH)
    torch.testing.assert_close(
        logits_of(model, ids, config), logits_of(model, ids), rtol=1e-3, atol=2e-3
    )


def test_a_prompt_in_chunks_gives_what_one_call_gives(model, ids):
    """In double precision: a score that rounds otherwise may exchange a sampled key."""
    config, exact = dataclasses.replace(CONFIG, dense_queries=0), copy.deepcopy(model).double()
    whole = logits_of(exact, ids, config)
    torch.testing.assert_close(logits_of(exact, ids, config, (300, 700)), whole)


def test_samples_halve_the_divergence_of_a_window(tmp_path):
    """By the command that users have."""
    window = dataclasses.replace(CONFIG, num_samples=0)
    out = tmp_path / "fidelity.jsonl"
    words = ["fidelity", MODEL, "--lengths", "2048", "--pieces", "1", "--out", str(out)]
    for name, config in (("samples", CONFIG), ("window", window)):
        words += ["--config", f"{name}={config.to_json()}"]
    assert main(words) == 0
    found: dict[str, list[float]] = {"samples": [], "window": []}
    for line in out.read_text(encoding="utf-8").splitlines()[1:]:
        answer = json.loads(line)
        if answer["configuration"] in found:
            found[answer["configuration"]] += answer["divergence"]
    samples, alone = (sum(found[name]) / len(found[name]) for name in ("samples", "window"))
    assert 2 * samples < alone
