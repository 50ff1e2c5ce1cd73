"""Every Triton kernel against its reference; by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from support import (
    GOLDEN_CASES,
    SAMPLING,
    SMALL,
    WITH_BOTH,
    WITH_LSE,
    Problem,
    golden_case,
    kept_mask,
    make_problem,
    with_selection,
)
from token_sparse_attention import (
    Execution,
    SparseConfig,
    TokenSelectionConfig,
    compress,
    crossover,
    decompress,
    reference,
    score_tokens,
    select_tokens,
    token_sparse_attention,
)
from token_sparse_attention.blocks import UNIT_BITS
from token_sparse_attention.impls import resolve_impl

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = {name: Execution(impl=name, attention_backend="math") for name in ("triton", "reference")}
PROBES = SMALL.observation_window
VARIANTS = [
    dataclasses.replace(SMALL, budget=budget, fallback=fallback, sliding_window=20)
    for budget in ("shared", "per_head")
    for fallback in ("zero", "window")
]
SAMPLED = [
    dataclasses.replace(SAMPLING, sliding_window=20, sink_size=sinks, num_samples=samples)
    for sinks, samples in ((3, 0), (0, 9), (2, 40))
]
SAMPLED.append(dataclasses.replace(SAMPLED[-1], num_samples=30, dense_queries=9))
SAMPLED.append(dataclasses.replace(SAMPLED[-1], dense_heads=(1,), budget="per_head"))


def problem_here(**shape):
    return make_problem(device=DEVICE, **shape)


def tolerances(config, kv_len):
    """What rounding may change; of a sampled key's weight one unit, where its score does."""
    least = getattr(config, "num_samples", 0) / (2 * kv_len)  # half of a probability is uniform
    unit = 2.0**-UNIT_BITS / least if least else 0.0
    return {"rtol": 1e-4, "atol": 1e-5 + unit}


def padding(*runs, kv_len):
    mask = torch.zeros(len(runs), kv_len, dtype=torch.bool, device=DEVICE)
    for sequence, run in enumerate(runs):
        mask[sequence, slice(*run)] = True
    return mask


def same_selection(mine, theirs, kv_len):
    assert torch.equal(mine.ran_sparse, theirs.ran_sparse)
    assert torch.equal(mine.lengths, theirs.lengths)
    assert torch.equal(mine.reasons, theirs.reasons)
    assert torch.equal(kept_mask(mine.indices, kv_len), kept_mask(theirs.indices, kv_len))
    for kept, indices in zip(mine.lengths.flatten(), mine.indices.flatten(0, 1)):
        assert (indices[:kept].diff() > 0).all()
        assert (indices[kept:] == -1).all()


@pytest.mark.parametrize(
    ("num_probes", "heads", "kv_heads", "query_len", "kv_len"),
    [
        *(
            (probes, *heads, *lengths)
            for probes in (7, 16, 50)
            for heads in ((2, 2), (6, 2), (7, 1))
            for lengths in ((257, 257), (140, 301))
        ),
        (130, 6, 2, 257, 257),
        (130, 7, 1, 140, 301),
    ],
)
def test_scores(num_probes, heads, kv_heads, query_len, kv_len):
    query, key, _ = problem_here(
        batch=2, heads=heads, kv_heads=kv_heads, query_len=query_len, kv_len=kv_len, head_dim=24
    )
    scores = score_tokens(query, key, num_probes, impl="triton")
    expected = score_tokens(query, key, num_probes, impl="reference")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision(dtype):
    query, key, _ = problem_here(query_len=200, head_dim=64, dtype=dtype)
    scores = score_tokens(query, key, PROBES, impl="triton")
    expected = score_tokens(query, key, PROBES, impl="reference")
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-7)


def test_scores_ignore_padding_and_refuse_sequences_of_few_queries():
    query, key, _ = problem_here(batch=4, query_len=90, kv_len=150)
    mask = padding((0, 150), (30, 150), (0, 111), (0, 70), kv_len=150)
    for tensor, first in ((query, 60), (key, 0)):
        tensor.masked_fill_(~mask[:, None, first:, None], torch.nan)
    scores = score_tokens(query, key, PROBES, padding_mask=mask, impl="triton")
    expected = score_tokens(query, key, PROBES, padding_mask=mask, impl="reference")
    assert expected[3].isnan().all()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7, equal_nan=True)


def test_scores_of_extreme_logits_and_views():
    query, key, _ = problem_here(query_len=130, sharpness=1e4)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    scores = score_tokens(*views, PROBES, impl="triton")
    expected = score_tokens(query, key, PROBES, impl="reference")
    assert scores.isfinite().all()
    # Logits of 1e4 and more leave few digits for what is exponentiated.
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-4)
    transposed = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key)]
    assert torch.equal(score_tokens(*transposed, PROBES, impl="triton"), scores)


@settings(max_examples=20)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 3, 4]),
    st.integers(41, 400),
    st.sampled_from(["shared", "per_head"]),
    st.floats(0.001, 0.95),
    st.sampled_from([1, 5]),
    st.integers(0, 99),
)
def test_selection(batch, heads, length, budget, drop_mass, pool_size, seed):
    config = dataclasses.replace(SMALL, budget=budget, drop_mass=drop_mass, pool_size=pool_size)
    query, key, _ = problem_here(batch=batch, heads=heads, kv_heads=1, query_len=length, seed=seed)
    scores = score_tokens(query, key, config.observation_window, impl="reference")
    assume(is_decided(scores, config))
    mine = select_tokens(scores, config, impl="triton")
    same_selection(mine, select_tokens(scores, config, impl="reference"), length)


def is_decided(scores, config):
    """Whether no cumulative mass is so near to drop_mass that the order of addition decides."""
    smoothed = torch.stack([reference.smooth(one, config.pool_size) for one in scores]).double()
    if config.budget == "shared":
        smoothed = smoothed.mean(1, keepdim=True)
    mass = (smoothed / smoothed.sum(-1, keepdim=True)).sort(-1).values.cumsum(-1)
    return bool((mass - config.drop_mass).abs().min() > 1e-6)


def test_selection_over_several_chunks():
    torch.manual_seed(1)
    scores = torch.rand(1, 2, 9001, device=DEVICE) ** 8
    scores[0, 1, 4000:4200] = scores[0, 1, 17]  # ties across a chunk's border
    config = dataclasses.replace(SMALL, drop_mass=0.4, pool_size=1)
    mine = select_tokens(scores, config, impl="triton")
    same_selection(mine, select_tokens(scores, config, impl="reference"), 9017)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.65, 0.2, 0.001])
@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_selection_of_a_kept_share(keep_ratio, budget):
    config = dataclasses.replace(SMALL, budget=budget, keep_ratio=keep_ratio)
    scores = torch.rand(2, 3, 184, device=DEVICE)
    mask = padding((0, 200), (33, 180), kv_len=200)
    for padding_mask in (None, mask):
        mine, theirs = (
            select_tokens(scores, config, padding_mask=padding_mask, impl=impl) for impl in IMPLS
        )
        same_selection(mine, theirs, 200)


def test_selection_of_ties_zeros_and_broken_sequences():
    equal = torch.full((1, 2, 500), 0.25, device=DEVICE)
    each = [equal, torch.zeros_like(equal), equal.clone(), equal.clone(), equal * 1e-30]
    each[2][0, 1, 44] = torch.nan
    each[3][0, 0, 3] = torch.inf
    scores = torch.cat(each)
    shared = dataclasses.replace(SMALL, pool_size=1)
    for config in (shared, dataclasses.replace(shared, budget="per_head", min_tokens=0)):
        mine = select_tokens(scores, config, impl="triton")
        assert mine.ran_sparse[:4].tolist() == [True, True, False, False]
        theirs = select_tokens(scores, config, impl="reference")
        # Sums of equal values differ in their last bits: one token more or less.
        assert (mine.lengths - theirs.lengths).abs().max() <= 1
        first = mine.indices[0, 0, : mine.lengths[0, 0] - 16]
        assert torch.equal(first, torch.arange(len(first), device=DEVICE))


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_indices(case):
    tensors, config, selected = golden_case(case)
    scores = tensors["window_scores"].to(DEVICE)
    selection = select_tokens(scores, config, impl="triton")
    if selected is None:
        assert not selection.ran_sparse.any()
        return
    assert (selection.lengths == selected).all()
    assert torch.equal(selection.indices[..., :selected].cpu(), tensors["indices"])


@pytest.mark.parametrize(("query_len", "kv_len"), [(140, 140), (50, 140)])
def test_compress_and_decompress(query_len, kv_len):
    problem = problem_here(batch=2, heads=6, kv_heads=2, query_len=query_len, kv_len=kv_len)
    config = dataclasses.replace(SMALL, budget="per_head")
    scores = score_tokens(problem.query, problem.key, PROBES, impl="reference")
    selection = select_tokens(scores, config, impl="reference")
    mine = compress(*problem, selection, impl="triton")
    theirs = compress(*problem, selection, impl="reference")
    assert torch.equal(mine.cu_seqlens_q, theirs.cu_seqlens_q)
    assert torch.equal(mine.cu_seqlens_k, theirs.cu_seqlens_k)
    for packed, expected in zip(mine[:3], theirs[:3]):
        assert torch.equal(packed[: len(expected)], expected)
    assert len(mine.query) == 12 * mine.max_seqlen_q
    fallback = torch.randn_like(problem.query)
    for rest in (None, fallback):
        full = decompress(mine.query, selection, query_len, rest, impl="triton")
        expected = decompress(theirs.query, selection, query_len, rest, impl="reference")
        assert torch.equal(full, expected)


def name_of(config):
    if isinstance(config, TokenSelectionConfig):
        return f"{config.budget}-{config.fallback}"
    return f"{config.budget}-{config.sink_size}-{config.num_samples}-{config.dense_queries}"


@pytest.mark.parametrize(
    ("config", "query_len", "head_chunk"),
    [
        *itertools.product(VARIANTS, [200], [None]),
        *itertools.product(VARIANTS, [120], [5]),
        *itertools.product(SAMPLED, [120], [None]),
    ],
    ids=lambda value: name_of(value) if isinstance(value, SparseConfig) else str(value),
)
def test_operator(config, query_len, head_chunk):
    problem = problem_here(batch=3, heads=4, query_len=query_len, kv_len=200, head_dim=24)
    mask = padding((0, 200), (33, 200), (165, 200), kv_len=200)
    for padding_mask in (None, mask):
        mine, theirs = (
            token_sparse_attention(
                *problem,
                config,
                padding_mask=padding_mask,
                execution=dataclasses.replace(execution, head_chunk=head_chunk),
                return_aux=WITH_BOTH,
            )
            for execution in IMPLS.values()
        )
        same_selection(mine.selection, theirs.selection, 200)
        assert theirs.selection.ran_sparse[:2].all()
        torch.testing.assert_close(mine.output, theirs.output, **tolerances(config, 200))
        torch.testing.assert_close(mine.lse, theirs.lse, **tolerances(config, 200))


@pytest.mark.parametrize("share_limit", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("query_len", [300, 120])
def test_crossover(monkeypatch, share_limit, query_len):
    kind = torch.device(DEVICE).type
    eff = crossover.effective_length(query_len, 300)
    monkeypatch.setitem(crossover.MIN_LENGTH, kind, 50)
    monkeypatch.setitem(crossover.HOST_WORK, kind, 0.0)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, kind, eff * (1 - share_limit**2))
    problem = problem_here(batch=3, query_len=query_len, kv_len=300)
    problem.query[1] *= 5  # keeps few tokens
    problem.query[2] = 0  # keeps nearly all
    config = dataclasses.replace(SMALL, crossover="auto", drop_mass=0.2)
    mine, theirs = (
        with_selection(problem, config, execution=execution) for execution in IMPLS.values()
    )
    same_selection(mine[1], theirs[1], 300)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    if share_limit == 0.6:
        assert mine[1].ran_sparse.tolist() == [False, True, False]


@pytest.mark.parametrize("config", [VARIANTS[0], SAMPLED[-1]], ids=name_of)
def test_any_strides_are_accepted(config):
    problem = problem_here(query_len=97)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in problem]
    out, expected = (
        token_sparse_attention(*tensors, config, execution=IMPLS["triton"])
        for tensors in (odd, problem)
    )
    torch.testing.assert_close(out, expected)


def test_short_sequences_of_a_batch_run_dense(monkeypatch):
    kind = torch.device(DEVICE).type
    monkeypatch.setitem(crossover.MIN_LENGTH, kind, 200)
    monkeypatch.setitem(crossover.HOST_WORK, kind, 0.0)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, kind, 1.0)
    problem = problem_here(batch=2, query_len=300)
    auto = dataclasses.replace(SMALL, crossover="auto")
    mask = padding((0, 300), (150, 300), kv_len=300)
    _, selection = with_selection(problem, auto, padding_mask=mask, execution=IMPLS["triton"])
    assert selection.ran_sparse.tolist() == [True, False]


def test_a_mask_that_is_not_one_run_gives_nan_in_its_sequence():
    problem = problem_here(batch=2, query_len=200)
    mask = padding((0, 200), (0, 200), kv_len=200)
    mask[1, 50] = False
    options = {"padding_mask": mask, "execution": IMPLS["triton"]}
    result = token_sparse_attention(*problem, SMALL, return_aux=WITH_LSE, **options)
    out, lse = result.output, result.lse
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    dense = dataclasses.replace(SMALL, drop_mass=0.0)
    out = token_sparse_attention(*problem, dense, **options)
    assert out.isnan().flatten(1).all(-1).tolist() == [False, True]
    with pytest.raises(ValueError, match="one contiguous run"):
        token_sparse_attention(*problem, SMALL, padding_mask=mask, execution=IMPLS["reference"])


def test_nan_in_the_inputs_runs_dense():
    problem = problem_here(batch=2, query_len=150)
    problem.query[0, 1, -3] = torch.nan
    out, selection = with_selection(problem, SMALL, execution=IMPLS["triton"])
    assert selection.ran_sparse.tolist() == [False, True]
    assert out[0, 1, -3].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_probe_that_is_not_finite_makes_the_block_that_it_scores_nan(value, sinks):
    config = dataclasses.replace(SAMPLING, sink_size=sinks)
    problem = problem_here(query_len=150)
    problem.query[0, 1, 4 * 16 - 1] = value  # the last probe of block 3
    broken = torch.zeros(1, 4, 150, dtype=torch.bool, device=DEVICE)
    broken[0, 1, 4 * 16 - 1 : 5 * 16] = True
    for execution in IMPLS.values():
        out, _, lse = token_sparse_attention(
            *problem, config, execution=execution, return_aux=WITH_LSE
        )
        assert torch.equal(out.isnan(), broken[..., None].expand_as(out))
        assert lse[~broken].isfinite().all()


def test_impl_choices(monkeypatch):
    tensor = torch.zeros(1, device=DEVICE)
    assert resolve_impl("reference", tensor) == "reference"
    assert resolve_impl("auto", tensor.double()) == "reference"
    assert resolve_impl("auto", tensor, 512) == "reference"
    assert resolve_impl("auto", tensor) == ("triton" if DEVICE == "cuda" else "reference")
    with pytest.raises(ValueError, match=r"impl 'triton' takes.*got torch.float64"):
        resolve_impl("triton", tensor.double())
    with pytest.raises(ValueError, match=r"got head size 512; choose 'auto'"):
        resolve_impl("triton", tensor, 512)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="got tensors on cpu"):
        resolve_impl("triton", torch.zeros(1))


def test_reference_agrees_on_defaults():
    """The default window, pooling and minimum, which the small settings above do not have."""
    config = TokenSelectionConfig(drop_mass=0.3, min_tokens=64)
    problem = Problem(*(x[:, :2] for x in problem_here(query_len=260, head_dim=16)))
    mine, theirs = (
        with_selection(problem, config, execution=execution) for execution in IMPLS.values()
    )
    same_selection(mine[1], theirs[1], 260)
    assert mine[1].ran_sparse.all()
    scores = score_tokens(problem.query, problem.key, config.observation_window)
    keep = reference.keep_tokens(scores[0], config)
    assert torch.equal(kept_mask(mine[1].indices, 260)[0], keep)
