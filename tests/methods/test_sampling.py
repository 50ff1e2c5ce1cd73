"""Sampling the keys that stand for what a window leaves behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention import KVSamplingConfig, reference
from token_sparse_attention.inputs import real_tokens
from token_sparse_attention.methods import sampling
from token_sparse_attention.methods.sampling import sample, sample_budgets, sample_keys


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
def test_samples_are_those_of_the_oracle(heads, scored, window, num_samples, sharpness, seed):
    scores = scores_of(heads, scored, seed, sharpness)
    length = scored + window
    slots, weights = sample_keys(scores, num_samples, real_tokens(None, 1, length, scores.device))
    assert slots.shape == weights.shape == (1, heads, num_samples)
    for head in range(heads):
        padded = torch.nn.functional.pad(scores[0, head].double(), (0, window))
        expected = reference.systematic_sample(padded, num_samples)
        own = slots[0, head] < length
        assert torch.equal(slots[0, head][own], expected.nonzero()[:, 0])
        torch.testing.assert_close(
            weights[0, head][own].double(), expected[expected > 0], rtol=1e-4, atol=0
        )
        assert (slots[0, head].diff() >= 0).all()
        assert abs(int(own.sum()) - min(num_samples, length)) <= 1


def test_likely_keys_are_sampled_with_smaller_weights():
    scores = torch.full((1, 1, 400), 1e-9)
    scores[0, 0, 100:110] = 5.0
    scores[0, 0, 300] = 100.0
    slots, weights = sample_keys(scores, 40, real_tokens(None, 1, 500, scores.device))
    of_slot = dict(zip(slots[0, 0].tolist(), weights[0, 0].tolist(), strict=True))
    assert of_slot[300] == 1.0
    assert sum(100 <= slot < 110 for slot in of_slot) >= 6
    assert 15 < max(of_slot.values()) < 30, "half of the probability is the same for all"


def test_sums_over_samples_are_right_on_average():
    """Where equal steps begin decides which keys are sampled, so shifting the order averages."""
    scores, values = scores_of(1, 600, 1, 2.0), torch.rand(600, generator=torch.manual_seed(2))
    tokens, sums = real_tokens(None, 1, 600, scores.device), []
    for shift in range(0, 600, 5):
        slots, weights = sample_keys(scores.roll(shift, -1), 60, tokens)
        inside = slots[0, 0] < 600
        sampled = values.roll(shift)[slots[0, 0][inside]]
        sums.append(float((sampled * weights[0, 0][inside]).sum()))
    mean = sum(sums) / len(sums)
    assert mean == pytest.approx(float(values.sum()), rel=0.02)
    assert max(sums) - min(sums) > 1, "a single sample is an estimate"


def test_padding_and_excluded_keys_are_never_sampled(monkeypatch):
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, 70:] = False
    scores = scores_of(4, 80, 3).expand(2, -1, -1).clone()
    scores[0, :, :20] = torch.nan
    excluded = torch.tensor([[[30, 31, 90]], [[5, 6, 7]]]).expand(-1, 4, -1)
    tokens = real_tokens(mask, 2, 90, scores.device)
    slots, weights = sample_keys(scores, 25, tokens, sinks=excluded)
    for number in range(2):
        for head in range(4):
            own = slots[number, head][slots[number, head] < 90]
            assert mask[number, own].all()
            assert not torch.isin(own, excluded[number, head]).any()
            assert 24 <= len(own) <= 25
    assert weights.isfinite().all()
    monkeypatch.setattr(sampling, "_ENTRIES", 200)  # one head at a time
    again, again_weights = sample_keys(scores, 25, tokens, sinks=excluded)
    assert torch.equal(again, slots)
    assert torch.equal(again_weights, weights)


def test_heads_that_attend_far_get_more_samples():
    config = KVSamplingConfig(
        num_probes=8, budget="per_head", sliding_window=30, sink_size=0, num_samples=20
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
    slots, weights = sample_keys(scores, 20, tokens, budgets=budgets[None])
    assert slots.shape == (1, 8, 80)
    sampled = (slots[0] < 200).sum(-1)
    assert ((sampled - budgets).abs() <= 1).all()
    assert weights.isfinite().all()
    even = scores_of(8, 192, 4, 0.1)
    mean = sample_budgets(even, config, tokens, None).mean()
    assert float(mean) == pytest.approx(20.0)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_no_sampled_key_is_still_in_the_last_querys_window(budget):
    """Most mass lies there; what is sampled there would be seen by no query."""
    config = KVSamplingConfig(
        num_probes=8, budget=budget, sliding_window=50, sink_size=3, num_samples=20
    )
    scores = scores_of(4, 192, 5).expand(2, -1, -1).clone()
    scores[..., 130:] += 1.0
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, 185:] = False
    scores[1, :, 177:] = 0
    sampled = sample(scores, config, real_tokens(mask, 2, 200, scores.device), "reference")
    for number, end in enumerate((200, 185)):
        own = [slots[slots < 200] for slots in sampled.slots[number]]
        assert all(int(slots.max()) < end - 50 for slots in own)
        assert all(len(slots.unique()) == len(slots) for slots in own)
        assert sum(len(slots) for slots in own) >= 4 * (3 + 15)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_a_prompts_length_does_not_change_the_capacity_of_samples_that_fit(budget):
    """Kernels are compiled for that number."""
    config = KVSamplingConfig(num_probes=8, budget=budget, sliding_window=10, num_samples=14)
    capacities = set()
    for length in (70, 71, 150, 400):
        tokens = real_tokens(None, 1, length, torch.device("cpu"))
        sampled = sample(scores_of(2, length - 8, 6), config, tokens, "reference")
        capacities.add(sampled.slots.shape)
    assert len(capacities) == 1


def test_equal_scores_are_sampled_evenly_from_a_long_sequence():
    """Few of very many: probabilities so small that coarse units would round them away."""
    scores = torch.full((1, 1, 1_000_000), 1e-6)
    slots, weights = sample_keys(scores, 8, real_tokens(None, 1, 1_000_000, scores.device))
    assert float(weights.sum()) == pytest.approx(1_000_000, rel=1e-4)
    assert slots[0, 0].diff().float().std() < 2
