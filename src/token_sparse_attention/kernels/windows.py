"""Sliding-window attention that also sees some keys of each head's from further back.

One pass per block of queries: first the far keys that lie before the window of a query, then
the window. Far keys are few and shared by all queries, so they are gathered beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Block sizes and launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _pick_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, 32, 4, 2)
    if head_dim > 128:
        return Tiles(64, 64, 8, 2)
    return Tiles(128, 64, 8, 3)


def attend_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor,
    bounds: Tensor,
    rows: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    window: int,
    scale: float,
    tiles: Tiles | None = None,
) -> None:
    """Attend the queries of some rows, written in place; padding's queries stay.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D, as all others.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        far: ``[B, H, N]`` integer slots, ascending, S_kv or more for none.
        bounds: ``[B, 2]`` int32, each row's real slots ``[start, end)``.
        rows: ``[B]`` bool, the rows wanted.
        out: ``[B, H, S_q, D]``, to write.
        lse: ``[B, H, S_q]`` float32, contiguous, to write; None if not wanted.
        window: keys each query sees, itself included.
        scale: factor of the logits.
        tiles: block sizes, for tuning.
    """
    batch_size, num_heads, query_len, head_dim = query.shape
    group = num_heads // key.shape[1]
    far = far.to(torch.int32).contiguous()
    far_key, far_value = (_gather(x, far, group) for x in (key, value))
    block_m, block_n, num_warps, num_stages = tiles or _pick_tiles(query.dtype, head_dim)
    window_kernel[(triton.cdiv(query_len, block_m), batch_size * num_heads)](
        query, key, value, far, far_key, far_value, bounds, rows,
        out, out if lse is None else lse, scale * _LOG2_E,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        num_heads, query_len, key.shape[2] - query_len,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        FAR=far.shape[2], FAR_BLOCK=triton.next_power_of_2(max(far.shape[2], 1)),
        WINDOW=window, WITH_LSE=lse is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST=not query.is_cuda,  # the interpreter's bfloat16 arithmetic is wrong
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _gather(rows: Tensor, slots: Tensor, group: int) -> Tensor:
    """Rows at each query head's slots ``[B, H, N, D]``, zeros where there is none."""
    batch = torch.arange(len(rows), device=rows.device)[:, None, None]
    head = torch.arange(slots.shape[1], device=rows.device)[:, None] // group
    exists = slots < rows.shape[2]
    gathered = rows[batch, head, slots.clamp(max=rows.shape[2] - 1).long()]
    return gathered.masked_fill_(~exists[..., None], 0.0)


@triton.jit
def _load_rows(
    p_rows, o_row, stride: tl.int64, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load vectors ``[rows, BLOCK_D]``, zeros where they do not exist."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows += o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if BLOCK_D == HEAD_DIM:
        b_rows = tl.load(p_rows, mask=exists[:, None], other=0.0)
    else:
        b_rows = tl.load(p_rows, mask=exists[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        b_rows = b_rows.to(tl.float32)
    return b_rows


@triton.jit
def _attend(b_q, b_k, b_v, visible, scale_log2, b_acc, b_max, b_sum, PRECISION: tl.constexpr):
    """Take a block of keys into the running output, maximum and sum of each query."""
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    b_logits = tl.where(visible, b_logits, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # a query that has seen no key yet
    b_probs = tl.exp2(b_logits - b_safe[:, None])
    b_shrink = tl.exp2(b_max - b_safe)
    b_sum = b_sum * b_shrink + tl.sum(b_probs, 1)
    b_acc = tl.dot(b_probs.to(b_v.dtype), b_v, b_acc * b_shrink[:, None],
                   input_precision=PRECISION)  # fmt: skip
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["query_len", "first_query"])
def window_kernel(
    query_ptr, key_ptr, value_ptr, far_ptr, far_key_ptr, far_value_ptr, bounds_ptr, rows_ptr,
    out_ptr, lse_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    num_heads, query_len, first_query,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FAR: tl.constexpr, FAR_BLOCK: tl.constexpr, WINDOW: tl.constexpr, WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of one head's queries."""
    row = tl.program_id(1).to(tl.int64)
    b = row // num_heads
    head = row % num_heads
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    o_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = first_query + tl.program_id(0) * BLOCK_M  # slots of the first and last query
    last = tl.minimum(first_query + tl.minimum((tl.program_id(0) + 1) * BLOCK_M, query_len), end)
    last -= 1
    if tl.load(rows_ptr + b) & (last >= start):
        o_slot = first_query + o_query
        real = (o_query < query_len) & (o_slot >= start) & (o_slot < end)
        p_q = query_ptr + b * stride_qb + head * stride_qh
        b_q = _load_rows(p_q, o_query, stride_qs, real, HEAD_DIM, BLOCK_D, UPCAST)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        if FAR > 0:
            o_far = tl.arange(0, FAR_BLOCK)
            p_far = far_ptr + row * FAR
            b_far = tl.load(p_far + o_far, mask=o_far < FAR, other=2147483647)
            seen = tl.sum((b_far <= last - WINDOW).to(tl.int32), 0)
            for begin in range(0, seen, BLOCK_N):
                o_n = begin + tl.arange(0, BLOCK_N)
                exists = o_n < seen
                b_slot = tl.load(p_far + o_n, mask=exists, other=2147483647)
                b_k = _load_rows(far_key_ptr, row * FAR + o_n, HEAD_DIM, exists,
                                 HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
                b_v = _load_rows(far_value_ptr, row * FAR + o_n, HEAD_DIM, exists,
                                 HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
                visible = b_slot[None, :] <= (o_slot - WINDOW)[:, None]
                b_acc, b_max, b_sum = _attend(
                    b_q, b_k, b_v, visible, scale_log2, b_acc, b_max, b_sum, PRECISION
                )
        p_k = key_ptr + b * stride_kb + (head // GROUP) * stride_kh
        p_v = value_ptr + b * stride_vb + (head // GROUP) * stride_vh
        for begin in range(tl.maximum(start, first - WINDOW + 1), last + 1, BLOCK_N):
            o_key = begin + tl.arange(0, BLOCK_N)
            exists = o_key <= last
            b_k = _load_rows(p_k, o_key, stride_ks, exists, HEAD_DIM, BLOCK_D, UPCAST)
            b_v = _load_rows(p_v, o_key, stride_vs, exists, HEAD_DIM, BLOCK_D, UPCAST)
            ago = o_slot[:, None] - o_key[None, :]
            b_acc, b_max, b_sum = _attend(
                b_q, b_k, b_v, (ago >= 0) & (ago < WINDOW), scale_log2, b_acc, b_max, b_sum,
                PRECISION,
            )  # fmt: skip
        o_d = tl.arange(0, BLOCK_D)
        p_out = out_ptr + b * stride_ob + head * stride_oh
        p_out += o_query.to(tl.int64)[:, None] * stride_os + o_d[None, :]
        b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty),
                 mask=real[:, None] & (o_d < HEAD_DIM)[None, :])  # fmt: skip
        if WITH_LSE:
            b_lse = (b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0))) * 0.6931471805599453
            tl.store(lse_ptr + row * query_len + o_query, b_lse, mask=real)
