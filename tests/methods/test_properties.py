"""How good the estimate is: unbiased, and on inputs made to break it no worse than its bound."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from block_checks import On
from support import Problem, causal_attention, make_problem, relative_error
from token_sparse_attention import KVSamplingConfig
from token_sparse_attention.methods.sampling import sample_keys

CONFIG = KVSamplingConfig(
    block_size=64, num_probes=16, sliding_window=64, sink_size=0, num_samples=128,
    dense_queries=0, crossover="off",
)  # fmt: skip
CPU = On()
ALL_KEYS = dataclasses.replace(CONFIG, num_samples=4096 * 16)


def shares_of(length, seed, sharpness):
    """Scores ``[1, N]`` as softmax gives them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, length, generator=generator) * sharpness).softmax(-1)


def budget_of(*numbers):
    return torch.tensor([[float(number)] for number in numbers], dtype=torch.float64)


def probabilities(scores, budget):
    """The inclusion probabilities, by bisection."""
    shares = scores.double() / scores.double().sum() + 1 / scores.shape[1]
    low, high = 0.0, 1e18
    for _ in range(200):
        middle = (low + high) / 2
        enough = float((shares * middle).clamp(max=1).sum()) >= budget
        low, high = (low, middle) if enough else (middle, high)
    return (shares * high).clamp(max=1)


@given(
    st.integers(1, 400), st.integers(0, 500), st.floats(0, 40), st.integers(0, 99), st.booleans()
)
def test_samples_are_few_weighted_and_the_same_each_time(number, budget, sharpness, seed, zeros):
    scores = shares_of(number, seed, sharpness)
    if zeros:
        scores[:, ::2] = 0.0
    weights = sample_keys(scores, budget_of(budget))
    assert torch.equal(weights, sample_keys(scores, budget_of(budget)))
    chosen = weights > 0
    assert weights.isfinite().all()
    assert ((weights == 0) | (weights >= 1 - 1e-9)).all()
    if budget >= number:
        assert (weights == 1).all(), "all are certain"
        return
    assert int(chosen.sum()) <= budget + 1
    if not budget:
        return
    p = probabilities(scores, budget)
    certain = p > 1 - 1e-6
    assert (weights[certain] == 1).all()
    hits = (weights * p)[chosen & ~certain]
    units = (p * 2**18)[chosen & ~certain]
    torch.testing.assert_close(
        hits, hits.round(), rtol=float((1 / units).max().clamp(min=1e-4)), atol=0
    )
    assert abs(float(hits.sum()) + int(certain.sum()) - budget) <= 1 + 1e-6, "a point a cell"


def test_a_key_that_two_points_fall_on_counts_twice():
    """The point of a cell may lie near its end, and the next cell's near its beginning."""
    scores, twice = shares_of(4000, 5, 1.5), 0
    for budget in range(200, 1200, 50):
        weights, p = sample_keys(scores, budget_of(budget)), probabilities(scores, budget)
        hits = (weights * p)[(weights > 0) & (p < 1 - 1e-6)].round()
        twice += int((hits == 2).sum())
        assert int(hits.max()) <= 2
        inside = int((p > 1 - 1e-6).sum())
        assert abs(int(hits.sum()) + inside - budget) <= 1, "no point is lost"
    assert twice > 10


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.0])
def test_keys_are_included_as_often_as_their_probability(sharpness):
    """Which order the keys have decides which are sampled, so orders average."""
    scores, budget, rounds = shares_of(300, 1, sharpness), 40, 3000
    generator = torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(300, generator=generator) for _ in range(rounds)])
    weights = sample_keys(scores[0][orders], torch.full((rounds, 1), float(budget)).double())
    weights = torch.zeros_like(weights).scatter_(1, orders, weights)
    p = probabilities(scores, budget)[0]
    hits = (weights * p).mean(0)
    # A point may lie at either end of its cell, so likely keys can be hit twice or not at all.
    deviation = (weights * p).std(0) / rounds**0.5
    assert ((hits - p).abs() < 5 * deviation + 1e-6).all()
    assert float(weights.sum(1).mean()) == pytest.approx(300, rel=0.005)
    values = torch.rand(300, generator=generator).double()
    estimates = weights @ values
    assert float(estimates.mean()) == pytest.approx(float(values.sum()), rel=0.005)
    assert float(estimates.std()) < float(values.sum()) / 4


@pytest.mark.parametrize("length", [97, 300, 1000])
def test_over_shifts_of_a_text_the_sum_of_weights_is_its_length(length):
    scores = shares_of(length, 2, 1.5)[0]
    shifted = torch.stack([scores.roll(shift) for shift in range(length)])
    weights = sample_keys(shifted, torch.full((length, 1), 24.0).double())
    assert float(weights.sum(1).mean()) == pytest.approx(length, rel=0.02)


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(1, 100),
        torch.full((1, 100), 1e-45),
        torch.full((1, 100), 1e38),
        torch.full((1, 100), torch.inf),
        torch.full((1, 100), torch.nan),
        torch.eye(100)[:1],
        torch.cat([torch.full((1, 50), 1e-42), torch.ones(1, 50)], 1),
    ],
    ids=["zeros", "denormal", "huge", "infinite", "NaN", "one", "denormal and ones"],
)
@pytest.mark.parametrize("budget", [0, 1, 3, 99, 99.5, 100])
def test_degenerate_scores_give_finite_weights(scores, budget):
    weights = sample_keys(scores, budget_of(budget))
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert int((weights > 0).sum()) <= budget + 1
    if budget == 100:
        assert (weights == 1).all()


def test_equal_scores_are_sampled_evenly_from_a_long_sequence():
    """Few of very many: probabilities so small that coarse units would round them away."""
    weights = sample_keys(torch.full((1, 1_000_000), 1e-6), budget_of(512))
    assert float(weights.sum()) == pytest.approx(1_000_000, rel=0.01)
    gaps = weights[0].nonzero()[:, 0].diff()
    assert float(gaps.max()) < 2 * 1_000_000 / 512


def dense_of(problem):
    return causal_attention(*problem, scale=problem.query.shape[-1] ** -0.5)


def errors(problem, config, first=500):
    """Mean relative error of the rows from a position on, and that of window and sinks alone."""
    dense = dense_of(problem)
    found = []
    for number in (config.num_samples, 0):
        out = CPU.run(problem, dataclasses.replace(config, num_samples=number)).output
        assert out.isfinite().all()
        error = (out - dense).norm(dim=-1) / dense.norm(dim=-1).clamp(min=1e-20)
        found.append(float(error[:, :, first:].mean()))
    return found


def inputs(length, head_dim=32, heads=4, seed=1):
    return make_problem(
        heads=heads, kv_heads=1, query_len=length, head_dim=head_dim, seed=seed, sharpness=1.0
    )


@pytest.mark.parametrize("period", [3, 7, 16, 21, 32])
@pytest.mark.parametrize("num_samples", [256, 1024])
def test_records_of_equal_length(period, num_samples):
    """Equal steps would sample the same columns of all rows: error 2.6, and 0.003 without."""
    problem = inputs(2112)
    column = torch.arange(2112) % period
    key, value = (tensor[:, :, :period][:, :, column] for tensor in problem[1:])
    error, _ = errors(
        problem._replace(key=key, value=value),
        dataclasses.replace(CONFIG, num_samples=num_samples),
    )
    assert error < 0.5


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("num_samples", [1, 8, 128])
def test_identical_tokens_are_exact(budget, num_samples):
    config = dataclasses.replace(CONFIG, budget=budget, num_samples=num_samples)
    problem = Problem(*(x[:, :, :1].expand(-1, -1, 700, -1).contiguous() for x in inputs(700)))
    error, _ = errors(problem, config, 0)
    assert error < 1e-5


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_one_key_that_all_look_for_is_always_seen(budget):
    problem = inputs(1088)
    wanted = problem.key[:, :, 301:302] * 4
    problem.key[:, :, 301:302] = wanted
    query = problem.query * 0.2 + wanted
    problem = problem._replace(query=query)
    error, without = errors(problem, dataclasses.replace(CONFIG, budget=budget), 384)
    assert without > 0.9
    assert error < 0.02


@pytest.mark.parametrize("sharpness", [0.0, 1e-30, 1.0, 2.0])
@pytest.mark.parametrize(("num_samples", "bound"), [(64, 0.95), (256, 0.65)])
def test_samples_beat_none_where_scores_are_flat(sharpness, num_samples, bound):
    """As many keys as the window has, and four times as many."""
    problem = inputs(1088)
    problem.value.add_(0.3)  # values have a mean, as those of models do
    config = dataclasses.replace(CONFIG, num_samples=num_samples)
    error, without = errors(problem._replace(query=problem.query * sharpness), config)
    assert error < bound * without


def test_early_queries_of_a_block_are_served_too():
    """Their windows reach further back than the last one's, into what was not yet sampled."""
    problem = inputs(1088)
    problem.value.add_(0.3)
    config = dataclasses.replace(CONFIG, num_samples=256)
    dense, (out, _, _) = dense_of(problem), CPU.run(problem, config)
    error = ((out - dense).norm(dim=-1) / dense.norm(dim=-1))[0, :, 512:].mean(0)
    error = error.view(-1, 64)
    early, late = float(error[:, :8].mean()), float(error[:, -8:].mean())
    assert early < 1.3 * late


def test_the_error_falls_with_the_number_of_samples():
    problem = inputs(1600)
    problem.value.add_(0.3)
    found = [
        errors(problem, dataclasses.replace(CONFIG, num_samples=number), 1000)[0]
        for number in (16, 64, 256)
    ]
    assert found[0] > 1.2 * found[1] > 1.2 * found[2]


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("length", [129, 190, 300, 320, 700])
def test_a_budget_of_all_candidates_is_dense_attention(budget, length):
    """One sequence's heads of equal mass have as many samples as there are candidates."""
    config = dataclasses.replace(ALL_KEYS, budget=budget, sink_size=2)
    problem = inputs(length)
    out, selection, lse = CPU.run(problem, config)
    assert selection.ran_sparse.all()
    reach = (length - 1) // 64 * 64
    if budget == "shared":
        assert (selection.lengths == reach).all()
    else:  # a head with little mass has less
        alone = problem._replace(query=problem.query[:, :1])
        out, selection, lse = CPU.run(alone, config)
        problem = alone
    assert selection.indices[0, 0, :reach].tolist() == list(range(reach))
    assert relative_error(out, dense_of(problem)) < 1e-6
    logits = problem.query[0, 0] @ problem.key[0, 0].T * 32**-0.5
    logits.masked_fill_(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse[0, 0], logits.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_ten_thousands_stay_finite(dtype):
    problem = inputs(700)
    problem = Problem(*(tensor.to(dtype) for tensor in problem))
    problem = problem._replace(query=problem.query * 1e4)
    for config in (CONFIG, dataclasses.replace(CONFIG, budget="per_head")):
        out, selection, lse = CPU.run(problem, config)
        assert selection.ran_sparse.all()
        assert out.isfinite().all()
        assert lse.isfinite().all()
    error, without = errors(problem, CONFIG)
    assert error < 1.05 * without


@pytest.mark.parametrize("scale", [1e-20, 1e-38, 1e-45])
def test_tiny_numbers(scale):
    problem = inputs(700)
    tiny = problem._replace(query=problem.query * scale, key=problem.key * scale)
    flat = problem._replace(query=problem.query * 0)
    out, selection, _ = CPU.run(tiny, CONFIG)
    assert selection.ran_sparse.all()
    torch.testing.assert_close(out, CPU.run(flat, CONFIG).output)


def test_keys_whose_scores_are_zero_may_be_sampled():
    """A probability is half uniform, so that what probes overlook is not lost."""
    problem = inputs(1088)
    direction = F.normalize(torch.randn(32), dim=0)
    key = problem.key.clone()
    key[:, :, ::2] -= 300 * direction  # no probe sees these
    query = problem.query * 0.1 + 8 * direction
    _, selection, _ = CPU.run(problem._replace(query=query, key=key), CONFIG)
    chosen = selection.indices[0, :, : int(selection.lengths.max())]
    share = float((chosen[chosen >= 0] % 2 == 0).float().mean())
    assert 0.1 < share < 0.4


def test_late_queries_that_turn_elsewhere_find_their_keys_among_the_uniform_half():
    """The block before looked at other keys; the estimate stays a weighted mean of values."""
    problem = inputs(1088)
    problem.query[:, :, 1024:] = problem.query[:, :, 1024:].flip(-1)
    out, _, _ = CPU.run(problem, CONFIG)
    largest = problem.value.abs().amax(2, keepdim=True).repeat_interleave(4, 1)
    assert (out.abs() <= largest + 1e-5).all()
