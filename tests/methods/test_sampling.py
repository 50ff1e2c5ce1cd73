"""Sampling the keys that stand for what a window leaves behind: budgets, room, and settings."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from support import SAMPLING, checked, make_problem, with_selection
from token_sparse_attention import Execution, reference
from token_sparse_attention.blocks import Blocks
from token_sparse_attention.methods import KVSampling, LayerShape, sampling
from token_sparse_attention.methods.probes import blocks_of, find_probes
from token_sparse_attention.methods.sampling import block_budgets, sample, sample_keys


def scores_of(heads, length, seed, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(heads, length, generator=generator) * sharpness).softmax(-1)


@given(
    st.integers(1, 3), st.integers(1, 300), st.floats(0, 400), st.floats(0, 30), st.integers(0, 99)
)
@example(1, 65, 64.83946599059787, 2.0, 2)  # the oracle once subtracted in single precision
def test_samples_are_those_of_the_oracle(heads, number, budget, sharpness, seed):
    scores = scores_of(heads, number, seed, sharpness)
    budgets = torch.full((heads, 1), budget, dtype=torch.float64)
    weights = sample_keys(scores, budgets)
    for head in range(heads):
        expected = reference.sample_block(scores[head], budget)
        assert torch.equal(weights[head] > 0, expected > 0)
        torch.testing.assert_close(weights[head], expected, rtol=1e-6, atol=0)


def test_likely_keys_are_sampled_with_smaller_weights():
    scores = torch.full((1, 400), 1e-9)
    scores[0, 100:110] = 5.0
    scores[0, 300] = 100.0
    weights = sample_keys(scores, torch.tensor([[40.0]], dtype=torch.float64))[0]
    assert weights[300] == 1.0
    assert int((weights[100:110] > 0).sum()) >= 6
    assert 10 < float(weights.max()) < 20, "half of the probability is the same for all"


def sampled(problem, config, mask=None, impl="reference"):
    """The blocks of a call, and what they sample."""
    of = checked(problem, mask, impl)
    least = (config.sliding_window + config.sink_size) // config.block_size * config.block_size
    blocks = blocks_of(config, of, max(least, config.block_size))
    return blocks, sample(of, blocks, find_probes(of, blocks), config)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_sampled_lies_behind_the_windows_of_its_block(budget, impl):
    config = dataclasses.replace(
        SAMPLING, sliding_window=37, sink_size=3, num_samples=20, budget=budget
    )
    problem = make_problem(batch=2, query_len=200)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :21] = False
    mask[1, 185:] = False
    for tensor in problem:
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    blocks, keys = sampled(problem, config, mask, impl)
    for number, (start, end) in enumerate(((21, 200), (0, 185))):
        for index in range(blocks.num_blocks):
            first = (blocks.first + index) * 16
            counts = keys.counts[number, :, index].tolist()
            if first >= end - start:
                assert counts == [0] * 4
                continue
            for head, count in enumerate(counts):
                slots = keys.slots[number, head, index, :count].long()
                weights = keys.log_weights[number, head, index, :count]
                assert slots[:3].tolist() == [start, start + 1, start + 2]
                assert (weights[:3] == 0).all()
                assert (weights >= 0).all()
                assert weights.isfinite().all()
                assert (slots.diff() > 0).all()
                assert int(slots.max()) < start + first + 16 - 37
                if budget == "shared":
                    wanted = min(20, first + 16 - 37 - 3)
                    assert 0.7 * wanted <= count - 3 <= wanted + 1


def budgets_of(means, config, length=192):
    """The budgets of one block whose heads give each candidate these scores."""
    reach = length - config.sliding_window
    blocks = Blocks(16, 8, config.sliding_window, config.sink_size, length // 16 - 1, 1)
    scores = torch.tensor(means)[None, :, None].expand(1, len(means), reach).contiguous()
    problem = make_problem(heads=len(means), kv_heads=1, query_len=length)
    return block_budgets(scores, blocks, checked(problem), config)[0, :, 0]


def test_heads_that_attend_far_get_more_samples():
    config = dataclasses.replace(SAMPLING, budget="per_head", sliding_window=32, num_samples=20)
    means = [0.0] * 8
    means[3], means[5] = 0.05 / 160, 0.1 / 160
    budgets = budgets_of(means, config)
    mean = 20
    assert budgets[5] == 4 * mean, "the most that a head can have"
    assert mean / 4 < budgets[3] < budgets[5]
    others = [head for head in range(8) if head not in (3, 5)]
    assert (budgets[others] == mean / 4).all()
    even = budgets_of([0.001] * 8, config)
    torch.testing.assert_close(even, torch.full_like(even, 20.0))
    assert (budgets_of([0.0] * 8, config) == mean / 4).all()


def test_dense_heads_leave_their_samples_to_the_others():
    """Which share them out by need where budgets are per head."""
    config = dataclasses.replace(SAMPLING, budget="per_head", dense_heads=(1, 2), num_samples=30)
    budgets = budgets_of([0.2 / 176, 0.9 / 176, 0.9 / 176, 0.4 / 176], config)
    mean = 30
    expected = [mean * (0.25 + 0.75 * share) for share in (2 / 3, 0, 0, 4 / 3)]
    torch.testing.assert_close(budgets, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_a_prompts_length_hardly_changes_how_many_samples_there_is_room_for(budget):
    """Kernels are compiled for that number, so a prompt that bounds it does so in octaves."""
    config = dataclasses.replace(SAMPLING, budget=budget, num_samples=70)

    def room(length):
        return sampled(make_problem(query_len=length), config)[1].slots.shape[3]

    assert {room(length) for length in (300, 400, 900)} == {70 if budget == "shared" else 280}
    assert {room(length) for length in (33, 40, 60, 64)} == {64}


def test_parts_of_the_blocks_are_sampled_as_all_are(monkeypatch):
    """Scores of a long prompt do not fit in memory at once."""
    problem = make_problem(batch=2, query_len=200)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :20] = False
    for budget in ("shared", "per_head"):
        config = dataclasses.replace(SAMPLING, sink_size=2, budget=budget)
        for padding_mask in (None, mask):
            expected = with_selection(problem, config, padding_mask=padding_mask)
            for room in (1, 3000):
                with monkeypatch.context() as patch:
                    patch.setattr(sampling, "_SCORES", room)
                    out, selection = with_selection(problem, config, padding_mask=padding_mask)
                assert torch.equal(out, expected[0])
                assert torch.equal(selection.indices, expected[1].indices)
                assert torch.equal(selection.lengths, expected[1].lengths)


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
        assert selection.lengths.tolist() == [[144] * 4, [96] * 4]


@pytest.mark.parametrize(
    "field", ["sliding_window", "sink_size", "num_samples", "dense_queries", "block_size"]
)
@pytest.mark.parametrize("crossover", ["off", "auto"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_setting_is_too_large(field, crossover, impl):
    """All of them end in dense attention, here of padded batches, whose lengths are tensors."""
    changed = {field: 10**25}
    if field == "block_size":
        changed = {field: 2**80, "sliding_window": 2**80}
    config = dataclasses.replace(SAMPLING, crossover=crossover, **changed)
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
