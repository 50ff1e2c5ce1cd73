"""Sampling by one kernel, against sampling by PyTorch: the same keys with the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import SAMPLING
from token_sparse_attention.inputs import real_tokens
from token_sparse_attention.methods.sampling import sample, sample_keys

pytest.importorskip("triton")

from token_sparse_attention.kernels import sampling as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scores_of(kind, heads, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(1, heads, length, generator=generator)
    scores = {
        "even": torch.full_like(normal, 1 / length),
        "soft": normal.softmax(-1),
        "sharp": (8 * normal).softmax(-1),
        "heavy-tailed": normal.abs() ** -1.5 / length,
        "geometric": 0.5 ** torch.arange(length).expand_as(normal),
        "none": torch.zeros_like(normal),
        "one": torch.zeros_like(normal).index_fill_(-1, torch.tensor([length // 3]), 1.0),
        "tied": (3 * normal).round().softmax(-1),
    }
    return scores[kind].to(DEVICE)


def both(scores, count, tokens, window=0, sink_size=0, budgets=None):
    """What PyTorch samples, after checking that the kernel samples the same."""
    slots, weights = sample_keys(
        scores, count, tokens, window=window, sink_size=sink_size, budgets=budgets
    )
    mine, my_weights, finite = kernel.sample_keys(
        scores, tokens.bounds, tokens.kv_len, window, count, slots.shape[2], sink_size, budgets
    )
    assert my_weights.dtype == weights.dtype
    assert torch.equal(finite, scores.sum(-1).isfinite())
    start, end = tokens.bounds.unbind(-1)
    sinks = start[:, None, None] + torch.arange(sink_size, device=DEVICE)
    sinks = sinks.where(sinks < end[:, None, None], tokens.kv_len).expand(*mine.shape[:2], -1)
    assert torch.equal(mine[..., :sink_size], sinks.int())
    assert (my_weights[..., :sink_size] == 1.0).all()
    mine, my_weights = mine[..., sink_size:], my_weights[..., sink_size:]
    assert torch.equal(mine.long(), slots)
    own = slots < tokens.kv_len
    torch.testing.assert_close(my_weights[own], weights[own], rtol=1e-6, atol=0)
    assert (my_weights[~own] == 1.0).all()
    return slots


KINDS = ["even", "soft", "sharp", "heavy-tailed", "geometric", "none", "one", "tied"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 40, 700, 2013, 3000])
def test_the_same_keys_of_one_sequence(kind, count):
    length, window = 2113, 100  # 2013 keys may be sampled
    tokens = real_tokens(None, 1, length, torch.device(DEVICE))
    slots = both(scores_of(kind, 3, length - 32), count, tokens, window)
    found = (slots < length).sum(-1)
    assert (found - min(count, length - window)).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_keys_over_several_blocks(kind):
    length = 2 * kernel._BLOCK + 517
    tokens = real_tokens(None, 1, length, torch.device(DEVICE))
    both(scores_of(kind, 2, length - 128), 1024, tokens, 2048)


@given(
    st.integers(1, 3), st.integers(1, 300), st.integers(0, 40), st.integers(1, 400),
    st.integers(0, 20), st.sampled_from(KINDS), st.integers(0, 99),
)  # fmt: skip
def test_the_same_keys_of_any_sequence(heads, scored, others, count, sinks, kind, seed):
    tokens = real_tokens(None, 1, scored + others, torch.device(DEVICE))
    both(scores_of(kind, heads, scored, seed), count, tokens, sink_size=sinks)


@pytest.mark.parametrize("sink_size", [0, 7])
def test_padding_and_sinks(monkeypatch, sink_size):
    monkeypatch.setattr(kernel, "_BLOCK", 128)
    length = 700
    mask = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    mask[0, :333] = False
    mask[1, 402:] = False
    mask[2, 30:] = False  # nothing is left to sample
    scores = scores_of("soft", 4, length - 10).expand(3, -1, -1).clone()
    budgets = 90 * torch.rand(3, 4, dtype=torch.float64, device=DEVICE)
    tokens = real_tokens(mask, 3, length, torch.device(DEVICE))
    for given_budgets in (None, budgets):
        slots = both(scores, 50, tokens, 40, sink_size, given_budgets)
        for sequence in range(3):
            first = int(mask[sequence].int().argmax())
            for head in range(4):
                own = slots[sequence, head][slots[sequence, head] < length]
                assert mask[sequence, own].all()
                assert (own >= first + sink_size).all()
                assert (len(own) > 0) == (sequence < 2)


def test_padding_holds_anything():
    length = 700
    mask = torch.ones(1, length, dtype=torch.bool, device=DEVICE)
    mask[0, :333] = False
    scores = scores_of("soft", 4, length - 10)
    tokens = real_tokens(mask, 1, length, torch.device(DEVICE))
    expected = kernel.sample_keys(scores, tokens.bounds, length, 40, 50, 50, 3)
    scores[..., :333] = torch.nan
    for mine, right in zip(
        kernel.sample_keys(scores, tokens.bounds, length, 40, 50, 50, 3), expected
    ):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_slots_are_slots_whatever_the_scores(value):
    """Sequences whose scores are not finite run dense, after their keys were gathered."""
    scores = scores_of("soft", 2, 500)
    scores[0, 0, 77] = value
    scores[0, 1] = value
    tokens = real_tokens(None, 1, 532, torch.device(DEVICE))
    slots, weights, finite = kernel.sample_keys(scores, tokens.bounds, 532, 0, 60, 60)
    assert ((slots >= 0) & (slots <= 532)).all()
    assert (slots.diff() >= 0).all()
    assert weights.isfinite().all()
    assert not finite[0, 1], "the sum of 500 such numbers is not finite"
    bounded = scores.where(scores < 1, 0.0)
    assert torch.equal(slots, kernel.sample_keys(bounded, tokens.bounds, 532, 0, 60, 60)[0])


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize(("sinks", "samples"), [(0, 0), (4, 0), (0, 70), (4, 70)])
@pytest.mark.parametrize("kv_len", [3, 62, 500])
def test_sinks_and_samples(budget, sinks, samples, kv_len):
    config = dataclasses.replace(
        SAMPLING, budget=budget, sliding_window=60, num_samples=samples, sink_size=sinks
    )
    scores = scores_of("soft", 4, kv_len)
    tokens = real_tokens(None, 1, kv_len, torch.device(DEVICE))
    theirs, their_finite = sample(scores, config, tokens, "reference")
    mine, my_finite = sample(scores, config, tokens, "triton")
    assert torch.equal(mine.slots.long(), theirs.slots)
    assert torch.equal(my_finite, their_finite)
    assert (mine.slots.diff() >= 0).all()
    own = theirs.slots < kv_len
    torch.testing.assert_close(mine.weights[own], theirs.weights[own], rtol=1e-6, atol=0)
