"""Every Triton kernel against its reference; by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import (
    GOLDEN_CASES,
    SAMPLING,
    SMALL,
    Problem,
    golden_case,
    kept_mask,
    make_problem,
)
from token_sparse_attention import (
    AuxRequest,
    Execution,
    TokenSelectionConfig,
    compress,
    decompress,
    reference,
    score_tokens,
    select_tokens,
    token_sparse_attention,
)
from token_sparse_attention.impls import resolve_impl

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELECTED = [
    dataclasses.replace(SMALL, budget=budget, fallback=fallback, sliding_window=20)
    for budget in ("shared", "per_head")
    for fallback in ("zero", "window")
]
SAMPLED = [
    dataclasses.replace(
        SAMPLING, sliding_window=20, sink_size=sinks, num_samples=samples, dense_queries=9
    )
    for sinks, samples in ((3, 0), (0, 30), (2, 30))
]
SAMPLED.append(dataclasses.replace(SAMPLED[-1], dense_heads=(1,), budget="per_head"))
PROBES = SMALL.observation_window
SELECTION = AuxRequest(selection=True)
BOTH = AuxRequest(selection=True, lse=True)


def problem_here(**shape):
    return make_problem(device=DEVICE, **shape)


def padding(*runs, kv_len):
    mask = torch.zeros(len(runs), kv_len, dtype=torch.bool, device=DEVICE)
    for row, run in enumerate(runs):
        mask[row, slice(*run)] = True
    return mask


def same_selection(mine, theirs, kv_len):
    assert torch.equal(mine.ran_sparse, theirs.ran_sparse)
    assert torch.equal(mine.lengths, theirs.lengths)
    assert torch.equal(mine.reasons, theirs.reasons)
    assert torch.equal(kept_mask(mine.indices, kv_len), kept_mask(theirs.indices, kv_len))
    for kept, indices in zip(mine.lengths.flatten(), mine.indices.flatten(0, 1)):
        assert (indices[:kept].diff() > 0).all()
        assert (indices[kept:] == -1).all()


@pytest.mark.parametrize("num_probes", [7, 16, 50, 130])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize(("query_len", "kv_len"), [(257, 257), (140, 301)])
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


def test_scores_ignore_padding_and_refuse_rows_without_a_window():
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
    mine = select_tokens(scores, config, impl="triton")
    same_selection(mine, select_tokens(scores, config, impl="reference"), length)


def test_selection_over_several_chunks():
    torch.manual_seed(1)
    scores = torch.rand(2, 3, 9001, device=DEVICE) ** 8
    scores[0, 1, 4000:4200] = scores[0, 1, 17]  # ties across a chunk's border
    config = dataclasses.replace(SMALL, drop_mass=0.4, pool_size=1)
    mine = select_tokens(scores, config, impl="triton")
    same_selection(mine, select_tokens(scores, config, impl="reference"), 9017)


@pytest.mark.parametrize("kept", [1.0, 0.65, 0.2, 0.001])
@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_selection_of_a_kept_share(kept, budget):
    config = dataclasses.replace(SMALL, budget=budget, keep_ratio=kept)
    scores = torch.rand(2, 3, 184, device=DEVICE)
    mask = padding((0, 200), (33, 180), kv_len=200)
    for padding_mask in (None, mask):
        arguments = {"padding_mask": padding_mask}
        mine = select_tokens(scores, config, impl="triton", **arguments)
        same_selection(mine, select_tokens(scores, config, impl="reference", **arguments), 200)


def test_selection_of_ties_zeros_and_broken_rows():
    equal = torch.full((1, 2, 500), 0.25, device=DEVICE)
    rows = [equal, torch.zeros_like(equal), equal.clone(), equal.clone(), equal * 1e-30]
    rows[2][0, 1, 44] = torch.nan
    rows[3][0, 0, 3] = torch.inf
    scores = torch.cat(rows)
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
    return f"{config.budget}-{config.sink_size}-{config.num_samples}"


@pytest.mark.parametrize(
    ("config", "query_len", "head_chunk"),
    [
        *itertools.product(SELECTED, [200, 120], [None, 5]),
        *itertools.product(SAMPLED, [120], [None]),
    ],
    ids=lambda value: name_of(value) if hasattr(value, "method") else str(value),
)
def test_operator(config, query_len, head_chunk):
    problem = problem_here(batch=3, heads=4, query_len=query_len, kv_len=200, head_dim=24)
    mask = padding((0, 200), (33, 200), (165, 200), kv_len=200)
    for padding_mask in (None, mask):
        results = [
            token_sparse_attention(
                *problem,
                config,
                padding_mask=padding_mask,
                execution=Execution(impl, "math", head_chunk=head_chunk),
                return_aux=BOTH,
            )
            for impl in ("triton", "reference")
        ]
        mine, theirs = results
        same_selection(mine.selection, theirs.selection, 200)
        assert theirs.selection.ran_sparse[:2].all()
        torch.testing.assert_close(mine.output, theirs.output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.lse, theirs.lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampled", [0, 1, 70])
@pytest.mark.parametrize("window", [1, 40, 500])
@pytest.mark.parametrize(("query_len", "kv_len", "head_dim"), [(130, 130, 24), (75, 301, 64)])
@pytest.mark.parametrize("counted", [False, True])
def test_windows_and_sampled_keys(counted, sampled, window, query_len, kv_len, head_dim):
    """The kernel against a literal mask; what lies outside a row is NaN and does no harm."""
    from token_sparse_attention.kernels.sampled_attention import Tiles, add_sampled_keys

    problem = problem_here(
        batch=3, heads=6, kv_heads=2, query_len=query_len, kv_len=kv_len, head_dim=head_dim
    )
    runs = ((0, kv_len), (kv_len // 3, kv_len), (0, kv_len - 60))
    real = padding(*runs, kv_len=kv_len)
    first = kv_len - query_len
    problem.query.masked_fill_(~real[:, None, first:, None], torch.nan)
    for tensor in problem[1:]:
        tensor.masked_fill_(~real[:, None, :, None], torch.nan)
    generator = torch.Generator(DEVICE).manual_seed(1)
    order = torch.rand(3, 6, kv_len, generator=generator, device=DEVICE) - 2 * ~real[:, None]
    best, slots = order.topk(sampled)
    slots = torch.where(best >= 0, slots, kv_len).sort(-1).values
    slots[:, :, sampled - sampled // 5 :] = kv_len
    position = torch.arange(kv_len, device=DEVICE)
    causal = (position <= position[first:, None]) & real[:, None, None]
    near = (causal & (position > position[first:, None] - window)).expand(-1, 6, -1, -1)
    both = near | (causal & (position == slots[..., None]).any(2)[:, :, None])
    counts = None
    extra = torch.zeros(3, 6, kv_len + 1, device=DEVICE)
    if counted:
        counts = torch.randint(1, 40, slots.shape, generator=generator, device=DEVICE).float()
        extra.scatter_(2, slots, counts.log())
    extra = extra[:, :, None, :kv_len] * ~near
    out, lse = literal_attention(problem, near)
    expected, expected_lse = literal_attention(problem, both, extra)
    unwritten = ~real[:, None, first:].expand(-1, 6, -1)
    for wrong, right in ((out, expected), (lse, expected_lse)):
        wrong[unwritten], right[unwritten] = 7.0, 7.0
    # Contiguous over the tokens of a head or over the heads of a token, as models have it.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    before, before_lse = out.clone(), lse.clone()
    bounds = torch.tensor(runs, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([True, True, True], device=DEVICE)
    options = {"window": window, "scale": 0.3, "tiles": Tiles(32, 16, 4, 2), "weights": counts}
    add_sampled_keys(*problem, slots.int(), bounds, rows, out, lse, **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
    nothing = sampled == 0 or window == 500
    assert torch.equal(out, before) == nothing, "the sampled keys must matter"
    rows = torch.tensor([False, True, False], device=DEVICE)
    add_sampled_keys(*problem, slots.int(), bounds, rows, before, before_lse, **options)
    assert torch.equal(before[1], out[1])
    assert torch.equal(before[0], out[0]) == nothing


def literal_attention(problem, seen, extra=0.0):
    """Attention and log-sum-exp under a mask ``[B, H, S_q, S_kv]``, in float64.

    `extra` is added to the logits.
    """
    query, key, value = (tensor.double().nan_to_num() for tensor in problem)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = (query @ key.transpose(2, 3) * 0.3 + extra).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ value).float(), logits.logsumexp(-1).float()


@pytest.mark.parametrize("share_limit", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("query_len", [300, 120])
def test_crossover(monkeypatch, share_limit, query_len):
    from token_sparse_attention import crossover

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
        token_sparse_attention(
            *problem, config, execution=Execution(impl, "math"), return_aux=SELECTION
        )
        for impl in ("triton", "reference")
    )
    same_selection(mine[1], theirs[1], 300)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
    if share_limit == 0.6:
        assert mine[1].ran_sparse.tolist() == [False, True, False]


@pytest.mark.parametrize("config", [SELECTED[0], SAMPLED[-1]])
def test_any_strides_are_accepted(config):
    problem = problem_here(query_len=97)
    odd = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in problem]
    options = {"execution": Execution("triton", "math")}
    expected = token_sparse_attention(*problem, config, **options)
    torch.testing.assert_close(token_sparse_attention(*odd, config, **options), expected)


def test_short_rows_of_a_batch_run_dense(monkeypatch):
    from token_sparse_attention import crossover

    kind = torch.device(DEVICE).type
    monkeypatch.setitem(crossover.MIN_LENGTH, kind, 200)
    monkeypatch.setitem(crossover.HOST_WORK, kind, 0.0)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, kind, 1.0)
    problem = problem_here(batch=2, query_len=300)
    auto = dataclasses.replace(SMALL, crossover="auto")
    mask = padding((0, 300), (150, 300), kv_len=300)
    _, selection, _ = token_sparse_attention(
        *problem, auto, padding_mask=mask, execution=Execution("triton", "math"),
        return_aux=SELECTION,
    )  # fmt: skip
    assert selection.ran_sparse.tolist() == [True, False]


def test_a_mask_that_is_not_one_run_gives_nan_in_its_rows():
    problem = problem_here(batch=2, query_len=200)
    mask = padding((0, 200), (0, 200), kv_len=200)
    mask[1, 50] = False
    out, _, lse = token_sparse_attention(
        *problem,
        SMALL,
        padding_mask=mask,
        execution=Execution("triton", "math"),
        return_aux=AuxRequest(lse=True),
    )
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    dense = dataclasses.replace(SMALL, drop_mass=0.0)
    out = token_sparse_attention(
        *problem, dense, padding_mask=mask, execution=Execution("triton", "math")
    )
    assert out.isnan().flatten(1).all(-1).tolist() == [False, True]
    with pytest.raises(ValueError, match="one contiguous run"):
        token_sparse_attention(
            *problem, SMALL, padding_mask=mask, execution=Execution("reference")
        )


def test_nan_in_the_inputs_runs_dense():
    problem = problem_here(batch=2, query_len=150)
    problem.query[0, 1, -3] = torch.nan
    out, selection, _ = token_sparse_attention(
        *problem, SMALL, execution=Execution("triton", "math"), return_aux=SELECTION
    )
    assert selection.ran_sparse.tolist() == [False, True]
    assert out[0, 1, -3].isnan().all()


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
        token_sparse_attention(
            *problem, config, execution=Execution(impl, "math"), return_aux=SELECTION
        )
        for impl in ("triton", "reference")
    )
    same_selection(mine[1], theirs[1], 260)
    assert mine[1].ran_sparse.all()
    keep = reference.keep_tokens(score_tokens(problem.query, problem.key, 128)[0], config)
    assert torch.equal(kept_mask(mine[1].indices, 260)[0], keep)
