"""A plain block-sparse attention kernel, which `speed` compares the executor with.

It is what one writes first: FlashAttention-2's loop, over a list of blocks instead of a range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device

_LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Keys per step and launch options."""

    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3


@on_its_device
def attend_block_lists(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partial: tuple[Tensor, Tensor],
    full: tuple[Tensor, Tensor],
    block_size: tuple[int, int],
    scale: float,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return causal attention over the listed blocks, ``[B, H, S_q, D]``.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D, a power of two.
        key: ``[B, H_kv, S_kv, D]``, of the same dtype.
        value: as key.
        partial: counts ``[B, H, Q]`` and numbers ``[B, H, Q, P]``, int32, of the blocks in which
            the causal rule is asked; they hold at least the diagonal.
        full: of the blocks in which it is not.
        block_size: queries and keys per block, powers of two.
        scale: factor of the logits.
        tiles: options; the keys per step divide a block.
    """
    tiles = tiles or Tiles(block_n=min(block_size[1], 64))
    batch_size, num_heads, query_len, head_dim = query.shape
    lists = [tensor.contiguous() for tensor in (*partial, *full)]
    out = torch.empty_like(query)
    block_sparse_kernel[(lists[0].shape[-1], batch_size * num_heads)](
        query, key, value, out, *lists, scale * _LOG2_E,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        num_heads, num_heads // key.shape[1], query_len, key.shape[2],
        lists[1].shape[-1], lists[3].shape[-1],
        HEAD_DIM=head_dim, QUERY_BLOCK=block_size[0], KV_BLOCK=block_size[1],
        BLOCK_N=tiles.block_n, UPCAST=not query.is_cuda,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


@triton.jit
def _attend_step(
    b_q, b_acc, b_max, b_sum, p_k, p_v, first, o_row, kv_len,
    stride_ks: tl.int64, stride_vs: tl.int64, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys ``first..first + BLOCK_N`` into the running softmax."""
    o_d = tl.arange(0, HEAD_DIM)
    o_key = first + tl.arange(0, BLOCK_N)
    o_k = o_key.to(tl.int64)[:, None]
    if DIAGONAL:
        b_k = tl.load(p_k + o_k * stride_ks + o_d, mask=(o_key < kv_len)[:, None], other=0.0)
        b_v = tl.load(p_v + o_k * stride_vs + o_d, mask=(o_key < kv_len)[:, None], other=0.0)
    else:
        b_k = tl.load(p_k + o_k * stride_ks + o_d)
        b_v = tl.load(p_v + o_k * stride_vs + o_d)
    if UPCAST:
        b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if DIAGONAL:
        b_logits = tl.where(o_key[None, :] <= o_row[:, None], b_logits, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_faded = tl.exp2(b_max - b_safe)
    b_weights = tl.exp2(b_logits - b_safe[:, None])
    b_sum = b_sum * b_faded + tl.sum(b_weights, 1)
    b_acc = b_acc * b_faded[:, None]
    b_acc = tl.dot(b_weights.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["query_len", "kv_len", "partial_width", "full_width"])
def block_sparse_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, partial_count_ptr, partial_index_ptr,
    full_count_ptr, full_index_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    num_heads, group, query_len, kv_len, partial_width, full_width,
    HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of one head's queries."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest lists first
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    o_d = tl.arange(0, HEAD_DIM)
    o_query = block * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    exists = (o_query < query_len)[:, None]
    p_q = query_ptr + b * stride_qb + head * stride_qh
    b_q = tl.load(p_q + o_query.to(tl.int64)[:, None] * stride_qs + o_d, mask=exists, other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    o_row = o_query + (kv_len - query_len)
    p_k = key_ptr + b * stride_kb + (head // group) * stride_kh
    p_v = value_ptr + b * stride_vb + (head // group) * stride_vh
    place = (b * num_heads + head) * tl.num_programs(0) + block
    b_acc = tl.zeros([QUERY_BLOCK, HEAD_DIM], tl.float32)
    b_max = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERY_BLOCK], tl.float32)
    STEPS: tl.constexpr = KV_BLOCK // BLOCK_N
    p_list = full_index_ptr + place * full_width
    for step in range(tl.load(full_count_ptr + place) * STEPS):
        first = tl.load(p_list + step // STEPS) * KV_BLOCK + (step % STEPS) * BLOCK_N
        b_acc, b_max, b_sum = _attend_step(
            b_q, b_acc, b_max, b_sum, p_k, p_v, first, o_row, kv_len, stride_ks, stride_vs,
            scale_log2, HEAD_DIM, BLOCK_N, False, UPCAST, PRECISION,
        )  # fmt: skip
    p_list = partial_index_ptr + place * partial_width
    for step in range(tl.load(partial_count_ptr + place) * STEPS):
        first = tl.load(p_list + step // STEPS) * KV_BLOCK + (step % STEPS) * BLOCK_N
        b_acc, b_max, b_sum = _attend_step(
            b_q, b_acc, b_max, b_sum, p_k, p_v, first, o_row, kv_len, stride_ks, stride_vs,
            scale_log2, HEAD_DIM, BLOCK_N, True, UPCAST, PRECISION,
        )  # fmt: skip
    b_acc = b_acc / b_sum[:, None]
    p_out = out_ptr + b * stride_ob + head * stride_oh
    p_out += o_query.to(tl.int64)[:, None] * stride_os + o_d
    tl.store(p_out, b_acc.to(out_ptr.dtype.element_ty), mask=exists)
