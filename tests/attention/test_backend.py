"""Backends that attend: every shape they serve against a float64 softmax, whole and packed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from attention.by_hand import HEADS, LITTLE
from support import causal_attention, make_problem, relative_error
from token_sparse_attention.attention import flash
from token_sparse_attention.attention.backend import Backend, PackedHeads
from token_sparse_attention.attention.flash import FlashBackend
from token_sparse_attention.attention.names import parse_backend
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.attention.sdpa import SDPABackend, masked_in_steps, masked_on_cpu
from token_sparse_attention.inputs import AuxRequest, Chunk, Problem, real_tokens
from token_sparse_attention.reference import masked_attention
from token_sparse_attention.results import Attended, PackedSequences

SCALE = 0.25


def attend_packed(packed, offsets, heads, num_heads, backend="auto", want_lse=False):
    longest = [int(offset.diff().max()) for offset in offsets]
    sequences = PackedSequences(*packed, *offsets, *longest)
    resolved = resolve_backend(backend, packed[0][None, None], packed[1][None, None])
    of = PackedHeads(heads, num_heads)
    return resolved.attend_packed(sequences, of, scale=SCALE, want_lse=want_lse)


def problem_of(tensors, mask=None):
    """The operator's problem, as backends are given it."""
    query, key, _ = tensors
    tokens = real_tokens(mask, len(query), key.shape[2], query.device)
    return Problem(*tensors, tokens, SCALE, "reference", None, None, AuxRequest(), Chunk())


def expected(problem, window=None):
    query_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    slot = torch.arange(kv_len)
    position = slot[kv_len - query_len :, None]
    allowed = (slot <= position) & (slot > position - (window or kv_len))
    rows = [
        masked_attention(*(tensor[row].double() for tensor in problem), allowed[None], SCALE)
        for row in range(len(problem.query))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("query_len", "kv_len", "window"),
    [
        (63, 63, None),
        (1, 70, None),
        (40, 111, None),
        (700, 1200, None),
        (600, 600, 33),
        (63, 63, 1),
        (30, 90, 64),
        (30, 90, 500),
    ],
)
def test_causal_attention(backend, heads, kv_heads, query_len, kv_len, window):
    problem = make_problem(
        batch=2, heads=heads, kv_heads=kv_heads, query_len=query_len, kv_len=kv_len
    )
    out = causal_attention(*problem, scale=SCALE, backend=backend, window=window)
    assert relative_error(out, expected(problem, window)) < 1e-6


@pytest.mark.parametrize("attend", [masked_on_cpu, masked_in_steps])
def test_a_bias_on_the_logits_and_their_log_sum_exp(attend):
    query, key, value = make_problem(kv_heads=4, query_len=7, kv_len=11)
    bias = torch.randn(1, 4, 7, 11)
    bias[..., 3] = -torch.inf
    out, lse = attend((query, key, value), bias, SCALE)
    logits = (query.double() @ key.double().mT) * SCALE + bias
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())
    torch.testing.assert_close(out, (logits.softmax(-1) @ value.double()).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_close_as_eager(dtype):
    problem = make_problem(query_len=257, dtype=dtype)
    out = causal_attention(*problem, scale=SCALE)
    assert out.dtype == dtype
    exact = expected(problem)
    causal = torch.ones(1, 257, 257, dtype=torch.bool).tril()
    eager = masked_attention(*(tensor[0] for tensor in problem), causal, SCALE)[None]
    budget = 2 * relative_error(eager, exact) + 4 * torch.finfo(torch.float64).eps
    assert relative_error(out, exact) <= budget


@pytest.mark.parametrize("lengths", ["equal", "two kinds", "ragged"])
def test_packed_sequences_equal_one_call_each(lengths, monkeypatch):
    query_lens = {"equal": [20] * 4, "two kinds": [20, 9] * 2, "ragged": [5, 0, 17, 30]}[lengths]
    kv_lens = {"equal": [33] * 4, "two kinds": [33, 12] * 2, "ragged": [9, 4, 17, 64]}[lengths]
    calls, attend = [], SDPABackend.attend
    monkeypatch.setattr(
        SDPABackend, "attend", lambda *args, **kw: calls.append(args) or attend(*args, **kw)
    )
    query = torch.randn(sum(query_lens), 16)
    key, value = torch.randn(2, sum(kv_lens), 16)
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (query_lens, kv_lens))
    out = attend_packed((query, key, value), (cu_q, cu_k), range(4), 4).out
    assert len(calls) == {"equal": 1, "two kinds": 4, "ragged": 3}[lengths]
    for i in range(4):
        q = query[cu_q[i] : cu_q[i + 1]][None, None]
        k, v = (x[cu_k[i] : cu_k[i + 1]][None, None] for x in (key, value))
        if q.shape[2]:
            one = causal_attention(q, k, v, scale=SCALE)
            torch.testing.assert_close(out[cu_q[i] : cu_q[i + 1]], one[0, 0])


def test_auto_names_its_choice_and_why():
    query, key, _ = make_problem()
    chosen = resolve_backend("auto", query, key)
    assert chosen.name == "flash"
    assert "cpu" in chosen.reason
    assert chosen.dense is chosen
    assert resolve_backend("math", query, key).name == "math"
    assert resolve_backend("math", query, key).reason == "asked for"
    pattern = resolve_backend("streaming", query, key)
    assert (pattern.name, pattern.dense) == ("streaming", chosen)


def test_an_explicit_backend_never_falls_back():
    problem = make_problem()
    with pytest.raises(ValueError, match="attention_backend must be one of auto, fa4, flash"):
        causal_attention(*problem, scale=SCALE, backend="flash3")
    for backend in ("cudnn", "efficient"):
        with pytest.raises(ValueError, match=f"{backend!r} cannot run torch.float32.*on cpu"):
            causal_attention(*problem, scale=SCALE, backend=backend)


def test_keys_and_values_are_never_repeated():
    """Peak memory of 16 query heads on one KV head stays near the output's size."""
    query = torch.randn(1, 16, 2048, 64)
    key, value = torch.randn(2, 1, 1, 2048, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        causal_attention(query, key, value, scale=SCALE, window=256)
        causal_attention(query, key, value, scale=SCALE)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 1.3 * query.numel() * 4
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::repeat", "aten::repeat_interleave"}


@pytest.mark.parametrize(
    ("head_dim", "dtype", "runs"),
    [(64, torch.float16, True), (20, torch.bfloat16, False), (264, torch.float16, False),
     (64, torch.float32, False)],
)  # fmt: skip
def test_flash_refuses_on_cuda_what_its_kernel_cannot_run(head_dim, dtype, runs):
    query = SimpleNamespace(dtype=dtype, shape=(1, 2, 9, head_dim), device=torch.device("cuda"))
    here = torch.empty(1, 2, 9, head_dim, dtype=dtype)
    assert isinstance(resolve_backend("flash", here, here), SDPABackend), "another kernel"
    if runs:
        assert isinstance(resolve_backend("flash", query, query), FlashBackend)
    else:
        with pytest.raises(
            ValueError, match=f"'flash' cannot run {dtype} with head size {head_dim}"
        ):
            resolve_backend("flash", query, query)


@pytest.fixture
def by_math(monkeypatch):
    """FlashAttention's kernels replaced, with as many multiprocessors as a GPU has."""

    def attend(_, *tensors, **options):
        return SDPABackend("math").attend(*tensors, **options)

    monkeypatch.setattr(FlashBackend, "attend", attend)
    monkeypatch.setattr(flash, "multiprocessors", lambda _: 132)


@pytest.mark.usefixtures("by_math")
@pytest.mark.parametrize(
    ("backend", "batch", "heads", "count", "idle"),
    [("fa4", 1, 8, 128, True), ("fa4", 1, 44, 128, True), ("fa4", 1, 45, 128, False),
     ("fa4", 1, 22, 129, True), ("fa4", 1, 23, 129, False), ("fa4", 2, 23, 128, False),
     ("fa4", 1, 8, 0, False), ("fa4", 1, 1, 2999, True), ("fa4", 1, 1, 3000, False),
     ("flash", 1, 8, 128, False)],
)  # fmt: skip
def test_few_queries_of_few_heads_leave_a_gpu_idle(backend, batch, heads, count, idle):
    tensors = make_problem(batch=batch, heads=heads, kv_heads=1, query_len=3000, head_dim=4)
    into = Attended(torch.zeros_like(tensors.query), None)
    assert FlashBackend(backend).attend_last(problem_of(tensors), count, into) == idle
    assert bool(into.out[:, :, 3000 - count :].any()) == idle


@pytest.mark.usefixtures("by_math")
def test_nothing_is_idle_off_cuda_or_where_there_is_padding():
    tensors = make_problem(query_len=300)
    into = Attended(torch.zeros_like(tensors.query), None)
    mask = torch.ones(1, 300, dtype=torch.bool)
    chosen = resolve_backend("auto", tensors.query, tensors.key)
    assert not chosen.attend_last(problem_of(tensors), 20, into)
    assert not FlashBackend("fa4").attend_last(problem_of(tensors, mask), 20, into)
    assert not into.out.any()


@pytest.mark.usefixtures("by_math")
@pytest.mark.parametrize("with_lse", [False, True])
def test_last_queries_are_attended_in_place(with_lse):
    problem = make_problem(batch=2, query_len=60, kv_len=90)
    lse = torch.full(problem.query.shape[:3], 7.0) if with_lse else None
    into = Attended(torch.full_like(problem.query, 7.0), lse)
    assert FlashBackend("fa4").attend_last(problem_of(problem), 20, into)
    assert relative_error(into.out[:, :, 40:], expected(problem)[:, :, 40:]) < 1e-6
    assert (into.out[:, :, :40] == 7).all()
    if lse is not None:
        assert (lse[:, :, :40] == 7).all()
        whole = SDPABackend("math").attend(*problem, scale=SCALE, want_lse=True).lse
        torch.testing.assert_close(lse[:, :, 40:], whole[:, :, 40:])


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("with_lse", [False, True])
def test_each_sequence_attends_from_its_own_slot_on(with_lse, window):
    tensors = make_problem(batch=3, query_len=60, kv_len=90)
    mask = torch.ones(3, 90, dtype=torch.bool)
    mask[1, :45] = False
    mask[2, 80:] = False
    problem = problem_of(tensors, mask)
    lse = torch.full(tensors.query.shape[:3], 7.0) if with_lse else None
    into = Attended(torch.full_like(tensors.query, 7.0), lse)
    backend = resolve_backend("auto", tensors.query, tensors.key)
    begins = torch.tensor([70, 45, 80], dtype=torch.int32)
    backend.attend_sequences(problem, begins, into, window=window)
    assert (into.out[2] == 7).all(), "none of its queries"
    assert (into.out[0, :, :40] == 7).all()
    assert (into.out[1, :, :15] == 7).all()
    for number, start, begin in ((0, 0, 70), (1, 45, 45)):
        alone = type(tensors)(
            tensors.query[number : number + 1, :, begin - 30 :],
            *(x[number : number + 1, :, start:] for x in tensors[1:]),
        )
        found = into.out[number : number + 1, :, begin - 30 :]
        assert relative_error(found, expected(alone, window)) < 1e-6
        if lse is not None:
            whole = backend.attend(*alone, scale=SCALE, window=window, want_lse=True).lse
            torch.testing.assert_close(lse[number, :, begin - 30 :], whole[0])


def test_backends_are_values():
    assert dataclasses.replace(SDPABackend("math"), reason="x") == SDPABackend("math", "x")
    assert isinstance(SDPABackend("math"), Backend)
    query, key, _ = make_problem()
    assert resolve_backend("auto", query, key) is resolve_backend("auto", query, key)


def pack(lengths):
    """Sequences of ``(queries, keys)``, with a tail that must not be read."""
    parts = [
        make_problem(heads=1, kv_heads=1, query_len=max(q, 1), kv_len=max(k, 1), seed=number)
        for number, (q, k) in enumerate(lengths)
    ]
    tail = torch.full((130, 16), torch.nan)
    packed = []
    for name, axis in (("query", 0), ("key", 1), ("value", 1)):
        rows = [getattr(p, name)[0, 0, : n[axis]] for p, n in zip(parts, lengths)]
        packed.append(torch.cat([*rows, tail]))
    offsets = [torch.tensor([0, *(n[axis] for n in lengths)]).cumsum(0).int() for axis in (0, 1)]
    return parts, packed, offsets


@pytest.mark.parametrize("config", LITTLE.values(), ids=LITTLE)
def test_packed_sequences_are_attended_as_each_alone(config):
    lengths = [(300, 300), (170, 290), (300, 300), (0, 40), (170, 290), (0, 0), (1, 1), (5, 131)]
    parts, packed, offsets = pack(lengths)
    backend = parse_backend(config)
    out, lse = attend_packed(packed, offsets, range(8), 8, backend, want_lse=True)
    assert len(out) == len(packed[0])
    for number, (query_len, _) in enumerate(lengths):
        if query_len:
            query, key, value = parts[number]
            resolved = resolve_backend(backend, query, key)
            alone = resolved.attend(query, key, value, scale=SCALE, want_lse=True)
            rows = slice(*offsets[0][number : number + 2].tolist())
            torch.testing.assert_close(out[rows], alone.out[0, 0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse[rows], alone.lse[0, 0], rtol=1e-5, atol=1e-6)


def test_equal_lengths_are_one_problem(monkeypatch):
    seen = []
    streaming = PATTERNS["streaming"]

    def run(query, *arguments, **settings):
        seen.append((*query.shape[1:3], query.data_ptr()))
        return streaming.run(query, *arguments, **settings)

    monkeypatch.setitem(PATTERNS, "streaming", streaming._replace(run=run))
    _, packed, offsets = pack([(50, 50), (50, 50), (20, 50), (50, 50)])
    for sequences in (4, 2):
        ends = [offset[: sequences + 1] for offset in offsets]
        attend_packed(packed, ends, range(sequences), 4, "streaming")
    assert [entry[:2] for entry in seen] == [(3, 50), (1, 20), (2, 50)]
    assert seen[-1][2] == packed[0].data_ptr(), "side by side, so not copied"


def test_settings_per_head_follow_the_heads():
    parts, packed, offsets = pack([(300, 300)] * 4)
    heads = [1, 0, 0, 1]  # a group that begins within a sequence of the batch
    backend = parse_backend(HEADS)
    out = attend_packed(packed, offsets, heads, 2, backend).out
    for number, head in enumerate(heads):
        both = [tensor.expand(-1, 2, -1, -1) for tensor in parts[number]]
        alone = causal_attention(*both, scale=SCALE, backend=backend)[0, head]
        rows = slice(number * 300, (number + 1) * 300)
        torch.testing.assert_close(out[rows], alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="each of the 3 query heads, got 2"):
        attend_packed(packed, offsets, heads, 3, backend)
