"""Where heads look: against probabilities by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmarks.frontier.heads import far_attention, observe

from integrations.models import make_ids, make_model
from token_sparse_attention import KVSamplingConfig


def test_far_attention_is_what_lies_before_the_window():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 3, 8, generator=generator), torch.randn(2, 30, 8)
    positions = torch.tensor([12, 20, 29])
    far, among = far_attention(query, key, positions, window=5, scale=0.5)
    for head in range(4):
        shares, numbers = [], []
        for row, position in enumerate(positions.tolist()):
            seen = key[head // 2, : position + 1]
            p = (0.5 * seen @ query[head, row]).softmax(0)[:-5]
            shares.append(p.sum())
            numbers.append(p.sum() ** 2 / (p**2).sum())
        shares, numbers = torch.stack(shares), torch.stack(numbers)
        assert far[head] == pytest.approx(shares.mean().item(), rel=1e-5)
        expected = (shares * numbers).sum() / shares.sum()
        assert among[head] == pytest.approx(expected.item(), rel=1e-5)


def test_every_layer_is_observed_and_the_model_left_as_it_was():
    model, ids = make_model("Llama"), make_ids(300)
    before = model(ids).logits
    few = KVSamplingConfig(
        num_probes=4,
        sliding_window=16,
        sink_size=0,
        num_samples=8,
        dense_queries=0,
        crossover="off",
    )
    layers = observe(model, ids, few)
    assert [set(layer) for layer in layers] == [{"far", "among", "error"}] * 3
    assert all(
        0 < share < 1 and error > 0 for x in layers for share, error in zip(x["far"], x["error"])
    )
    many = dataclasses.replace(few, num_samples=300)
    assert all(max(layer["error"]) < 1e-3 for layer in observe(model, ids, many))
    assert torch.equal(model(ids).logits, before)
