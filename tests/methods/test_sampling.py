"""Sampling the keys that stand for what a window leaves behind."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import (
    SAMPLING,
    make_problem,
    oracle,
    relative_error,
    with_selection,
)
from token_sparse_attention import (
    Execution,
    KVSamplingConfig,
    reference,
)
from token_sparse_attention.inputs import real_tokens
from token_sparse_attention.methods import KVSampling, LayerShape, sampling
from token_sparse_attention.methods.sampling import (
    inclusion_probabilities,
    sample,
    sample_budgets,
    sample_keys,
)


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
    room = num_samples if num_samples <= length else slots.shape[2]
    assert slots.shape == weights.shape == (1, heads, room)
    assert min(num_samples, length) <= room < 2 * length
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


def test_padding_and_sinks_are_never_sampled(monkeypatch):
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, 70:] = False
    scores = scores_of(4, 80, 3).expand(2, -1, -1).clone()
    scores[0, :, :20] = torch.nan
    tokens = real_tokens(mask, 2, 90, scores.device)
    slots, weights = sample_keys(scores, 25, tokens, sink_size=3)
    for number in range(2):
        first = int(mask[number].nonzero()[0])
        for head in range(4):
            own = slots[number, head][slots[number, head] < 90]
            assert mask[number, own].all()
            assert not torch.isin(own, torch.arange(first, first + 3)).any()
            assert 24 <= len(own) <= 25
    assert weights.isfinite().all()
    monkeypatch.setattr(sampling, "_ENTRIES", 200)  # one head at a time
    again, again_weights = sample_keys(scores, 25, tokens, sink_size=3)
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
    tokens = real_tokens(mask, 2, 200, scores.device)
    sampled, finite = sample(scores, config, tokens, "reference")
    assert finite.all()
    for number, end in enumerate((200, 185)):
        own = [slots[slots < 200] for slots in sampled.slots[number]]
        assert all(int(slots.max()) < end - 50 for slots in own)
        assert all(len(slots.unique()) == len(slots) for slots in own)
        assert sum(len(slots) for slots in own) >= 4 * (3 + 15)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_a_prompts_length_hardly_changes_how_many_samples_there_is_room_for(budget):
    """Kernels are compiled for that number, so a prompt that bounds it does so in octaves."""
    config = KVSamplingConfig(num_probes=8, budget=budget, sliding_window=10, num_samples=70)

    def room(length):
        tokens = real_tokens(None, 1, length, torch.device("cpu"))
        sampled, _ = sample(scores_of(2, length - 8, 6), config, tokens, "reference")
        return sampled.slots.shape[2] - config.sink_size

    assert {room(length) for length in (300, 400, 900)} == {70 if budget == "shared" else 280}
    assert {room(length) for length in (33, 40, 60, 64)} == {64}


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("num_samples", [10**6, 2**40, 10**25])
def test_settings_far_beyond_the_prompt_change_nothing(budget, num_samples):
    config = dataclasses.replace(SAMPLING, sink_size=3, budget=budget, num_samples=num_samples)
    problem = make_problem(batch=2, query_len=150)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, :40] = False
    for impl in ("reference", "triton") if num_samples == 2**40 else ("reference",):
        run = functools.partial(
            with_selection, problem, padding_mask=mask, execution=Execution(impl)
        )
        out, selection = run(config)
        enough, expected = run(dataclasses.replace(config, num_samples=600))
        assert torch.equal(out, enough)
        assert torch.equal(selection.indices, expected.indices)
        assert selection.lengths.tolist() == [[150 - 9] * 4, [110 - 9] * 4]


@pytest.mark.parametrize(
    "field", ["num_probes", "sliding_window", "sink_size", "num_samples", "dense_queries"]
)
@pytest.mark.parametrize("crossover", ["off", "auto"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_setting_is_too_large(field, crossover, impl):
    """All of them end in dense attention, here of padded batches, whose lengths are tensors."""
    config = dataclasses.replace(SAMPLING, crossover=crossover, **{field: 10**25})
    problem = make_problem(batch=2, query_len=60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, :20] = False
    out, _ = with_selection(problem, config, padding_mask=mask, execution=Execution(impl))
    for number, start in enumerate((0, 20)):
        query, key, value = (x[number : number + 1, :, start:] for x in problem)
        dense = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[number, :, start:], dense[0])


def test_memory_does_not_grow_with_the_settings():
    config = dataclasses.replace(SAMPLING, budget="per_head", num_samples=10**9)
    problem = make_problem(query_len=150)
    with torch.profiler.profile(profile_memory=True) as profile:
        with_selection(problem, config)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2**22
    shape = LayerShape(4, 2, 16, 4, 150, 150)
    assert KVSampling(config).workspace(shape) < 2**22


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("candidates", [6, 9, 64, 100, 257])
def test_a_budget_of_all_keys_behind_the_window_samples_all_of_them(
    heads, candidates, impl, budget
):
    """Heads of equal mass have equal budgets, here exactly as many as there are keys."""
    length, window = candidates + 3, 3
    config = KVSamplingConfig(
        num_probes=1, budget=budget, sliding_window=window, sink_size=0, num_samples=candidates
    )
    scores = scores_of(1, length - 1, 0, 3.0).expand(1, heads, -1).contiguous()
    tokens = real_tokens(None, 1, length, torch.device("cpu"))
    (slots, weights), _ = sample(scores, config, tokens, impl)
    everything = torch.arange(candidates)
    for head in range(heads):
        assert torch.equal(slots[0, head, :candidates].long(), everything)
        assert (slots[0, head, candidates:] == length).all()
    assert (weights[..., :candidates] == 1).all()


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("length", [300, 301, 302])
def test_where_all_keys_are_certain_the_output_is_dense_attention(length, budget):
    config = KVSamplingConfig(
        num_probes=8, sliding_window=20, sink_size=0, num_samples=281, budget=budget,
        dense_queries=0, crossover="off",
    )  # fmt: skip
    problem = make_problem(heads=1, kv_heads=1, query_len=length)
    out, selection = with_selection(problem, config)
    dense = torch.nn.functional.scaled_dot_product_attention(*problem, is_causal=True)
    expected, _ = oracle(problem, config)
    assert relative_error(out[0], expected) < 1e-5
    if length - 20 <= 281:
        assert selection.lengths.tolist() == [[length - 20]]
        assert relative_error(out, dense) < 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 50), st.integers(0, 20))
def test_probabilities_are_at_most_one_and_add_up_to_the_budget(scores, budget, others):
    shares = torch.tensor([*scores, *[0.0] * others], dtype=torch.float64)
    shares[: len(scores)] += 1e-3
    shares = (shares / shares.sum())[None, None]
    budgets = torch.tensor([[[budget]]], dtype=torch.float64)
    found = inclusion_probabilities(shares, budgets, 64)
    assert ((found >= 0) & (found <= 1)).all()
    assert float(found.sum()) == pytest.approx(min(budget, len(scores)), abs=1e-6)
    assert (found[..., len(scores) :] == 0).all()


def test_equal_scores_are_sampled_evenly_from_a_long_sequence():
    """Few of very many: probabilities so small that coarse units would round them away."""
    scores = torch.full((1, 1, 1_000_000), 1e-6)
    slots, weights = sample_keys(scores, 8, real_tokens(None, 1, 1_000_000, scores.device))
    assert float(weights.sum()) == pytest.approx(1_000_000, rel=1e-4)
    assert slots[0, 0].diff().float().std() < 2
