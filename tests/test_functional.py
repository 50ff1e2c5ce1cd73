"""The whole operator: against the float64 oracle, its definition and its properties."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from support import (
    SAMPLING,
    SMALL,
    WITH_BOTH,
    WITH_LSE,
    WITH_SELECTION,
    Problem,
    causal_attention,
    counts_behind,
    kept_mask,
    make_problem,
    oracle,
    relative_error,
    with_selection,
)
from token_sparse_attention import (
    AuxRequest,
    DenseReason,
    Execution,
    KVSamplingConfig,
    TokenSelectionConfig,
    compress,
    crossover,
    decompress,
    score_tokens,
    select_tokens,
    token_sparse_attention,
)
from token_sparse_attention.attention.backend import PackedHeads
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.attention.sdpa import SDPABackend
from token_sparse_attention.compression import compress_sequences
from token_sparse_attention.config import single_precision
from token_sparse_attention.gate import reason_of
from token_sparse_attention.methods import selection as selection_method

SELECTED = [
    dataclasses.replace(SMALL, budget=budget, **others)
    for budget in ("shared", "per_head")
    for others in (
        {"fallback": "zero"},
        {"fallback": "window", "sliding_window": 20},
        {"fallback": "window", "sliding_window": 7},
        {"fallback": "zero", "dense_queries": 8},
        {"fallback": "zero", "dense_heads": (0,)},
        {"fallback": "window", "sliding_window": 20, "dense_heads": (0,), "dense_queries": 21},
    )
]
SAMPLED = [
    dataclasses.replace(SAMPLING, **others)
    for others in (
        {"num_samples": 0},
        {"sliding_window": 20, "sink_size": 5, "num_samples": 0},
        {},
        {"budget": "per_head"},
        {"sink_size": 2, "num_samples": 180},  # more than some sequences have keys for
        {"sink_size": 2, "num_samples": 11, "dense_queries": 21},
        {"sliding_window": 37, "num_samples": 64, "num_probes": 2},
        {"dense_heads": (0,)},
        {"dense_heads": (0,), "budget": "per_head", "dense_queries": 21},
    )
]
VARIANTS = SELECTED + SAMPLED


def name_of(config):
    changed = dataclasses.asdict(config)
    plain = dataclasses.asdict(SMALL if isinstance(config, TokenSelectionConfig) else SAMPLING)
    return "-".join(
        [config.method, *(f"{k}={v}" for k, v in changed.items() if v != plain[k])]
    ).replace(" ", "")


def samples(config):
    return isinstance(config, KVSamplingConfig) and config.num_samples > 0


def sparse_run(problem, config, **kwargs):
    out, selection = with_selection(problem, config, **kwargs)
    assert selection.ran_sparse.all(), "the test must exercise the sparse path"
    return out, selection


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 2)])
@pytest.mark.parametrize(("query_len", "kv_len"), [(63, 63), (257, 257), (40, 111), (24, 190)])
def test_operator_equals_the_oracle(config, heads, kv_heads, query_len, kv_len):
    problem = make_problem(heads=heads, kv_heads=kv_heads, query_len=query_len, kv_len=kv_len)
    out, selection = sparse_run(problem, config)
    expected, keep = oracle(problem, config)
    assert torch.equal(kept_mask(selection.indices, kv_len)[0], keep)
    assert relative_error(out[0], expected) < (1e-5 if samples(config) else 1e-6)


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
def test_the_default_dtype_changes_nothing(config, default):
    check_default_dtype(config, default, "reference", 300)


@pytest.mark.parametrize("config", [VARIANTS[1], SAMPLED[3]], ids=name_of)
def test_the_default_dtype_changes_nothing_in_kernels(config):
    pytest.importorskip("triton")
    check_default_dtype(config, torch.float16, "triton", 90)


def check_default_dtype(config, default, impl, length):
    problem = make_problem(batch=2, query_len=length)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :20] = False

    def run():
        return token_sparse_attention(
            *problem, config, padding_mask=mask, execution=Execution(impl), return_aux=WITH_BOTH
        )

    expected = run()
    assert expected.selection.ran_sparse.all()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.lse, expected.lse)
    assert found.output.dtype == found.lse.dtype == torch.float32
    for mine, theirs in zip(found.selection, expected.selection):
        both_tensors = isinstance(mine, torch.Tensor)
        assert torch.equal(mine, theirs) if both_tensors else mine == theirs


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_last_queries_attended_apart_change_nothing(monkeypatch, finite, padded):
    config = dataclasses.replace(VARIANTS[-1], dense_queries=21, dense_heads=())
    problem = make_problem(batch=2, query_len=190)
    if not finite:
        problem.query[0, 0, 63] = torch.nan  # a probe
    mask = torch.ones(2, 190, dtype=torch.bool) if padded else None
    if mask is not None:
        mask[0, :20] = False
    run = functools.partial(
        token_sparse_attention, *problem, config, padding_mask=mask, return_aux=WITH_LSE
    )
    together, apart = run(), []

    def attend_last(backend, problem, count, into):
        if problem.tokens.padded:
            return False
        apart.append(count)
        query, last = problem.query[:, :, -count:], slice(-count, None)
        one = backend.attend(query, problem.key, problem.value, scale=problem.scale, want_lse=True)
        into.out[:, :, last], into.lse[:, :, last] = one
        return True

    monkeypatch.setattr(SDPABackend, "attend_last", attend_last)
    again = run()
    torch.testing.assert_close(again.output, together.output, equal_nan=True)
    torch.testing.assert_close(again.lse, together.lse, equal_nan=True)
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


@example(SAMPLED[2], 134, 1, (2, 1), 57)  # samples next to each other, by scores' last digits
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
    out, selection = with_selection(problem, config)
    expected, keep = oracle(problem, config)
    assert selection.ran_sparse.tolist() == [keep is not None]
    assert relative_error(out[0], expected) < (1e-5 if samples(config) else 2e-6)


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize("query_len", [200, 120])
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(config, query_len):
    kv_len = 200
    problem = make_problem(batch=4, query_len=query_len, kv_len=kv_len)
    mask = torch.ones(4, kv_len, dtype=torch.bool)
    mask[1, :33] = False
    mask[2, 171:] = False
    short = 35 if isinstance(config, TokenSelectionConfig) else 15
    mask[3, : kv_len - short] = False  # too short to run sparse
    for tensor, first in zip(problem, (kv_len - query_len, 0, 0)):
        tensor.masked_fill_(~mask[:, None, first:, None], torch.nan)
    out, selection = with_selection(problem, config, padding_mask=mask)
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
        torch.testing.assert_close(out[row, :, begin:end], expected, rtol=1e-5, atol=1e-5)
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
    out, selection = with_selection(problem, auto, padding_mask=mask)
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
    config = dataclasses.replace(SMALL, fallback=fallback, sliding_window=25)
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
    backend = resolve_backend("auto", problem.query, problem.key)
    heads = PackedHeads(range(packed.cu_seqlens_q.numel() - 1), problem.query.shape[1])
    out = backend.attend_packed(packed, heads, scale=scale).out
    return decompress(out, selection, problem.query.shape[2])


@given(st.integers(20, 150), st.integers(0, 60), st.integers(0, 99))
def test_a_full_selection_equals_dense_and_a_mutated_one_does_not(query_len, past, seed):
    problem = make_problem(batch=2, query_len=query_len, kv_len=query_len + past, seed=seed)
    scores = score_tokens(problem.query, problem.key, SMALL.observation_window)
    selection = select_tokens(scores, dataclasses.replace(SMALL, keep_ratio=1.0))
    dense = causal_attention(*problem, scale=0.25)
    if past == 0 and query_len > SMALL.observation_window:
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
        dataclasses.replace(SMALL, observation_window=150),
    ):
        problem = make_problem(query_len=140, kv_len=180)
        out, selection = with_selection(problem, config)
        assert not selection.ran_sparse.any()
        assert (selection.lengths == 180).all()
        assert torch.equal(out, causal_attention(*problem, scale=0.25))


def test_mixed_batches_run_some_rows_dense():
    problem = make_problem(batch=2, query_len=150)
    problem.query[0] *= 4
    problem.query[1] = 0  # uniform attention: every token has the same mass
    config = dataclasses.replace(SMALL, drop_mass=0.004)
    out, selection = with_selection(problem, config)
    assert selection.ran_sparse.tolist() == [True, False]
    assert selection.lengths[1].tolist() == [150] * 4
    for row in range(2):
        alone = Problem(*(tensor[row : row + 1] for tensor in problem))
        torch.testing.assert_close(out[row], token_sparse_attention(*alone, config)[0])


def test_dense_rows_of_a_mixed_batch_are_not_compressed(monkeypatch):
    given = []

    def spy(tensors, selection, *rest, **options):
        given.append(selection)
        return compress_sequences(tensors, selection, *rest, **options)

    monkeypatch.setattr(selection_method, "compress_sequences", spy)
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
    expected = with_selection(problem, config)
    out, selection = with_selection(odd, config)
    assert torch.equal(selection.indices, expected[1].indices)
    torch.testing.assert_close(out, expected[0])


@pytest.mark.parametrize("query_len", [20, 150])
@pytest.mark.parametrize("backend", ["auto", "math"])
def test_a_compiled_call_has_the_layout_that_the_compiler_was_told(query_len, backend):
    """Too short a prompt runs dense, and dense kernels lay their output out as they like."""
    torch.compiler.reset()
    compiled = torch.compile(token_sparse_attention, fullgraph=True, backend="inductor")
    problem = make_problem(query_len=query_len)
    execution = Execution(attention_backend=backend)
    for layout in ((1, 2), (2, 3)):
        inputs = [x.transpose(*layout).contiguous().transpose(*layout) for x in problem]
        out = compiled(*inputs, SMALL, execution=execution)
        expected = token_sparse_attention(*inputs, SMALL, execution=execution)
        torch.testing.assert_close(out, expected)


def test_double_precision_stays_double_with_samples():
    problem = make_problem(query_len=150, dtype=torch.float64)
    config = dataclasses.replace(SAMPLING, sliding_window=20, num_samples=600)
    out, selection = with_selection(problem, config)
    assert selection.ran_sparse.all()
    dense = causal_attention(*problem, scale=problem.query.shape[-1] ** -0.5)
    assert relative_error(out, dense) < 1e-12, "every token is seen"


@pytest.mark.parametrize(
    "without",
    [
        dataclasses.replace(SAMPLING, dense_queries=21),
        SMALL,
        dataclasses.replace(SMALL, budget="per_head", fallback="window", sliding_window=9),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_dense_heads_are_dense_and_the_others_as_without(backend, without):
    """In runs over KV heads, single and not: all tokens are listed as theirs."""
    problem = make_problem(heads=8, kv_heads=2, query_len=150, kv_len=190)
    config = dataclasses.replace(without, dense_heads=(7, 1, 2, 3, 4))
    run = functools.partial(sparse_run, problem, execution=Execution(attention_backend=backend))
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


def test_nan_in_the_scores_makes_their_block_nan():
    """No text before changes: not the output of earlier queries, and not that of later blocks."""
    problem = make_problem(query_len=150)
    expected = token_sparse_attention(*problem, SAMPLING)
    problem.query[0, 1, 63] = torch.nan  # a probe of block 4
    out, selection = with_selection(problem, SAMPLING)
    assert selection.ran_sparse.all()
    hidden = torch.zeros(4, 150, dtype=torch.bool)
    hidden[1, 63:80] = True
    assert torch.equal(out[0].isnan().any(-1), hidden)
    assert torch.equal(out[0][~hidden], expected[0][~hidden])


def test_nan_in_the_inputs_runs_dense():
    config, problem = SMALL, make_problem(query_len=150)
    problem.query[0, 1, -3] = torch.nan
    out, selection = with_selection(problem, config)
    assert not selection.ran_sparse.any()
    assert torch.equal(out.isnan(), causal_attention(*problem, scale=0.25).isnan())


def test_the_crossover_runs_short_and_little_dropped_rows_dense(monkeypatch):
    problem = make_problem(batch=2, query_len=400)
    auto = dataclasses.replace(SMALL, crossover="auto")
    out, selection = with_selection(problem, auto)
    assert not selection.ran_sparse.any(), "400 tokens are too few"
    assert torch.equal(out, causal_attention(*problem, scale=0.25))

    monkeypatch.setitem(crossover.MIN_LENGTH, "cpu", 100)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 40.0)
    sparse, kept = sparse_run(problem, auto)
    assert torch.equal(sparse, sparse_run(problem, dataclasses.replace(auto, crossover="off"))[0])
    share = float(kept.lengths[0, 0]) / 400
    assert share**2 < 1 - 40 / 400
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 400 * (1 - share**2) + 1)
    out, selection = with_selection(problem, auto)
    assert not selection.ran_sparse[0]
    assert (selection.lengths[0] == 400).all()
    assert reason_of(int(selection.reasons[0])) is DenseReason.CROSSOVER_KEPT


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
@pytest.mark.parametrize("query_len", [190, 90])
def test_lse_is_that_of_the_keys_attended_to(config, query_len):
    problem = make_problem(batch=2, query_len=query_len, kv_len=190)
    mask = torch.ones(2, 190, dtype=torch.bool)
    mask[1, :130] = False
    result = token_sparse_attention(*problem, config, padding_mask=mask, return_aux=WITH_BOTH)
    keep = kept_mask(result.selection.indices, 190)
    first = 190 - query_len
    slot = torch.arange(190)
    causal = slot <= slot[first:, None]
    sampling = isinstance(config, KVSamplingConfig)
    near = slot > slot[first:, None] - config.sliding_window
    for number in range(2):
        start, end = mask[number].nonzero()[[0, -1], 0].tolist()
        behind = torch.zeros(4, query_len, 190, dtype=torch.float64)
        if sampling:
            alone = Problem(
                problem.query[number : number + 1, :, max(start - first, 0) :],
                *(tensor[number : number + 1, :, start:] for tensor in problem[1:]),
            )
            behind[:, max(start - first, 0) :, start:] = counts_behind(alone, config)
        sparse = result.selection.ran_sparse[number]
        for head in range(4):
            others = torch.where(near, 1.0, behind[head])
            others = others * (sampling or config.fallback == "window")
            counts = keep[number, head].double().expand_as(others)
            if sparse:
                chosen = keep[number, head, first:, None] & (not sampling)
                counts = torch.where(chosen, counts, others)
            dense = slot[first:] >= end + 1 - config.dense_queries
            counts[dense | (head in config.dense_heads)] = 1.0
            counts = counts * (causal & mask[number] & mask[number, first:, None])
            logits = problem.query[number, head] @ problem.key[number, head // 2].T / 4
            expected = (logits + counts.log()).logsumexp(-1).float()
            torch.testing.assert_close(result.lse[number, head], expected, rtol=1e-5, atol=1e-5)
    alone = token_sparse_attention(*problem, config, padding_mask=mask, return_aux=WITH_LSE)
    assert torch.equal(alone.output, result.output)
    assert torch.equal(alone.lse, result.lse)
    assert alone.selection is None


def test_a_kept_share_replaces_the_budget():
    problem = make_problem(query_len=150)
    for share in (0.4, 1.0):
        out, selection = sparse_run(problem, dataclasses.replace(SMALL, keep_ratio=share))
        assert (selection.lengths == int(share * 150)).all()
    torch.testing.assert_close(out, causal_attention(*problem, scale=0.25))


def test_a_kept_share_is_rounded_as_kernels_take_it():
    """0.7 of 205 tokens would be 144 in double precision; host and device must agree."""
    assert single_precision(0.7) < 0.7
    problem = make_problem(query_len=205)
    config = dataclasses.replace(SMALL, keep_ratio=0.7)
    _, selection = sparse_run(problem, config)
    assert set(selection.lengths.flatten().tolist()) == {143}
    scores = score_tokens(problem.query, problem.key, SMALL.observation_window)
    assert set(select_tokens(scores, config).lengths.flatten().tolist()) == {143}


def test_what_was_asked_for_is_returned():
    for length in (10, 150):
        problem = make_problem(query_len=length)
        for aux in (AuxRequest(), WITH_SELECTION, WITH_LSE, WITH_BOTH):
            result = token_sparse_attention(*problem, SMALL, return_aux=aux)
            assert isinstance(result, tuple)
            assert (result.selection is not None) == aux.selection
            assert (result.lse is not None) == aux.lse
        assert isinstance(token_sparse_attention(*problem, SMALL), torch.Tensor)


@pytest.mark.parametrize(
    "config", [*VARIANTS, dataclasses.replace(SMALL, min_tokens=200)], ids=name_of
)
def test_lengths_alone_are_those_of_the_selection(config):
    problem = make_problem(batch=2, query_len=150)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, :120] = False
    expected = token_sparse_attention(*problem, config, padding_mask=mask, return_aux=WITH_BOTH)
    result = token_sparse_attention(
        *problem,
        config,
        padding_mask=mask,
        return_aux=AuxRequest(selection=True, indices=False, lse=True),
    )
    assert torch.equal(result.output, expected.output)
    assert torch.equal(result.lse, expected.lse)
    for name in ("lengths", "reasons", "ran_sparse"):
        mine, theirs = (getattr(one.selection, name) for one in (result, expected))
        assert torch.equal(mine, theirs), name
    assert result.selection.kv_len == expected.selection.kv_len
    assert result.selection.indices.shape == (2, 4, 0)
    for part in (result.selection.indices, result.selection.lengths, result.selection.reasons):
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
        ({"config": {}}, TypeError, "config must be a SparseConfig, got dict"),
        ({"scale": True}, TypeError, "scale must be a number or None, got True"),
        ({"execution": "auto"}, TypeError, "execution must be an Execution, got str"),
        ({"return_aux": True}, TypeError, "return_aux must be an AuxRequest or None, got bool"),
        (
            {"execution": Execution(attention_backend="fa4")},
            ValueError,
            "'fa4' cannot run torch.float32.*on cpu",
        ),
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


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
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
        ({"head_chunk": 0}, ValueError, "head_chunk must be at least 1, got 0"),
        ({"head_chunk": 2.0}, TypeError, "head_chunk must be an int, got 2.0"),
        ({"tp_group": 2}, TypeError, "tp_group must be a torch.distributed.ProcessGroup"),
    ],
)
def test_bad_executions_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        Execution(**fields)
