"""Drawing the tokens that stand for what a window leaves behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention import TokenSparseConfig, reference
from token_sparse_attention.attention import far_tokens
from token_sparse_attention.attention.far_tokens import draw, sample_budgets
from token_sparse_attention.attention.far_tokens import far_tokens as choose_far_tokens
from token_sparse_attention.inputs import real_tokens


def scores_of(heads, length, seed, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, heads, length, generator=generator) * sharpness).softmax(-1)


@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(0, 40),
    st.integers(1, 400),
    st.floats(0, 30),
    st.integers(0, 99),
)
def test_draws_are_those_of_the_oracle(heads, scored, window, count, sharpness, seed):
    scores = scores_of(heads, scored, seed, sharpness)
    length = scored + window
    slots, counts = draw(scores, count, real_tokens(None, 1, length, scores.device))
    assert slots.shape == counts.shape == (1, heads, count)
    for head in range(heads):
        padded = torch.nn.functional.pad(scores[0, head].double(), (0, window))
        expected = reference.draw(padded, count)
        own = slots[0, head] < length
        assert torch.equal(slots[0, head][own], expected.nonzero()[:, 0])
        torch.testing.assert_close(
            counts[0, head][own].double(), expected[expected > 0], rtol=1e-4, atol=0
        )
        assert (slots[0, head].diff() >= 0).all()
        assert abs(int(own.sum()) - min(count, length)) <= 1


def test_likely_tokens_are_in_and_count_for_less():
    scores = torch.full((1, 1, 400), 1e-9)
    scores[0, 0, 100:110] = 5.0
    scores[0, 0, 300] = 100.0
    slots, counts = draw(scores, 40, real_tokens(None, 1, 500, scores.device))
    of_slot = dict(zip(slots[0, 0].tolist(), counts[0, 0].tolist(), strict=True))
    assert of_slot[300] == 1.0
    assert sum(100 <= slot < 110 for slot in of_slot) >= 6
    assert 15 < max(of_slot.values()) < 30, "half of the probability is the same for all"


def test_sums_over_draws_are_right_on_average():
    """Where equal steps begin decides which tokens are drawn, so shifting the order averages."""
    scores, values = scores_of(1, 600, 1, 2.0), torch.rand(600, generator=torch.manual_seed(2))
    tokens, sums = real_tokens(None, 1, 600, scores.device), []
    for shift in range(0, 600, 5):
        slots, counts = draw(scores.roll(shift, -1), 60, tokens)
        inside = slots[0, 0] < 600
        drawn = values.roll(shift)[slots[0, 0][inside]]
        sums.append(float((drawn * counts[0, 0][inside]).sum()))
    mean = sum(sums) / len(sums)
    assert mean == pytest.approx(float(values.sum()), rel=0.02)
    assert max(sums) - min(sums) > 1, "a single draw is an estimate"


def test_padding_and_other_tokens_are_never_drawn(monkeypatch):
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, 70:] = False
    scores = scores_of(4, 80, 3).expand(2, -1, -1).clone()
    scores[0, :, :20] = torch.nan
    without = torch.tensor([[[30, 31, 90]], [[5, 6, 7]]]).expand(-1, 4, -1)
    tokens = real_tokens(mask, 2, 90, scores.device)
    slots, counts = draw(scores, 25, tokens, without=without)
    for row in range(2):
        for head in range(4):
            own = slots[row, head][slots[row, head] < 90]
            assert mask[row, own].all()
            assert not torch.isin(own, without[row, head]).any()
            assert 24 <= len(own) <= 25
    assert counts.isfinite().all()
    monkeypatch.setattr(far_tokens, "_ENTRIES", 200)  # one head at a time
    again, again_counts = draw(scores, 25, tokens, without=without)
    assert torch.equal(again, slots)
    assert torch.equal(again_counts, counts)


def test_heads_that_attend_far_get_more_samples():
    config = TokenSparseConfig.published(
        window_size=8,
        budget="per_head",
        fallback="window",
        fallback_window=30,
        fallback_samples=20,
    )
    scores = torch.zeros(1, 8, 192)
    scores[0, :, 185] = 0.9  # within the window
    scores[0, 3, 10] = 0.05
    scores[0, 5, 20] = 0.1
    tokens = real_tokens(None, 1, 200, scores.device)
    budgets = sample_budgets(scores, config, tokens, None)[0]
    assert budgets[5] == 80.0, "the most that a head can have"
    assert 5.0 < budgets[3] < budgets[5]
    others = [head for head in range(8) if head not in (3, 5)]
    assert (budgets[others] == 5.0).all()
    slots, counts = draw(scores, 20, tokens, budgets=budgets[None])
    assert slots.shape == (1, 8, 80)
    drawn = (slots[0] < 200).sum(-1)
    assert ((drawn - budgets).abs() <= 1).all()
    assert counts.isfinite().all()
    even = scores_of(8, 192, 4, 0.1)
    mean = sample_budgets(even, config, tokens, None).mean()
    assert float(mean) == pytest.approx(20.0)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_no_far_token_is_still_in_the_last_querys_window(budget):
    """Most mass lies there; what is drawn or best would be seen by no query."""
    config = TokenSparseConfig(
        window_size=8, budget=budget, fallback_window=50, fallback_sinks=3, fallback_landmarks=9,
        fallback_samples=20,
    )  # fmt: skip
    scores = scores_of(4, 192, 5).expand(2, -1, -1).clone()
    scores[..., 130:] += 1.0
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, 185:] = False
    scores[1, :, 177:] = 0
    far = choose_far_tokens(scores, config, real_tokens(mask, 2, 200, scores.device), "reference")
    for row, end in enumerate((200, 185)):
        own = [slots[slots < 200] for slots in far.slots[row]]
        assert all(int(slots.max()) < end - 50 for slots in own)
        assert all(len(slots.unique()) == len(slots) for slots in own)
        assert sum(len(slots) for slots in own) >= 4 * (3 + 9 + 15)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_a_prompts_length_does_not_change_how_many_places_far_tokens_have(budget):
    """Kernels are compiled for that number."""
    config = TokenSparseConfig(
        window_size=8, budget=budget, fallback_window=10, fallback_landmarks=90,
        fallback_samples=70,
    )  # fmt: skip
    places = set()
    for length in (60, 61, 150, 400):
        tokens = real_tokens(None, 1, length, torch.device("cpu"))
        far = choose_far_tokens(scores_of(2, length - 8, 6), config, tokens, "reference")
        places.add(far.slots.shape)
    assert len(places) == 1


def test_equal_scores_are_drawn_evenly_from_a_long_row():
    """Few of very many: probabilities so small that coarse units would round them away."""
    scores = torch.full((1, 1, 1_000_000), 1e-6)
    slots, counts = draw(scores, 8, real_tokens(None, 1, 1_000_000, scores.device))
    assert float(counts.sum()) == pytest.approx(1_000_000, rel=1e-4)
    assert slots[0, 0].diff().float().std() < 2
