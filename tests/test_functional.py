"""The whole operator: against the float64 oracle, its definition and its properties."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from support import SMALL, Problem, kept_mask, make_problem, oracle, relative_error
from token_sparse_attention import (
    compress,
    crossover,
    decompress,
    functional,
    score_tokens,
    select_tokens,
    token_sparse_attention,
)
from token_sparse_attention.attention.dense import causal_attention, varlen_causal_attention
from token_sparse_attention.attention.far_tokens import sample_budgets
from token_sparse_attention.compression import compress_sequences
from token_sparse_attention.inputs import real_tokens, single_precision
from token_sparse_attention.reference import far_counts, window_scores

VARIANTS = [
    dataclasses.replace(SMALL, budget=budget, **fallback)
    for budget in ("shared", "per_head")
    for fallback in (
        {"fallback": "zero"},
        {"fallback": "window", "fallback_window": 20},
        {"fallback": "window", "fallback_window": 20, "fallback_sinks": 5},
        {"fallback": "window", "fallback_window": 7, "fallback_landmarks": 9},
        {"fallback": "window", "fallback_window": 9, "fallback_sinks": 2, "fallback_landmarks": 4},
        {"fallback": "window", "fallback_window": 7, "fallback_samples": 9},
        {"fallback": "zero", "dense_queries": 8},
    )
]
VARIANTS += [
    dataclasses.replace(
        SMALL, drop_mass=None, select_queries=False, fallback="window", fallback_window=9, **others
    )
    for others in (
        {},
        {"fallback_samples": 15},
        {"fallback_samples": 15, "budget": "per_head"},
        {
            "fallback_sinks": 2,
            "fallback_landmarks": 4,
            "fallback_samples": 11,
            "dense_queries": 21,
        },
        {"fallback_samples": 15, "dense_heads": (0,)},
        {"fallback_samples": 15, "dense_heads": (0,), "budget": "per_head", "dense_queries": 21},
    )
]


def name_of(config):
    far = (config.fallback_sinks, config.fallback_landmarks, config.fallback_samples)
    chosen = "some" if config.select_queries else "all"
    dense = (config.dense_queries, *config.dense_heads)
    return "-".join(map(str, (config.budget, chosen, config.fallback, *far, *dense)))


def sparse_run(problem, config, **kwargs):
    out, selection = token_sparse_attention(*problem, config, return_selection=True, **kwargs)
    assert selection.ran_sparse.all(), "the test must exercise the sparse path"
    return out, selection


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 2)])
@pytest.mark.parametrize(("query_len", "kv_len"), [(63, 63), (257, 257), (40, 111), (16, 190)])
def test_operator_equals_the_oracle(config, heads, kv_heads, query_len, kv_len):
    problem = make_problem(heads=heads, kv_heads=kv_heads, query_len=query_len, kv_len=kv_len)
    out, selection = sparse_run(problem, config)
    expected, keep = oracle(problem, config)
    assert torch.equal(kept_mask(selection.indices, kv_len)[0], keep)
    assert relative_error(out[0], expected) < (1e-5 if config.fallback_samples else 1e-6)


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_last_queries_attended_apart_change_nothing(monkeypatch, finite, padded):
    config = dataclasses.replace(VARIANTS[-1], dense_queries=21, dense_heads=())
    problem = make_problem(batch=2, query_len=190)
    if not finite:
        problem.query[0, 0, -3] = torch.nan  # that row runs dense
    mask = torch.ones(2, 190, dtype=torch.bool) if padded else None
    if mask is not None:
        mask[0, :20] = False
    run = functools.partial(
        token_sparse_attention, *problem, config, padding_mask=mask, return_lse=True
    )
    together, apart, lasts = run(), [], functional.attend_last
    monkeypatch.setattr(functional, "leaves_gpu_idle", lambda *_: True)
    monkeypatch.setattr(
        functional, "attend_last", lambda *of, **by: apart.append(of[3]) or lasts(*of, **by)
    )
    for one, other in zip(run(), together):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert apart == ([] if padded else [21])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_eager(dtype):
    problem = make_problem(query_len=257, head_dim=64, dtype=dtype)
    out, selection = sparse_run(problem, SMALL)
    assert out.dtype == dtype
    exact = Problem(*(tensor.double() for tensor in problem))
    packed = compress(*exact, selection)
    cu = packed.cu_seqlens_k
    for head in range(4):
        rows = slice(*cu[head : head + 2].tolist())
        q, k, v = packed.query[rows], packed.key[rows], packed.value[rows]
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        truth = ((q @ k.T) / 8).masked_fill(future, -torch.inf).softmax(-1) @ v
        half = [x.to(dtype) for x in (q, k, v)]
        logits = (half[0] @ half[1].T) / 8
        eager = logits.masked_fill(future, -torch.inf).softmax(-1) @ half[2]
        mine = out[0, head, selection.indices[0, head, : len(q)]]
        assert relative_error(mine, truth) <= 2 * relative_error(eager, truth)


@example(VARIANTS[9], 134, 1, (2, 1), 57)  # draws next to each other, by scores' last digits
@given(
    st.sampled_from(VARIANTS),
    st.integers(1, 160),
    st.integers(0, 120),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.integers(0, 99),
)
def test_any_lengths_equal_the_oracle(config, query_len, past, heads, seed):
    problem = make_problem(
        heads=heads[0], kv_heads=heads[1], query_len=query_len, kv_len=query_len + past, seed=seed
    )
    out, selection = token_sparse_attention(*problem, config, return_selection=True)
    expected, keep = oracle(problem, config)
    assert selection.ran_sparse.tolist() == [keep is not None]
    assert relative_error(out[0], expected) < (1e-5 if config.fallback_samples else 2e-6)


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize("query_len", [200, 120])
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(config, query_len):
    kv_len = 200
    problem = make_problem(batch=4, query_len=query_len, kv_len=kv_len)
    mask = torch.ones(4, kv_len, dtype=torch.bool)
    mask[1, :33] = False
    mask[2, 171:] = False
    mask[3, :165] = False  # too short to run sparse
    for tensor, first in zip(problem, (kv_len - query_len, 0, 0)):
        tensor.masked_fill_(~mask[:, None, first:, None], torch.nan)
    out, selection = token_sparse_attention(
        *problem, config, padding_mask=mask, return_selection=True
    )
    assert selection.ran_sparse.tolist() == [True, True, True, False]
    for row in range(4):
        first, last = mask[row].nonzero().flatten()[[0, -1]].tolist()
        begin = max(first, kv_len - query_len) - (kv_len - query_len)
        end = last + 1 - (kv_len - query_len)
        alone = Problem(
            problem.query[row : row + 1, :, begin:end],
            problem.key[row : row + 1, :, first : last + 1],
            problem.value[row : row + 1, :, first : last + 1],
        )
        expected = token_sparse_attention(*alone, config)[0]
        torch.testing.assert_close(out[row, :, begin:end], expected, rtol=1e-6, atol=1e-6)
        padded = out[row].clone()
        padded[:, begin:end] = 0
        assert not padded.any(), "padded query rows are zero"


def test_a_short_row_of_a_padded_batch_runs_dense_as_it_does_alone(monkeypatch):
    monkeypatch.setitem(crossover.MIN_LENGTH, "cpu", 200)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 1.0)
    problem = make_problem(batch=2, query_len=300)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, :150] = False
    auto = dataclasses.replace(SMALL, crossover="auto")
    out, selection = token_sparse_attention(
        *problem, auto, padding_mask=mask, return_selection=True
    )
    assert selection.ran_sparse.tolist() == [True, False]
    alone = token_sparse_attention(*(x[1:, :, 150:] for x in problem), auto)
    torch.testing.assert_close(out[1:, :, 150:], alone)


def test_queries_all_in_padding_give_zeros():
    problem = make_problem(batch=2, query_len=30, kv_len=150)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, 110:] = False
    out = token_sparse_attention(*problem, SMALL, padding_mask=mask)
    assert not out[1].any()
    assert out[0].any()


@pytest.mark.parametrize("fallback", ["zero", "window"])
def test_a_chunk_equals_its_definition(fallback):
    """Chunk queries see selected keys of the whole context; selection uses the chunk's window."""
    config = dataclasses.replace(SMALL, fallback=fallback, fallback_window=25)
    problem = make_problem(query_len=70, kv_len=180)
    out, selection = sparse_run(problem, config)
    keep = kept_mask(selection.indices, 180)[0]
    full = torch.arange(180)
    for head in range(4):
        for i in range(0, 70, 7):
            position = 110 + i
            if keep[head, position]:
                seen = full[keep[head] & (full <= position)]
            elif fallback == "window":
                seen = full[position - 24 : position + 1]
            else:
                assert not out[0, head, i].any()
                continue
            key, value = (tensor[0, head // 2, seen] for tensor in (problem.key, problem.value))
            probs = (problem.query[0, head, i] @ key.T / 4).softmax(-1)
            torch.testing.assert_close(out[0, head, i], probs @ value, rtol=1e-4, atol=1e-5)


def forced(problem, selection):
    packed = compress(*problem, selection)
    scale = problem.query.shape[-1] ** -0.5
    out = varlen_causal_attention(*packed[:5], scale=scale)
    return decompress(out, selection, problem.query.shape[2])


@given(st.integers(20, 150), st.integers(0, 60), st.integers(0, 99))
def test_a_full_selection_equals_dense_and_a_mutated_one_does_not(query_len, past, seed):
    problem = make_problem(batch=2, query_len=query_len, kv_len=query_len + past, seed=seed)
    scores = score_tokens(problem.query, problem.key, SMALL)
    selection = select_tokens(scores, SMALL, kept=1.0)
    dense = causal_attention(*problem, scale=0.25)
    if past == 0 and query_len > SMALL.window_size:
        assert selection.ran_sparse.all()
        assert (selection.lengths == query_len).all()
    torch.testing.assert_close(forced(problem, selection), dense, rtol=1e-4, atol=1e-5)

    indices = selection.indices.clone()
    indices[:, :, 0] = indices[:, :, 1]  # the first token is lost, the second counts twice
    mutated = selection._replace(indices=indices)
    assert not torch.allclose(forced(problem, mutated), dense, rtol=1e-4, atol=1e-5)


@given(st.sampled_from(VARIANTS), st.integers(0, 99))
def test_gqa_equals_repeated_keys_and_values(config, seed):
    problem = make_problem(heads=6, kv_heads=2, query_len=130, seed=seed)
    repeated = Problem(
        problem.query, *(tensor.repeat_interleave(3, dim=1) for tensor in problem[1:])
    )
    out, selection = sparse_run(problem, config)
    wide, wide_selection = sparse_run(repeated, config)
    assert torch.equal(selection.indices, wide_selection.indices)
    torch.testing.assert_close(out, wide, rtol=1e-5, atol=1e-6)


def test_dense_rules_give_dense_attention():
    for config in (
        dataclasses.replace(SMALL, drop_mass=0.0),
        dataclasses.replace(SMALL, min_tokens=5000),
        dataclasses.replace(SMALL, drop_mass=1e-12),
        dataclasses.replace(SMALL, window_size=150),
    ):
        problem = make_problem(query_len=140, kv_len=180)
        out, selection = token_sparse_attention(*problem, config, return_selection=True)
        assert not selection.ran_sparse.any()
        assert (selection.lengths == 180).all()
        assert torch.equal(out, causal_attention(*problem, scale=0.25))


def test_mixed_batches_run_some_rows_dense():
    problem = make_problem(batch=2, query_len=150)
    problem.query[0] *= 4
    problem.query[1] = 0  # uniform attention: every token has the same mass
    config = dataclasses.replace(SMALL, drop_mass=0.004)
    out, selection = token_sparse_attention(*problem, config, return_selection=True)
    assert selection.ran_sparse.tolist() == [True, False]
    assert selection.lengths[1].tolist() == [150] * 4
    for row in range(2):
        alone = Problem(*(tensor[row : row + 1] for tensor in problem))
        torch.testing.assert_close(out[row], token_sparse_attention(*alone, config)[0])


def test_dense_rows_of_a_mixed_batch_are_not_compressed(monkeypatch):
    given = []

    def spy(query, key, value, selection, *rest, **options):
        given.append(selection)
        return compress_sequences(query, key, value, selection, *rest, **options)

    monkeypatch.setattr(functional, "compress_sequences", spy)
    problem = make_problem(batch=2, query_len=150)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, 30:] = False
    token_sparse_attention(*problem, SMALL, padding_mask=mask)
    assert (given[0].lengths > 0).tolist() == [[True] * 4, [False] * 4]


def test_inputs_are_left_alone_and_views_are_accepted():
    problem = make_problem(batch=2, query_len=150)
    before = [tensor.clone() for tensor in problem]
    out = token_sparse_attention(*problem, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(problem, before))
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in problem]
    torch.testing.assert_close(token_sparse_attention(*views, SMALL), out)
    assert out.is_contiguous()


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
def test_any_strides_are_accepted(config):
    problem = make_problem(query_len=150)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in problem]
    assert all(x.stride(-1) != 1 for x in odd)
    expected = token_sparse_attention(*problem, config, return_selection=True)
    out, selection = token_sparse_attention(*odd, config, return_selection=True)
    assert torch.equal(selection.indices, expected[1].indices)
    torch.testing.assert_close(out, expected[0])


@pytest.mark.parametrize("query_len", [20, 150])
@pytest.mark.parametrize("backend", ["auto", "math"])
def test_a_compiled_call_has_the_layout_that_the_compiler_was_told(query_len, backend):
    """Too short a prompt runs dense, and dense kernels lay their output out as they like."""
    torch.compiler.reset()
    compiled = torch.compile(token_sparse_attention, fullgraph=True, backend="inductor")
    problem = make_problem(query_len=query_len)
    for layout in ((1, 2), (2, 3)):
        inputs = [x.transpose(*layout).contiguous().transpose(*layout) for x in problem]
        out = compiled(*inputs, SMALL, attention_backend=backend)
        expected = token_sparse_attention(*inputs, SMALL, attention_backend=backend)
        torch.testing.assert_close(out, expected)


def test_double_precision_stays_double_with_far_tokens():
    problem = make_problem(query_len=150, dtype=torch.float64)
    config = dataclasses.replace(
        SMALL, drop_mass=None, select_queries=False, fallback="window", fallback_window=20,
        fallback_samples=150, dense_queries=0,
    )  # fmt: skip
    out, selection = token_sparse_attention(*problem, config, return_selection=True)
    assert selection.ran_sparse.all()
    dense = causal_attention(*problem, scale=problem.query.shape[-1] ** -0.5)
    assert relative_error(out, dense) < 1e-12, "every token is seen"


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_dense_heads_are_dense_and_the_others_as_without(backend):
    """In runs over KV heads, single and not: all tokens are listed as theirs."""
    problem = make_problem(heads=8, kv_heads=2, query_len=150, kv_len=190)
    without = dataclasses.replace(VARIANTS[-1], dense_heads=(), budget="shared")
    config = dataclasses.replace(without, dense_heads=(7, 1, 2, 3, 4))
    run = functools.partial(sparse_run, problem, attention_backend=backend)
    (out, selection), (plain, others) = run(config), run(without)
    dense = causal_attention(*problem, scale=0.25, backend=backend)
    for head in range(8):
        if head in config.dense_heads:
            torch.testing.assert_close(out[:, head], dense[:, head])
            assert selection.lengths[0, head] == 190
            assert selection.indices[0, head].tolist() == list(range(190))
        else:
            assert torch.equal(out[:, head], plain[:, head])
            assert selection.lengths[0, head] == others.lengths[0, head] < 190


def test_dense_heads_leave_their_samples_to_the_others():
    """Which share them out by need where budgets are per head."""
    config = dataclasses.replace(VARIANTS[-1], dense_heads=(1, 2), fallback_samples=30)
    tokens = real_tokens(None, 1, 200, torch.device("cpu"), on_device=False)
    need = torch.tensor([0.2, 0.9, 0.9, 0.4])
    scores = (need / 180)[None, :, None].expand(1, 4, 180)
    budgets = sample_budgets(scores, config, tokens, None)[0]
    expected = [30 * (0.25 + 0.75 * share) for share in (2 / 3, 0, 0, 4 / 3)]
    torch.testing.assert_close(budgets, torch.tensor(expected, dtype=torch.float64))


def test_heads_that_a_layer_does_not_have_are_refused():
    problem = make_problem(heads=4, kv_heads=2, query_len=150)
    config = dataclasses.replace(VARIANTS[-1], dense_heads=(1, 4))
    with pytest.raises(ValueError, match=r"below the layer's 4 query heads, got \(1, 4\)"):
        token_sparse_attention(*problem, config)


def test_extreme_values():
    problem = make_problem(query_len=150, sharpness=1e4)
    assert token_sparse_attention(*problem, SMALL).isfinite().all()
    tiny = Problem(*(tensor * 1e-30 for tensor in make_problem(query_len=150)))
    assert token_sparse_attention(*tiny, SMALL).isfinite().all()


@pytest.mark.parametrize("config", [SMALL, VARIANTS[-1]], ids=name_of)
def test_nan_in_the_inputs_runs_dense(config):
    problem = make_problem(query_len=150)
    problem.query[0, 1, -3] = torch.nan
    out, selection = token_sparse_attention(*problem, config, return_selection=True)
    assert not selection.ran_sparse.any()
    assert torch.equal(out.isnan(), causal_attention(*problem, scale=0.25).isnan())


def test_the_crossover_runs_short_and_little_dropped_rows_dense(monkeypatch):
    problem = make_problem(batch=2, query_len=400)
    auto = dataclasses.replace(SMALL, crossover="auto")
    out, selection = token_sparse_attention(*problem, auto, return_selection=True)
    assert not selection.ran_sparse.any(), "400 tokens are too few"
    assert torch.equal(out, causal_attention(*problem, scale=0.25))

    monkeypatch.setitem(crossover.MIN_LENGTH, "cpu", 100)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 40.0)
    sparse, kept = sparse_run(problem, auto)
    assert torch.equal(sparse, sparse_run(problem, dataclasses.replace(auto, crossover="off"))[0])
    share = float(kept.lengths[0, 0]) / 400
    assert share**2 < 1 - 40 / 400
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 400 * (1 - share**2) + 1)
    out, selection = token_sparse_attention(*problem, auto, return_selection=True)
    assert not selection.ran_sparse[0]
    assert (selection.lengths[0] == 400).all()
    assert torch.equal(selection.budget, kept.lengths), "what the method would have kept"


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize("query_len", [190, 90])
def test_lse_is_that_of_the_keys_attended_to(config, query_len):
    problem = make_problem(batch=2, query_len=query_len, kv_len=190)
    mask = torch.ones(2, 190, dtype=torch.bool)
    mask[1, :130] = False
    result = token_sparse_attention(
        *problem, config, padding_mask=mask, return_selection=True, return_lse=True
    )
    keep = kept_mask(result.selection.indices, 190)
    first = 190 - query_len
    slot = torch.arange(190)
    causal = slot <= slot[first:, None]
    for row in range(2):
        start, end = mask[row].nonzero()[[0, -1], 0].tolist()
        scores = window_scores(
            problem.query[row, :, -config.window_size :],
            problem.key[row, :, start : end + 1],
            config.window_size,
            0.25,
        )
        far = torch.zeros(4, 190, dtype=torch.float64)
        far[:, start : end + 1] = far_counts(scores, config, end + 1 - start)
        near = slot > slot[first:, None] - config.fallback_window
        sparse = result.selection.ran_sparse[row]
        for head in range(4):
            others = torch.where(near, 1.0, far[head]) * (config.fallback == "window")
            counts = keep[row, head].double().expand_as(others)
            if sparse:
                chosen = keep[row, head, first:, None] & config.select_queries
                counts = torch.where(chosen, counts, others)
            dense = slot[first:] >= end + 1 - config.dense_queries
            counts[dense | (head in config.dense_heads)] = 1.0
            counts = counts * (causal & mask[row] & mask[row, first:, None])
            logits = problem.query[row, head] @ problem.key[row, head // 2].T / 4
            expected = (logits + counts.log()).logsumexp(-1).float()
            torch.testing.assert_close(result.lse[row, head], expected, rtol=1e-5, atol=1e-5)
    plain, lse = token_sparse_attention(*problem, config, padding_mask=mask, return_lse=True)
    assert torch.equal(plain, result.output)
    assert torch.equal(lse, result.lse)


def test_a_kept_share_replaces_the_budget():
    problem = make_problem(query_len=150)
    for share in (0.4, 1.0):
        out, selection = sparse_run(problem, SMALL, kept=share)
        assert (selection.lengths == int(share * 150)).all()
    torch.testing.assert_close(out, causal_attention(*problem, scale=0.25))


def test_a_kept_share_is_rounded_as_kernels_take_it():
    """0.7 of 205 tokens would be 144 in double precision; host and device must agree."""
    assert single_precision(0.7) < 0.7
    problem = make_problem(query_len=205)
    _, selection = sparse_run(problem, SMALL, kept=0.7)
    assert set(selection.lengths.flatten().tolist()) == {143}
    scores = score_tokens(problem.query, problem.key, SMALL)
    assert set(select_tokens(scores, SMALL, kept=0.7).lengths.flatten().tolist()) == {143}


def test_return_selection_is_always_a_pair():
    for length in (10, 150):
        problem = make_problem(query_len=length)
        result = token_sparse_attention(*problem, SMALL, return_selection=True)
        assert isinstance(result, tuple)
        assert isinstance(token_sparse_attention(*problem, SMALL), torch.Tensor)


@pytest.mark.parametrize(
    "config", [*VARIANTS, dataclasses.replace(SMALL, min_tokens=200)], ids=name_of
)
def test_lengths_alone_are_those_of_the_selection(config):
    problem = make_problem(batch=2, query_len=150)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, :120] = False
    options = {"padding_mask": mask, "return_lse": True}
    expected = token_sparse_attention(*problem, config, return_selection=True, **options)
    result = token_sparse_attention(*problem, config, return_selection="lengths", **options)
    assert torch.equal(result.output, expected.output)
    assert torch.equal(result.lse, expected.lse)
    for name in ("lengths", "budget", "ran_sparse"):
        mine, theirs = (getattr(one.selection, name) for one in (result, expected))
        assert torch.equal(mine, theirs), name
    assert result.selection.kv_len == expected.selection.kv_len
    assert result.selection.indices.shape == (2, 4, 0)
    for part in (result.selection.indices, result.selection.lengths, result.selection.budget):
        assert part.untyped_storage().nbytes() <= 2 * 4 * 8, "no view of a list of tokens"


def test_gradients_raise_only_while_they_are_recorded():
    problem = make_problem(query_len=150)
    for name in ("query", "key", "value"):
        getattr(problem, name).requires_grad_(True)
        with (
            torch.enable_grad(),
            pytest.raises(ValueError, match=f"{name} must not require a grad"),
        ):
            token_sparse_attention(*problem, SMALL)
        with torch.no_grad():
            assert not token_sparse_attention(*problem, SMALL).requires_grad
        getattr(problem, name).requires_grad_(False)
    with torch.enable_grad():
        token_sparse_attention(*problem, SMALL)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"value": torch.zeros(1, 2, 60, 8)},
            ValueError,
            r"value must have key's shape \[1, 2, 60, 16\]",
        ),
        ({"value": "v"}, TypeError, "value must be a tensor, got str"),
        (
            {"query": torch.zeros(1, 4, 61, 16)},
            ValueError,
            "query must not be longer than key's 60",
        ),
        ({"config": {}}, TypeError, "config must be a TokenSparseConfig, got dict"),
        (
            {"impl": "tritan"},
            ValueError,
            "impl must be one of auto, reference, triton; got 'tritan'",
        ),
        (
            {"attention_backend": "fa9"},
            ValueError,
            "attention_backend must be one of auto, fa4, flash",
        ),
        ({"scale": True}, TypeError, "scale must be a number or None, got True"),
        ({"head_chunk": 0}, ValueError, "head_chunk must be at least 1, got 0"),
        ({"head_chunk": 2.0}, TypeError, "head_chunk must be an int or None, got 2.0"),
        (
            {"return_selection": "length"},
            ValueError,
            "return_selection must be True, False or 'lengths', got 'length'",
        ),
        ({"kept": 1.5}, ValueError, r"kept must be in \(0, 1\], got 1.5"),
        (
            {"kept": 0.5, "config": VARIANTS[-1]},
            ValueError,
            "kept must be None where select_queries is False, got 0.5",
        ),
        ({"attention_backend": "fa4"}, ValueError, "'fa4' cannot run torch.float32.*on cpu"),
        (
            {"padding_mask": torch.ones(2, 60, dtype=torch.bool)},
            ValueError,
            "padding_mask must have",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    problem = make_problem(query_len=60)
    with pytest.raises(error, match=message):
        token_sparse_attention(**(problem._asdict() | {"config": SMALL} | change))
