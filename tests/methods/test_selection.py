"""Budgets and selections: against the paper's rules and their properties."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import SMALL, checked, kept_mask, make_problem, oracle
from token_sparse_attention import (
    DenseReason,
    KVSamplingConfig,
    TokenSelectionConfig,
    compress,
    reference,
    score_tokens,
    select_tokens,
)
from token_sparse_attention.gate import reason_of
from token_sparse_attention.methods import LayerShape, method_of
from token_sparse_attention.methods import selection as selection_method


def scores_of(query, key, config, **options):
    return score_tokens(query, key, config.observation_window, **options)


def rule_by_hand(scores, config):
    """Steps 2 to 4 for one head-shared budget, in plain Python sums."""
    heads, count = scores.shape
    half = config.pool_size // 2
    padded = torch.nn.functional.pad(scores, (half, half))
    smoothed = torch.stack(
        [padded[:, i : i + config.pool_size].mean(-1) for i in range(count)], dim=-1
    )
    mass = smoothed.mean(0)
    mass = mass / (mass.sum() + 1e-8)
    below, total = 0, 0.0
    for share in sorted(mass.tolist()):
        total += share
        if total >= config.drop_mass:
            break
        below += 1
    kept = max(config.min_tokens, count - (below + 1))
    rows = []
    for head in range(heads):
        ranked = sorted(range(count), key=lambda j: (-smoothed[head, j].item(), j))
        rows.append(sorted(ranked[:kept]) + list(range(count, count + config.observation_window)))
    return below, rows


@given(st.integers(45, 120), st.floats(0.01, 0.7), st.integers(0, 99))
def test_selection_follows_the_published_rule(length, drop_mass, seed):
    config = dataclasses.replace(SMALL, drop_mass=drop_mass)
    query, key, _ = make_problem(query_len=length, seed=seed)
    scores = scores_of(query, key, config)
    selection = select_tokens(scores, config)
    below, rows = rule_by_hand(scores[0], config)
    assert selection.ran_sparse.tolist() == [below > 0]
    if below:
        assert selection.indices[0].tolist() == rows


@given(
    st.integers(1, 3),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    st.integers(41, 140),
    st.sampled_from(["shared", "per_head"]),
    st.floats(0.001, 0.9),
    st.integers(0, 99),
)
def test_selection_properties(batch, heads, length, budget, drop_mass, seed):
    config = dataclasses.replace(SMALL, budget=budget, drop_mass=drop_mass)
    query, key, _ = make_problem(
        batch=batch, heads=heads[0], kv_heads=heads[1], query_len=length, seed=seed
    )
    scores = scores_of(query, key, config)
    selection = select_tokens(scores, config)
    assert selection.indices.dtype == selection.lengths.dtype == torch.int64
    assert selection.ran_sparse.dtype == torch.bool
    num_scored = length - config.observation_window
    for row in range(batch):
        lengths = selection.lengths[row].tolist()
        if budget == "shared":
            assert len(set(lengths)) == 1
        if not selection.ran_sparse[row]:
            assert set(lengths) == {length}
        for head, kept in enumerate(lengths):
            indices = selection.indices[row, head]
            assert (indices[kept:] == -1).all()
            indices = indices[:kept]
            assert (indices.diff() > 0).all(), "sorted and unique"
            assert indices[0] >= 0
            assert indices[-1] == length - 1
            assert (indices >= num_scored).sum() == config.observation_window, "window kept"
            assert kept >= min(config.min_tokens, num_scored) + config.observation_window


@given(st.sampled_from(["shared", "per_head"]), st.floats(0.01, 0.9), st.integers(0, 99))
def test_dropped_mass_without_its_largest_token_is_below_drop_mass(budget, drop_mass, seed):
    config = dataclasses.replace(SMALL, budget=budget, drop_mass=drop_mass, min_tokens=0)
    query, key, _ = make_problem(query_len=140, seed=seed)
    scores = scores_of(query, key, config)
    selection = select_tokens(scores, config)
    smoothed = reference.smooth(scores[0], config.pool_size).double()
    mass = smoothed if budget == "per_head" else smoothed.mean(0, keepdim=True)
    mass = mass / mass.sum(-1, keepdim=True)
    for head in range(len(mass)):
        dropped = 140 - int(selection.lengths[0, head])
        smallest = mass[head].sort().values[:dropped]
        assert smallest[:-1].sum() < drop_mass + 1e-6
        if dropped:
            assert smallest.sum() >= drop_mass - 1e-6, "one more token would have fitted"


def test_per_head_budgets_follow_each_heads_own_scores():
    config = dataclasses.replace(SMALL, budget="per_head", drop_mass=0.3, min_tokens=8)
    query, key, _ = make_problem(query_len=200)
    query[:, 0] *= 4  # one head attends to few tokens
    scores = scores_of(query, key, config)
    selection = select_tokens(scores, config)
    assert len(set(selection.lengths[0].tolist())) > 1
    shared = dataclasses.replace(config, budget="shared")
    for head in range(4):
        alone = select_tokens(scores[:, head : head + 1], shared)
        kept = int(alone.lengths[0, 0])
        assert selection.lengths[0, head] == kept
        assert torch.equal(selection.indices[0, head, :kept], alone.indices[0, 0, :kept])


def test_a_head_that_may_drop_nothing_keeps_all_under_per_head_budgets():
    config = TokenSelectionConfig(
        drop_mass=0.15, observation_window=2, pool_size=1, min_tokens=0, budget="per_head"
    )
    scores = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.4, 0.4]]])
    selection = select_tokens(scores, config)
    assert selection.ran_sparse.tolist() == [True]
    assert selection.lengths.tolist() == [[6, 4]]
    assert selection.indices[0, 1].tolist() == [2, 3, 4, 5, -1, -1]
    both = select_tokens(scores[:, :1], config)
    assert both.ran_sparse.tolist() == [False], "dense only if every head keeps all"


def test_ties_keep_the_lower_index():
    config = TokenSelectionConfig(drop_mass=0.45, observation_window=2, pool_size=1, min_tokens=1)
    selection = select_tokens(torch.full((1, 1, 10), 0.1), config)
    assert selection.indices[0, 0].tolist() == [0, 1, 2, 3, 4, 10, 11]


def test_one_token_more_than_fits_is_dropped():
    config = TokenSelectionConfig(drop_mass=0.25, observation_window=1, pool_size=1, min_tokens=0)
    scores = torch.tensor([[[0.1, 0.4, 0.1, 0.4]]])
    assert select_tokens(scores, config).indices[0, 0].tolist() == [1, 4]


@pytest.mark.parametrize(("drop_mass", "length"), [(0.0, 200), (0.2, 40), (1e-12, 200)])
def test_dense_rules(drop_mass, length):
    config = dataclasses.replace(SMALL, drop_mass=drop_mass)
    query, key, _ = make_problem(query_len=length)
    selection = select_tokens(scores_of(query, key, config), config)
    assert not selection.ran_sparse.any()
    assert torch.equal(selection.indices[0, 0], torch.arange(length))


def test_scores_that_are_not_finite_run_dense():
    scores = torch.rand(2, 2, 100)
    scores[1, 0, 7] = torch.inf
    selection = select_tokens(scores, SMALL)
    assert selection.ran_sparse.tolist() == [True, False]
    assert reason_of(int(selection.reasons[0])) is None
    assert reason_of(int(selection.reasons[1])) is DenseReason.SCORES_NOT_FINITE


def test_a_chunk_shorter_than_the_observation_window_runs_dense():
    query, key, _ = make_problem(query_len=10, kv_len=100)
    assert not select_tokens(scores_of(query, key, SMALL), SMALL).ran_sparse.any()


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_a_sequence_of_a_batch_selects_what_it_selects_alone(budget):
    config = dataclasses.replace(SMALL, budget=budget)
    query, key, _ = make_problem(batch=3, query_len=160)
    query[1] *= 3
    mask = torch.ones(3, 160, dtype=torch.bool)
    mask[1, :25] = False
    mask[2, 118:] = False
    scores = scores_of(query, key, config, padding_mask=mask)
    selection = select_tokens(scores, config, padding_mask=mask)
    assert len({tuple(lengths) for lengths in selection.lengths.tolist()}) == 3
    for row in range(3):
        start, end = mask[row].nonzero().flatten()[[0, -1]].tolist()
        alone = select_tokens(
            scores_of(
                query[row : row + 1, :, start : end + 1],
                key[row : row + 1, :, start : end + 1],
                config,
            ),
            config,
        )
        mine = kept_mask(selection.indices[row : row + 1], 160)
        theirs = kept_mask(alone.indices, end + 1 - start)
        assert torch.equal(mine[..., start : end + 1], theirs)
        assert mine.sum() == theirs.sum()


def test_short_sequences_of_a_padded_batch_run_dense_and_list_their_tokens():
    query, key, _ = make_problem(batch=2, query_len=160)
    mask = torch.ones(2, 160, dtype=torch.bool)
    mask[1, 10:] = False
    scores = scores_of(query, key, SMALL, padding_mask=mask)
    selection = select_tokens(scores, SMALL, padding_mask=mask)
    assert selection.ran_sparse.tolist() == [True, False]
    assert selection.lengths[1].tolist() == [10] * 4
    assert selection.indices[1, 0, :11].tolist() == [*range(10), -1]


@pytest.mark.parametrize("kept", [1.0, 0.65, 0.5, 0.2, 0.001])
def test_kept_share_overrides_the_budget(kept):
    query, key, _ = make_problem(query_len=200)
    scores = scores_of(query, key, SMALL)
    config = dataclasses.replace(SMALL, keep_ratio=kept)
    selection = select_tokens(scores, config)
    assert selection.ran_sparse.all()
    assert (selection.lengths == max(round(kept * 200), SMALL.observation_window)).all()
    full = dataclasses.replace(config, drop_mass=0.0, min_tokens=10_000)
    assert torch.equal(selection.indices, select_tokens(scores, full).indices)


def test_kept_share_counts_a_sequences_real_tokens():
    scores = torch.rand(2, 1, 84)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, :50] = False
    config = dataclasses.replace(SMALL, keep_ratio=0.5)
    selection = select_tokens(scores, config, padding_mask=mask)
    assert selection.lengths.tolist() == [[50], [25]]


def test_selection_agrees_with_the_oracle():
    problem = make_problem(query_len=180)
    _, keep = oracle(problem, SMALL)
    selection = select_tokens(scores_of(problem.query, problem.key, SMALL), SMALL)
    assert torch.equal(kept_mask(selection.indices, 180)[0], keep)


def test_as_many_heads_as_fit_are_packed_together(monkeypatch):
    problem = checked(make_problem(batch=2, query_len=50), impl="triton")
    each = 4 * 50 * 16 * 4  # rows of Q, K, V and output
    assert [*selection_method.head_groups(problem, 50)] == [range(8)]
    for fitting, groups in (
        (5, [range(4), range(4, 8)]),
        (0.1, [range(n, n + 1) for n in range(8)]),
    ):
        monkeypatch.setattr(selection_method, "_PACKED_BYTES", int(fitting * each))
        assert [*selection_method.head_groups(problem, 50)] == groups


def test_the_workspace_has_room_for_the_packed_heads():
    problem = make_problem(query_len=60, kv_len=90)
    config = dataclasses.replace(SMALL, keep_ratio=1.0)
    packed = compress(
        *problem, select_tokens(scores_of(problem.query, problem.key, config), config)
    )
    held = sum(x.nbytes for x in packed[:3]) + packed.query.nbytes
    workspace, shape = method_of(config).workspace, LayerShape(4, 2, 16, 4, 60, 90)
    assert workspace(shape) - workspace(shape._replace(head_dim=0)) == held
    listed = (torch.float32, torch.float32, torch.int32, torch.int64)  # scores twice, then slots
    entry = sum(dtype.itemsize for dtype in listed)
    assert workspace(shape._replace(head_dim=0)) == 4 * 90 * entry


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(1, 2, 9).double()}, TypeError, "scores must be a float32 tensor"),
        ({"scores": None}, TypeError, "scores must be a float32 tensor, got NoneType"),
        (
            {"scores": torch.zeros(2, 9)},
            ValueError,
            r"scores must have shape \[B, H, N\], got \[2, 9\]",
        ),
        ({"config": None}, TypeError, "config must be a TokenSelectionConfig, got NoneType"),
        (
            {"config": KVSamplingConfig()},
            TypeError,
            "config must be a TokenSelectionConfig, got KVSamplingConfig",
        ),
        ({"tp_group": 2}, TypeError, "tp_group must be a torch.distributed.ProcessGroup"),
        (
            {"padding_mask": torch.ones(1, 99, dtype=torch.bool)},
            ValueError,
            "scores must have N = 83",
        ),
        (
            {"padding_mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            "padding_mask must have shape",
        ),
    ],
)
def test_bad_select_arguments_are_named(change, error, message):
    arguments = {"scores": torch.rand(1, 2, 90), "config": SMALL} | change
    with pytest.raises(error, match=message):
        select_tokens(**arguments)
