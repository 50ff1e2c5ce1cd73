"""Drawing by one kernel, against drawing by PyTorch: the same tokens, counting for as much."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import SMALL
from token_sparse_attention.attention.far_tokens import draw, far_tokens
from token_sparse_attention.inputs import real_tokens

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


def both(scores, count, tokens, *args, **kwargs):
    """What PyTorch draws, after checking that the kernel draws the same."""
    slots, counts = draw(scores, count, tokens, *args, **kwargs)
    mine, my_counts = draw(scores, count, tokens, *args, **kwargs, impl="triton")
    assert mine.dtype == slots.dtype
    assert my_counts.dtype == counts.dtype
    assert torch.equal(mine, slots)
    own = slots < tokens.kv_len
    torch.testing.assert_close(my_counts[own], counts[own], rtol=1e-6, atol=0)
    assert (my_counts[~own] == 1.0).all()
    return slots


KINDS = ["even", "soft", "sharp", "heavy-tailed", "geometric", "none", "one", "tied"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 40, 700, 2013, 3000])
def test_the_same_tokens_of_one_row(kind, count):
    length, window = 2113, 100  # 2013 tokens may be drawn
    tokens = real_tokens(None, 1, length, torch.device(DEVICE))
    slots = both(scores_of(kind, 3, length - 32), count, tokens, window)
    drawn = (slots < length).sum(-1)
    assert (drawn - min(count, length - window)).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_over_several_blocks(kind):
    length = 2 * kernel._BLOCK + 517
    tokens = real_tokens(None, 1, length, torch.device(DEVICE))
    both(scores_of(kind, 2, length - 128), 1024, tokens, 2048)


@given(
    st.integers(1, 3), st.integers(1, 300), st.integers(0, 40), st.integers(1, 400),
    st.sampled_from(KINDS), st.integers(0, 99),
)  # fmt: skip
def test_the_same_tokens_of_any_row(heads, scored, window, count, kind, seed):
    tokens = real_tokens(None, 1, scored + window, torch.device(DEVICE))
    both(scores_of(kind, heads, scored, seed), count, tokens)


def test_padding_and_excluded_tokens(monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", 128)
    length = 700
    mask = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    mask[0, :333] = False
    mask[1, 402:] = False
    mask[2, 30:] = False  # nothing is left to draw
    scores = scores_of("soft", 4, length - 10).expand(3, -1, -1).clone()
    scores[0, :, :333] = torch.nan
    without = torch.randint(0, length, (3, 4, 60), device=DEVICE)
    without[:, :, -1] = length
    budgets = 90 * torch.rand(3, 4, dtype=torch.float64, device=DEVICE)
    tokens = real_tokens(mask, 3, length, torch.device(DEVICE))
    for given_budgets in (None, budgets):
        slots = both(scores, 50, tokens, 40, without, given_budgets)
        for row in range(3):
            for head in range(4):
                own = slots[row, head][slots[row, head] < length]
                assert mask[row, own].all()
                assert not torch.isin(own, without[row, head]).any()
                assert (len(own) > 0) == (row < 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_slots_are_slots_whatever_the_scores(value):
    """Rows whose scores are not finite run dense, after their far tokens were gathered."""
    scores = scores_of("soft", 2, 500)
    scores[0, 0, 77] = value
    scores[0, 1] = value
    tokens = real_tokens(None, 1, 532, torch.device(DEVICE))
    slots, counts = draw(scores, 60, tokens, impl="triton")
    assert ((slots >= 0) & (slots <= 532)).all()
    assert (slots.diff() >= 0).all()
    assert counts.isfinite().all()
    without = draw(scores.where(scores < 1, 0.0), 60, tokens, impl="triton")
    assert torch.equal(slots, without[0])


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize(("sinks", "landmarks"), [(0, 0), (4, 0), (0, 30), (4, 30)])
@pytest.mark.parametrize("kv_len", [3, 62, 500])
def test_far_tokens(budget, sinks, landmarks, kv_len):
    config = dataclasses.replace(
        SMALL, budget=budget, fallback="window", fallback_window=60, fallback_samples=70,
        fallback_sinks=sinks, fallback_landmarks=landmarks,
    )  # fmt: skip
    scores = scores_of("soft", 4, kv_len)
    tokens = real_tokens(None, 1, kv_len, torch.device(DEVICE))
    theirs = far_tokens(scores, config, tokens, "reference")
    mine = far_tokens(scores, config, tokens, "triton")
    assert torch.equal(mine.slots, theirs.slots)
    assert (mine.slots.diff() >= 0).all()
    own = mine.slots < kv_len
    torch.testing.assert_close(mine.counts[own], theirs.counts[own], rtol=1e-6, atol=0)
