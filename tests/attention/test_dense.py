"""Dense attention: every shape it serves against a float64 softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from support import make_problem, relative_error
from token_sparse_attention.attention import dense
from token_sparse_attention.attention.backends import BackendChoice, check_flash, choose_backend
from token_sparse_attention.attention.dense import (
    Attended,
    attend_last,
    causal_attention,
    leaves_gpu_idle,
    varlen_causal_attention,
)
from token_sparse_attention.reference import masked_attention

SCALE = 0.25


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


@pytest.mark.parametrize("ragged", [False, True])
def test_packed_sequences_equal_one_call_each(ragged):
    query_lens = [5, 0, 17, 30] if ragged else [20] * 4
    kv_lens = [9, 4, 17, 64] if ragged else [33] * 4
    query = torch.randn(sum(query_lens), 16)
    key, value = torch.randn(2, sum(kv_lens), 16)
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (query_lens, kv_lens))
    out = varlen_causal_attention(query, key, value, cu_q, cu_k, scale=SCALE)
    for i in range(4):
        q = query[cu_q[i] : cu_q[i + 1]][None, None]
        k, v = (x[cu_k[i] : cu_k[i + 1]][None, None] for x in (key, value))
        if q.shape[2]:
            one = causal_attention(q, k, v, scale=SCALE)
            torch.testing.assert_close(out[cu_q[i] : cu_q[i + 1]], one[0, 0])


def test_auto_names_its_choice_and_why():
    query, key, _ = make_problem()
    name, reason = choose_backend("auto", query, key)
    assert name == "flash"
    assert "cpu" in reason
    assert choose_backend("math", query, key).name == "math"


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
    query = SimpleNamespace(
        is_cuda=True, dtype=dtype, shape=(1, 2, 9, head_dim), device=torch.device("cuda")
    )
    check_flash("flash", torch.empty(1, 2, 9, head_dim, dtype=dtype))  # off CUDA another kernel
    if runs:
        check_flash("flash", query)
    else:
        with pytest.raises(
            ValueError, match=f"'flash' cannot run {dtype} with head size {head_dim}"
        ):
            check_flash("flash", query)


@pytest.mark.parametrize(
    ("backend", "batch", "heads", "count", "idle"),
    [("fa4", 1, 8, 128, True), ("fa4", 1, 44, 128, True), ("fa4", 1, 45, 128, False),
     ("fa4", 1, 22, 129, True), ("fa4", 1, 23, 129, False), ("fa4", 2, 23, 128, False),
     ("fa4", 1, 8, 0, False), ("fa4", 1, 1, 2999, True), ("fa4", 1, 1, 3000, False),
     ("flash", 1, 8, 128, False)],
)  # fmt: skip
def test_few_queries_of_few_heads_leave_a_gpu_idle(
    monkeypatch, backend, batch, heads, count, idle
):
    monkeypatch.setattr(dense, "choose_backend", lambda *_: BackendChoice(backend, ""))
    monkeypatch.setattr(dense, "multiprocessors", lambda _: 132)
    query = SimpleNamespace(is_cuda=True, shape=(batch, heads, 3000, 64), device=None)
    assert leaves_gpu_idle("auto", query, query, count) == idle


def test_nothing_is_idle_off_cuda():
    problem = make_problem(query_len=300)
    assert not leaves_gpu_idle("auto", problem.query, problem.key, 20)


@pytest.mark.parametrize("with_lse", [False, True])
def test_last_queries_are_attended_in_place(with_lse):
    problem = make_problem(batch=2, query_len=60, kv_len=90)
    lse = torch.full(problem.query.shape[:3], 7.0) if with_lse else None
    into = Attended(torch.full_like(problem.query, 7.0), lse)
    attend_last(*problem, 20, into, scale=SCALE)
    assert relative_error(into.out[:, :, 40:], expected(problem)[:, :, 40:]) < 1e-6
    assert (into.out[:, :, :40] == 7).all()
    if lse is not None:
        assert (lse[:, :, :40] == 7).all()
        whole = dense.attend(*problem, scale=SCALE, want_lse=True).lse
        torch.testing.assert_close(lse[:, :, 40:], whole[:, :, 40:])
