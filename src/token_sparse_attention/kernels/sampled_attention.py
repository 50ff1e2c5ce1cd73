"""Merge each block's sampled keys into the sliding-window attention of its queries.

The queries of a block share each head's sampled keys. `sampled_keys_kernel` takes a tile of
queries, starts from its sliding-window output and log-sum-exp, and continues the softmax over
the keys and values at the sampled slots. Tiles begin at fixed positions, so a query's
result depends on nothing but the query, its block's samples, and their keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.blocks import Blocks
from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.softmax import LN_2, LOG2_E, dot_constants, load_rows

_COUNTED = 128  # tiles of sampled keys whose first and last slots are read at once


class Tiles(NamedTuple):
    """Block sizes and launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def pick_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Return the block sizes and launch options for a dtype and a head size."""
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, 32, 4, 2)
    if head_dim > 128:
        return Tiles(64, 64, 8, 2)
    return Tiles(128, 32, 4, 3) if head_dim > 64 else Tiles(128, 64, 4, 3)


@on_its_device
def add_sampled_keys(
    query: Tensor, key: Tensor, value: Tensor, sampled: tuple[Tensor, Tensor, Tensor],
    sequences: tuple[Tensor, Tensor], windowed: tuple[Tensor, Tensor], blocks: Blocks,
    scale: float,
) -> None:  # fmt: skip
    """Merge each block's sampled keys into sliding-window attention, in place.

    A query at position p, of block p // C, sees its block's entries up to position p - w.
    Queries of other blocks stay as they are.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D, as all others; the slots
            ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        sampled: slots ``[B, H, num_blocks, M]`` int32, ascending; base-2 logarithms of their
            weights, float32; and how many entries there are ``[B, H, num_blocks]`` int32, the
            others may hold anything.
        sequences: ``[B, 2]`` int32, each one's real slots ``[start, end)``; and ``[B]`` int32,
            the first slot whose query changes.
        windowed: the sliding-window attention ``[B, H, S_q, D]``, and its log-sum-exp
            ``[B, H, S_q]`` float32.
        blocks: the blocks.
        scale: factor of the logits.
    """
    (slots, log_weights, counts), (bounds, begins), (out, lse) = sampled, sequences, windowed
    if not slots.numel():
        return
    batch_size, num_heads, query_len, head_dim = query.shape
    block_m, block_n, num_warps, num_stages = pick_tiles(query.dtype, head_dim)
    block_m = min(block_m, blocks.size)
    num_tiles = blocks.num_blocks * (blocks.size // block_m)
    sampled_keys_kernel[(num_tiles, batch_size * num_heads)](
        query, key, value, slots.contiguous(), log_weights.contiguous(), counts.contiguous(),
        bounds, begins, out, lse, scale * LOG2_E.value,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *lse.stride(), num_heads, num_heads // key.shape[1], query_len, key.shape[2] - query_len,
        slots.shape[3], blocks.first, blocks.num_blocks, blocks.window,
        **dot_constants(query), BLOCK_SIZE=blocks.size, BLOCK_M=block_m, BLOCK_N=block_n,
        COUNTED=_COUNTED, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@triton.jit
def _count_tiles(
    p_slots, count, all_see, one_sees, BLOCK_N: tl.constexpr, COUNTED: tl.constexpr
):  # fmt: skip
    """How many tiles of entries lie up to the slot `all_see`, and begin up to `one_sees`."""
    shared = 0
    seen = 0
    for begin in range(0, count, COUNTED * BLOCK_N):
        o_n = begin + tl.arange(0, COUNTED) * BLOCK_N
        b_first = tl.load(p_slots + o_n, mask=o_n < count, other=2147483647)
        seen += tl.sum((b_first <= one_sees).to(tl.int32), 0)
        o_n += BLOCK_N - 1
        b_last = tl.load(p_slots + o_n, mask=o_n < count, other=2147483647)
        shared += tl.sum((b_last <= all_see).to(tl.int32), 0)
    return shared, seen


@triton.jit
def _load_entries(p_slots, p_weights, begin, count, BLOCK_N: tl.constexpr):
    """A tile's slots, that of no query behind the last entry, and what is added to its logits."""
    o_n = begin + tl.arange(0, BLOCK_N)
    b_slot = tl.load(p_slots + o_n, mask=o_n < count, other=2147483647)
    return b_slot, tl.load(p_weights + o_n, mask=o_n < count, other=0.0)


@triton.jit
def _attend_tile(
    b_q, b_acc, b_max, b_sum, b_reach, b_slot, b_weight, p_k, p_v,
    stride_ks: tl.int64, stride_vs: tl.int64, scale_log2,
    FIXED: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Update the softmax by the sampled keys of one tile, online unless the maximum is fixed."""
    exists = b_slot < 2147483647
    b_k = load_rows(p_k, b_slot, stride_ks, exists, HEAD_DIM, BLOCK_D, UPCAST)
    b_v = load_rows(p_v, b_slot, stride_vs, exists, HEAD_DIM, BLOCK_D, UPCAST)
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    b_logits += b_weight[None, :]
    if MASKED:
        b_logits = tl.where(b_slot[None, :] <= b_reach[:, None], b_logits, float("-inf"))
    if not FIXED:
        b_new = tl.maximum(b_max, tl.max(b_logits, 1))
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink
        b_acc = b_acc * b_shrink[:, None]
        b_max = b_new
    b_probs = tl.exp2(b_logits - b_max[:, None])
    b_sum += tl.sum(b_probs, 1)
    b_acc = tl.dot(b_probs.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def _attend_all(
    b_q, b_acc, b_max, b_reach, p_slots, p_weights, present, shared, seen, p_k, p_v,
    stride_ks: tl.int64, stride_vs: tl.int64, scale_log2,
    FIXED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Go on from windowed attention over all sampled keys that a tile of queries sees."""
    b_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    # Slots and weights are read a tile ahead.
    b_slot, b_weight = _load_entries(p_slots, p_weights, 0, present, BLOCK_N)
    for tile in range(shared):  # every query attends to every key: no mask
        b_next, b_next_weight = _load_entries(
            p_slots, p_weights, (tile + 1) * BLOCK_N, present, BLOCK_N
        )  # fmt: skip
        b_acc, b_max, b_sum = _attend_tile(
            b_q, b_acc, b_max, b_sum, b_reach, b_slot, b_weight, p_k, p_v, stride_ks, stride_vs,
            scale_log2, FIXED, False, HEAD_DIM, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        b_slot, b_weight = b_next, b_next_weight
    for tile in range(shared, seen):
        b_slot, b_weight = _load_entries(p_slots, p_weights, tile * BLOCK_N, present, BLOCK_N)
        b_acc, b_max, b_sum = _attend_tile(
            b_q, b_acc, b_max, b_sum, b_reach, b_slot, b_weight, p_k, p_v, stride_ks, stride_vs,
            scale_log2, FIXED, True, HEAD_DIM, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit(
    do_not_specialize=[
        "stride_lb", "stride_lh", "stride_ls", "query_len", "first_query", "entries", "first",
        "count", "window",
    ]
)  # fmt: skip
def sampled_keys_kernel(
    query_ptr, key_ptr, value_ptr, slots_ptr, log_weights_ptr, counts_ptr, bounds_ptr,
    begins_ptr, out_ptr, lse_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_ls: tl.int64,
    num_heads, group, query_len, first_query, entries, first, count, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """One tile of one head's queries."""
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_M
    b = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    start = tl.load(bounds_ptr + 2 * b)
    begin_slot = start + first * BLOCK_SIZE + tl.program_id(0) * BLOCK_M  # of the tile
    low = tl.maximum(tl.load(begins_ptr + b), tl.maximum(first_query, start))
    high = tl.minimum(tl.load(bounds_ptr + 2 * b + 1), first_query + query_len)
    problem = tl.program_id(1).to(tl.int64) * count + tl.program_id(0) // TILES
    present = tl.load(counts_ptr + problem)
    if (begin_slot + BLOCK_M <= low) | (begin_slot >= high):
        present = 0
    p_slots = slots_ptr + problem * entries
    p_weights = log_weights_ptr + problem * entries
    # What the tile's queries see, whether or not they are queries of this call.
    first_sees = begin_slot - window
    shared, seen = _count_tiles(
        p_slots, present, first_sees, first_sees + BLOCK_M - 1, BLOCK_N, COUNTED
    )  # fmt: skip
    if seen > 0:
        o_slot = begin_slot + tl.arange(0, BLOCK_M)
        real = (o_slot >= low) & (o_slot < high)
        o_query = o_slot - first_query
        p_q = query_ptr + b * stride_qb + head * stride_qh
        b_q = load_rows(p_q, o_query, stride_qs, real, HEAD_DIM, BLOCK_D, UPCAST)
        p_out = out_ptr + b * stride_ob + head * stride_oh
        b_acc = load_rows(p_out, o_query, stride_os, real, HEAD_DIM, BLOCK_D, UPCAST)
        b_acc = b_acc.to(tl.float32)
        p_lse = lse_ptr + b * stride_lb + head * stride_lh + o_query.to(tl.int64) * stride_ls
        b_max = tl.load(p_lse, mask=real, other=0.0) * LOG2_E
        b_reach = o_slot - window
        p_k = key_ptr + b * stride_kb + head // group * stride_kh
        p_v = value_ptr + b * stride_vb + head // group * stride_vh
        # The windows' log-sum-exp is nearly always reference enough: without a running maximum
        # nothing is rescaled. Where samples outweigh the window by far, one is kept after all.
        b_fast, b_last, b_sum = _attend_all(
            b_q, b_acc, b_max, b_reach, p_slots, p_weights, present, shared, seen, p_k, p_v,
            stride_ks, stride_vs, scale_log2, True, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            PRECISION, UPCAST,
        )  # fmt: skip
        # Of each query for itself: no other one decides. What is done is stored before the rest
        # begins, since registers do not hold both.
        over = b_sum > 32768.0
        o_d = tl.arange(0, BLOCK_D)
        p_rows = p_out + o_query.to(tl.int64)[:, None] * stride_os + o_d[None, :]
        inside = (o_d < HEAD_DIM)[None, :]
        tl.store(p_rows, (b_fast / b_sum[:, None]).to(out_ptr.dtype.element_ty),
                 mask=(real & ~over)[:, None] & inside)  # fmt: skip
        tl.store(p_lse, (b_last + tl.log2(b_sum)) * LN_2, mask=real & ~over)
        if tl.max(b_sum, 0) > 32768.0:
            b_again = load_rows(p_out, o_query, stride_os, real & over, HEAD_DIM, BLOCK_D, UPCAST)
            b_slow, b_slow_last, b_slow_sum = _attend_all(
                b_q, b_again.to(tl.float32), b_max, b_reach, p_slots, p_weights, present, shared,
                seen, p_k, p_v, stride_ks, stride_vs, scale_log2, False, HEAD_DIM, BLOCK_D,
                BLOCK_M, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
            tl.store(p_rows, (b_slow / b_slow_sum[:, None]).to(out_ptr.dtype.element_ty),
                     mask=(real & over)[:, None] & inside)  # fmt: skip
            tl.store(p_lse, (b_slow_last + tl.log2(b_slow_sum)) * LN_2, mask=real & over)
