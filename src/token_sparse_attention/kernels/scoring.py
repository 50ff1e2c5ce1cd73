"""Score every key by the attention it gets from the window: two passes over K.

The first pass keeps online softmax statistics of every window query, each split of the keys
its own; the second recomputes the logits and adds up each key's probabilities. The window
queries of a KV head's whole group are rows of one problem, so nothing repeats keys, and the
blocks that read the same keys run side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.softmax import (
    LOG2_E,
    dot_constants,
    finite_maximum,
    load_rows,
    update_statistics,
)

_MAX_SPLITS = 64


class Tiles(NamedTuple):
    """Block sizes and launch options of one scoring kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


def _pick_tiles(dtype: torch.dtype, head_dim: int) -> tuple[Tiles, Tiles]:
    """Tiles of the two passes, the fastest of those measured on an H200."""
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, 32, 4, 2, 264), Tiles(32, 32, 4, 2, 264)
    if head_dim > 128:
        return Tiles(128, 64, 8, 2, 264), Tiles(128, 64, 8, 2, 264)
    return Tiles(256, 64, 8, 3, 264), Tiles(128, 64, 4, 4, 264)


@on_its_device
def score_tokens(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    num_probes: int,
    scale: float,
    *,
    padded: bool,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:
    """Return ``[B, H, S_kv - W]`` float32 scores by slot; rows short of queries are NaN.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D.
        key: ``[B, H_kv, S_kv, D]``, unit stride over D.
        bounds: ``[B, 2]`` int32, each row's real slots ``[start, end)``.
        num_probes: W.
        scale: factor of the logits.
        padded: whether a row may have padding, whose scores are 0.
        tiles: block sizes, for tuning.
    """
    batch_size, num_heads, query_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    num_scored = max(kv_len - num_probes, 0)
    make = torch.zeros if padded else torch.empty
    scores = make(batch_size, num_heads, num_scored, dtype=torch.float32, device=query.device)
    if num_scored == 0:
        return scores
    group = num_heads // num_kv_heads
    window_rows = max(triton.next_power_of_2(num_probes), 16)
    first, second = tiles or _pick_tiles(query.dtype, head_dim)
    # A block of the first pass may span several heads, one of the second pass is one head's.
    block_m = min(first.block_m, triton.next_power_of_2(group * window_rows))
    row_blocks = triton.cdiv(group * window_rows, block_m)
    num_splits, tiles_per_split = _split(
        kv_len, first.block_n, batch_size * num_kv_heads * row_blocks, first.programs
    )
    stats_shape = (2, batch_size * num_kv_heads, row_blocks * block_m, _MAX_SPLITS)
    stats = torch.empty(stats_shape, dtype=torch.float32, device=query.device)
    strides = (*query.stride()[:3], *key.stride()[:3])
    constants = {
        "GROUP": group,
        **dot_constants(query),
        "WINDOW": num_probes,
        "WINDOW_ROWS": window_rows,
        "MAX_SPLITS": _MAX_SPLITS,
    }
    arguments = (query, key, bounds, stats[0], stats[1], scale * LOG2_E.value, *strides)
    lengths = (num_kv_heads, kv_len - query_len)
    window_statistics_kernel[(batch_size * num_kv_heads * row_blocks, num_splits)](
        *arguments,
        *lengths,
        row_blocks,
        tiles_per_split,
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=first.block_n,
        num_warps=first.num_warps,
        num_stages=first.num_stages,
    )
    block_m = min(second.block_m, window_rows)
    score_splits, tiles_per_split = _split(
        num_scored, second.block_n, batch_size * num_heads, second.programs
    )
    mean_probability_kernel[(batch_size * num_heads, score_splits)](
        *arguments,
        *lengths,
        stats_shape[2],
        num_scored,
        num_splits,
        tiles_per_split,
        scores,
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=second.block_n,
        num_warps=second.num_warps,
        num_stages=second.num_stages,
    )
    return scores


def _split(length: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Return into how many splits to cut the keys, and how many blocks each gets."""
    blocks = triton.cdiv(length, block)
    splits = max(min(wanted // programs, blocks, _MAX_SPLITS), 1)
    per_split = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, per_split), per_split


@triton.jit(do_not_specialize=["first_query", "tiles_per_split"])
def window_statistics_kernel(
    query_ptr, key_ptr, bounds_ptr, max_ptr, sum_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    num_kv_heads, first_query, row_blocks, tiles_per_split,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Maximum and sum over one split of the keys, of a block of a group's window queries."""
    block = tl.program_id(0) % row_blocks
    problem = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    b = (problem // num_kv_heads).to(tl.int64)
    kv_head = (problem % num_kv_heads).to(tl.int64)
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)

    o_row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_entry = o_row % WINDOW_ROWS
    o_slot = end - WINDOW + o_entry
    exists = (o_row < GROUP * WINDOW_ROWS) & (o_entry < WINDOW)
    exists = exists & (o_slot >= first_query) & (o_slot >= start)
    head = kv_head * GROUP + o_row // WINDOW_ROWS
    p_q = query_ptr + b * stride_qb + head[:, None] * stride_qh
    b_q = load_rows(p_q, o_slot - first_query, stride_qs, exists, HEAD_DIM, BLOCK_D, UPCAST)

    p_k = key_ptr + b * stride_kb + kv_head * stride_kh
    low = start + split * tiles_per_split * BLOCK_N
    high = tl.minimum(low + tiles_per_split * BLOCK_N, end)
    # Up to here every key of a block is visible to every query of the window.
    full = low + tl.maximum(tl.minimum(high, end - WINDOW) - low, 0) // BLOCK_N * BLOCK_N
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for first in range(low, full, BLOCK_N):
        o_key = first + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, o_key, stride_ks, o_key >= 0, HEAD_DIM, BLOCK_D, UPCAST)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_max, b_sum = update_statistics(b_logits, b_max, b_sum)
    for first in range(full, high, BLOCK_N):
        o_key = first + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, o_key, stride_ks, o_key < end, HEAD_DIM, BLOCK_D, UPCAST)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        visible = o_key[None, :] <= o_slot[:, None]
        b_max, b_sum = update_statistics(tl.where(visible, b_logits, float("-inf")), b_max, b_sum)
    o_stat = (problem.to(tl.int64) * row_blocks * BLOCK_M + o_row) * MAX_SPLITS + split
    tl.store(max_ptr + o_stat, b_max)
    tl.store(sum_ptr + o_stat, b_sum)


@triton.jit(do_not_specialize=["first_query", "num_scored", "num_splits", "tiles_per_split"])
def mean_probability_kernel(
    query_ptr, key_ptr, bounds_ptr, max_ptr, sum_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    num_kv_heads, first_query, stat_rows, num_scored, num_splits, tiles_per_split, scores_ptr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean probability that one head's window gives each key of one split."""
    num_heads = num_kv_heads * GROUP
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    kv_head = head // GROUP
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    low = start + tl.program_id(1) * tiles_per_split * BLOCK_N
    high = tl.minimum(low + tiles_per_split * BLOCK_N, end - WINDOW)
    p_scores = scores_ptr + (b * num_heads + head) * num_scored
    if end - WINDOW < tl.maximum(start, first_query):
        high = tl.minimum(low + tiles_per_split * BLOCK_N, num_scored)
        for first in range(low - start, high, BLOCK_N):
            o_key = first + tl.arange(0, BLOCK_N)
            tl.store(p_scores + o_key, float("nan"), mask=o_key < num_scored)
    else:
        p_q = query_ptr + b * stride_qb + head * stride_qh
        p_k = key_ptr + b * stride_kb + kv_head * stride_kh
        o_stat = (b * num_kv_heads + kv_head) * stat_rows + (head % GROUP) * WINDOW_ROWS
        p_max = max_ptr + o_stat * MAX_SPLITS
        p_sum = sum_ptr + o_stat * MAX_SPLITS
        o_entry = tl.arange(0, BLOCK_M)
        b_q = load_rows(p_q, end - WINDOW + o_entry - first_query, stride_qs, o_entry < WINDOW,
                         HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
        b_norm = _log_norm(p_max, p_sum, o_entry, num_splits, WINDOW, MAX_SPLITS)
        for first in range(low, high, BLOCK_N):
            o_key = first + tl.arange(0, BLOCK_N)
            b_k = load_rows(p_k, o_key, stride_ks, o_key < end, HEAD_DIM, BLOCK_D, UPCAST)
            b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2
            b_score = tl.sum(tl.exp2(b_logits - b_norm[None, :]), 1)
            if WINDOW_ROWS > BLOCK_M:  # a wide window's further queries
                for more in range(BLOCK_M, WINDOW_ROWS, BLOCK_M):
                    o_more = more + o_entry
                    b_more = load_rows(p_q, end - WINDOW + o_more - first_query, stride_qs,
                                        o_more < WINDOW, HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
                    b_more_norm = _log_norm(p_max, p_sum, o_more, num_splits, WINDOW, MAX_SPLITS)
                    b_logits = tl.dot(b_k, tl.trans(b_more), input_precision=PRECISION)
                    b_logits = b_logits * scale_log2 - b_more_norm[None, :]
                    b_score += tl.sum(tl.exp2(b_logits), 1)
            tl.store(p_scores + o_key, b_score, mask=o_key < high)


@triton.jit
def _log_norm(p_max, p_sum, o_entry, num_splits, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Base-2 logarithm of each window query's softmax denominator times the window's width."""
    o_split = tl.arange(0, MAX_SPLITS)
    o_stat = o_entry[:, None] * MAX_SPLITS + o_split[None, :]
    mask = (o_entry < WINDOW)[:, None] & (o_split < num_splits)[None, :]
    b_max = tl.load(p_max + o_stat, mask=mask, other=float("-inf"))
    b_sum = tl.load(p_sum + o_stat, mask=mask, other=0.0)
    b_top = tl.max(b_max, 1)
    b_safe = finite_maximum(b_top)
    b_total = tl.sum(b_sum * tl.exp2(b_max - b_safe[:, None]), 1) * WINDOW
    # A row past the window has an infinite denominator: its probabilities are 0.
    return tl.where(o_entry < WINDOW, b_safe + tl.log2(b_total), float("inf"))
