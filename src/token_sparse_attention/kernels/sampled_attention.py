"""Add a few keys of each head's, from anywhere, to the sliding-window attention of all queries.

Far tokens are few and shared by a head's queries, so they are gathered beforehand. A block of
queries goes on from the output and log-sum-exp that the window gave it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.scoring import _load_rows

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
    return Tiles(128, 32, 4, 4)  # the fastest of those measured on an H100


@on_its_device
def add_sampled_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor,
    bounds: Tensor,
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    window: int,
    scale: float,
    weights: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Merge far tokens into windowed attention, in place; padding's queries stay.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D, as all others.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        far: ``[B, H, M]`` integer slots, ascending, S_kv or more for none; M may be 0.
        bounds: ``[B, 2]`` int32, each row's real slots ``[start, end)``.
        rows: ``[B]`` bool, the rows wanted.
        out: ``[B, H, S_q, D]``, the windowed attention.
        lse: ``[B, H, S_q]`` float32, its log-sum-exp.
        window: keys each query has seen, itself included; it sees far tokens before them.
        scale: factor of the logits.
        counts: ``[B, H, M]`` float32, how many tokens each far token stands for; None for one.
        tiles: block sizes, for tuning.
    """
    if not far.shape[2]:
        return
    batch_size, num_heads, query_len, head_dim = query.shape
    far_key, far_value = _gather(key, value, far.long())
    far = far.to(torch.int32).contiguous()
    block_m, block_n, num_warps, num_stages = tiles or _pick_tiles(query.dtype, head_dim)
    far_tokens_kernel[(triton.cdiv(query_len, block_m), batch_size * num_heads)](
        query, far, far_key, far_value, None if weights is None else weights.log2().contiguous(),
        bounds, rows, out, lse, scale * _LOG2_E,
        *query.stride()[:3], *out.stride()[:3], *lse.stride(),
        num_heads, query_len, key.shape[2] - query_len,
        HEAD_DIM=head_dim, BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        FAR=far.shape[2], FAR_BLOCK=min(triton.next_power_of_2(far.shape[2]), 2048), WINDOW=window,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST=not query.is_cuda,  # the interpreter's bfloat16 arithmetic is wrong
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _gather(key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values at each query head's slots ``[B, H, M, D]``; any where there is none."""
    batch_size, num_kv_heads, kv_len, _ = key.shape
    batch = torch.arange(batch_size, device=key.device)[:, None, None]
    head = torch.arange(slots.shape[1], device=key.device)[:, None]
    at = (batch, head // (slots.shape[1] // num_kv_heads), slots.clamp(max=kv_len - 1))
    return key[at], value[at]


@triton.jit
def _attend_tile(
    b_q, b_acc, b_max, b_sum, b_reach, b_weight, place, begin, seen,
    far_ptr, far_key_ptr, far_value_ptr, scale_log2,
    MASKED: tl.constexpr, WEIGHTED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take a tile of far tokens, which begins at ``place + begin``, into the softmax."""
    o_n = begin + tl.arange(0, BLOCK_N)
    exists = o_n < seen
    b_k = _load_rows(far_key_ptr, place + o_n, HEAD_DIM, exists, HEAD_DIM, BLOCK_D, UPCAST)
    b_v = _load_rows(far_value_ptr, place + o_n, HEAD_DIM, exists, HEAD_DIM, BLOCK_D, UPCAST)
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if WEIGHTED:
        b_logits += b_weight[None, :]
    if MASKED:
        b_slot = tl.load(far_ptr + place + o_n, mask=exists, other=2147483647)
        b_logits = tl.where(b_slot[None, :] <= b_reach[:, None], b_logits, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_probs = tl.exp2(b_logits - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_probs, 1)
    b_acc = tl.dot(b_probs.to(b_v.dtype), b_v, b_acc * b_shrink[:, None],
                   input_precision=PRECISION)  # fmt: skip
    return b_acc, b_new, b_sum


@triton.jit
def _load_weights(
    weights_ptr, place, begin, seen, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What is added to a tile's logits, base 2."""
    if WEIGHTED:
        o_n = begin + tl.arange(0, BLOCK_N)
        b_weight = tl.load(weights_ptr + place + o_n, mask=o_n < seen, other=0.0)
    else:
        b_weight = tl.zeros([BLOCK_N], tl.float32)
    return b_weight


@triton.jit(do_not_specialize=["query_len", "first_query", "stride_lb", "stride_lh", "stride_ls"])
def far_tokens_kernel(
    query_ptr, far_ptr, far_key_ptr, far_value_ptr, weights_ptr, bounds_ptr, rows_ptr,
    out_ptr, lse_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_ls: tl.int64,
    num_heads, query_len, first_query,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FAR: tl.constexpr, FAR_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of one head's queries."""
    WEIGHTED: tl.constexpr = weights_ptr is not None
    row = tl.program_id(1).to(tl.int64)
    place = row * FAR
    b = row // num_heads
    head = row % num_heads
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    end = start + (end - start) * tl.load(rows_ptr + b).to(tl.int32)  # empty if not wanted
    o_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_slot = first_query + o_query
    real = (o_query < query_len) & (o_slot >= start) & (o_slot < end)
    b_reach = tl.where(real, o_slot - WINDOW, -1)  # the last far slot that each query sees
    longest, shortest = tl.max(b_reach, 0), tl.min(b_reach, 0)
    seen = 0  # far tokens by any of the queries, and by all
    shared = 0
    for begin in range(0, FAR, FAR_BLOCK):
        o_far = begin + tl.arange(0, FAR_BLOCK)
        b_far = tl.load(far_ptr + place + o_far, mask=o_far < FAR, other=2147483647)
        seen += tl.sum((b_far <= longest).to(tl.int32), 0)
        shared += tl.sum((b_far <= shortest).to(tl.int32), 0)
    shared = shared // BLOCK_N * BLOCK_N
    if seen > 0:
        p_q = query_ptr + b * stride_qb + head * stride_qh
        b_q = _load_rows(p_q, o_query, stride_qs, real, HEAD_DIM, BLOCK_D, UPCAST)
        p_out = out_ptr + b * stride_ob + head * stride_oh
        b_acc = _load_rows(p_out, o_query, stride_os, real, HEAD_DIM, BLOCK_D, UPCAST)
        b_acc = b_acc.to(tl.float32)
        p_lse = lse_ptr + b * stride_lb + head * stride_lh + o_query.to(tl.int64) * stride_ls
        b_max = tl.load(p_lse, mask=real, other=0.0) * 1.4426950408889634
        b_sum = tl.full([BLOCK_M], 1.0, tl.float32)
        b_weight = _load_weights(weights_ptr, place, 0, seen, WEIGHTED, BLOCK_N)
        for begin in range(0, shared, BLOCK_N):  # no slots to look at, and no mask
            # Weights are read a tile ahead: the pipeline takes care of keys and values only.
            b_next = _load_weights(weights_ptr, place, begin + BLOCK_N, seen, WEIGHTED, BLOCK_N)
            b_acc, b_max, b_sum = _attend_tile(
                b_q, b_acc, b_max, b_sum, b_reach, b_weight, place, begin, FAR,
                far_ptr, far_key_ptr, far_value_ptr, scale_log2, False, WEIGHTED,
                HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
            b_weight = b_next
        for begin in range(shared, seen, BLOCK_N):
            b_weight = _load_weights(weights_ptr, place, begin, seen, WEIGHTED, BLOCK_N)
            b_acc, b_max, b_sum = _attend_tile(
                b_q, b_acc, b_max, b_sum, b_reach, b_weight, place, begin, seen,
                far_ptr, far_key_ptr, far_value_ptr, scale_log2, True, WEIGHTED,
                HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
        o_d = tl.arange(0, BLOCK_D)
        p_out += o_query.to(tl.int64)[:, None] * stride_os + o_d[None, :]
        tl.store(p_out, (b_acc / b_sum[:, None]).to(out_ptr.dtype.element_ty),
                 mask=real[:, None] & (o_d < HEAD_DIM)[None, :])  # fmt: skip
        tl.store(p_lse, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=real)
