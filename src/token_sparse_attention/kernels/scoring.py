"""Score every key by the attention that it gets from the probes: two passes over K.

The probes are the last queries. The first pass keeps online-softmax statistics of each probe,
one pair per split of the keys; the second recomputes the logits and sums each key's
probabilities. The probes of all heads that share a KV head are rows of one problem, so keys are
never repeated, and blocks that read the same keys run side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.softmax import (
    LOG2_E,
    dot_constants,
    load_rows,
    log_denominators,
    update_statistics,
)

_MAX_SPLITS = 64


class Tiles(NamedTuple):
    """Block sizes and launch options of one pass."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


class ProbeStatistics(NamedTuple):
    """Softmax statistics of the probes, a pair for each split of the keys.

    Attributes:
        maximum: ``[B * H_kv, R, splits]`` float32, highest logit, base 2; R counts the probes
            of a KV head's query heads, each head's number padded to a power of two.
        total: ``[B * H_kv, R, splits]`` float32, sum of ``2 ** (logit - maximum)``.
        num_splits: how many entries of the last dimension are set.
    """

    maximum: Tensor
    total: Tensor
    num_splits: int


def _pick_tiles(dtype: torch.dtype, head_dim: int) -> tuple[Tiles, Tiles]:
    """Tiles of the two passes, the fastest of those measured on an H200."""
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, 32, 4, 2, 264), Tiles(32, 32, 4, 2, 264)
    if head_dim > 128:
        return Tiles(128, 64, 8, 2, 264), Tiles(128, 64, 8, 2, 264)
    return Tiles(256, 64, 8, 3, 264), Tiles(128, 64, 4, 4, 264)


@on_its_device
def score_tokens(
    query: Tensor, key: Tensor, bounds: Tensor, num_probes: int, scale: float, *,
    padded: bool, tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:  # fmt: skip
    """Return ``[B, H, S_kv - W]`` float32 scores by slot, W the number of probes.

    The scores of a sequence with fewer than W queries are NaN.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D.
        key: ``[B, H_kv, S_kv, D]``, unit stride over D.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        num_probes: W.
        scale: factor of the logits.
        padded: whether a sequence may have padding, whose scores are 0.
        tiles: of the two passes, for tuning.
    """
    batch_size, num_heads, query_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    num_scored = max(kv_len - num_probes, 0)
    make = torch.zeros if padded else torch.empty
    scores = make(batch_size, num_heads, num_scored, dtype=torch.float32, device=query.device)
    if num_scored == 0:
        return scores
    first, second = tiles or _pick_tiles(query.dtype, head_dim)
    statistics = probe_statistics(query, key, bounds, num_probes, kv_len, scale, first)
    constants = probe_constants(query, num_probes)
    score_splits, tiles_per_split = split_keys(
        num_scored, second.block_n, batch_size * num_heads, second.programs
    )
    mean_probability_kernel[(batch_size * num_heads, score_splits)](
        query, key, bounds, statistics.maximum, statistics.total, scale * LOG2_E.value,
        *query.stride()[:3], *key.stride()[:3], num_kv_heads, kv_len - query_len,
        statistics.maximum.shape[1], num_scored, statistics.num_splits, tiles_per_split, scores,
        GROUP=num_heads // num_kv_heads, **constants,
        BLOCK_M=min(second.block_m, constants["PROBE_ROWS"]), BLOCK_N=second.block_n,
        num_warps=second.num_warps, num_stages=second.num_stages,
    )  # fmt: skip
    return scores


def probe_statistics(
    query: Tensor, key: Tensor, bounds: Tensor, num_probes: int, end: int, scale: float,
    tiles: Tiles,
) -> ProbeStatistics:  # fmt: skip
    """Run the first pass, over the keys before slot `end`; see `score_tokens`."""
    batch_size, num_heads, query_len, _ = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    constants = probe_constants(query, num_probes)
    num_rows = group * constants["PROBE_ROWS"]
    block_m = min(tiles.block_m, triton.next_power_of_2(num_rows))  # may span several heads
    row_blocks = triton.cdiv(num_rows, block_m)
    programs = batch_size * num_kv_heads * row_blocks
    num_splits, tiles_per_split = split_keys(end, tiles.block_n, programs, tiles.programs)
    shape = (2, batch_size * num_kv_heads, row_blocks * block_m, _MAX_SPLITS)
    maximum, total = torch.empty(shape, dtype=torch.float32, device=query.device)
    probe_statistics_kernel[(programs, num_splits)](
        query, key, bounds, maximum, total, scale * LOG2_E.value,
        *query.stride()[:3], *key.stride()[:3], num_kv_heads, key.shape[2] - query_len,
        row_blocks, tiles_per_split, GROUP=group, **constants,
        BLOCK_M=block_m, BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return ProbeStatistics(maximum, total, num_splits)


def probe_constants(query: Tensor, num_probes: int) -> dict[str, Any]:
    """Return the compile-time constants that both passes share."""
    return {
        **dot_constants(query),
        "NUM_PROBES": num_probes,
        "PROBE_ROWS": max(triton.next_power_of_2(num_probes), 16),
        "MAX_SPLITS": _MAX_SPLITS,
    }


def split_keys(length: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Return into how many splits to cut the keys, and how many blocks each split has."""
    blocks = triton.cdiv(length, block)
    splits = max(min(wanted // programs, blocks, _MAX_SPLITS), 1)
    per_split = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, per_split), per_split


@triton.jit(do_not_specialize=["first_query", "tiles_per_split"])
def probe_statistics_kernel(
    query_ptr, key_ptr, bounds_ptr, max_ptr, sum_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    num_kv_heads, first_query, row_blocks, tiles_per_split,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_PROBES: tl.constexpr, PROBE_ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Maximum and sum over one split of the keys, of a block of a KV head's probes."""
    block = tl.program_id(0) % row_blocks
    problem = tl.program_id(0) // row_blocks
    split = tl.program_id(1)
    b = (problem // num_kv_heads).to(tl.int64)
    kv_head = (problem % num_kv_heads).to(tl.int64)
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)

    o_row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_probe = o_row % PROBE_ROWS
    o_slot = end - NUM_PROBES + o_probe
    exists = (o_row < GROUP * PROBE_ROWS) & (o_probe < NUM_PROBES)
    exists = exists & (o_slot >= first_query) & (o_slot >= start)
    head = kv_head * GROUP + o_row // PROBE_ROWS
    p_q = query_ptr + b * stride_qb + head[:, None] * stride_qh
    b_q = load_rows(p_q, o_slot - first_query, stride_qs, exists, HEAD_DIM, BLOCK_D, UPCAST)

    p_k = key_ptr + b * stride_kb + kv_head * stride_kh
    low = start + split * tiles_per_split * BLOCK_N
    high = tl.minimum(low + tiles_per_split * BLOCK_N, end)
    # Up to here every key of a block is visible to every probe.
    full = low + tl.maximum(tl.minimum(high, end - NUM_PROBES) - low, 0) // BLOCK_N * BLOCK_N
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
    NUM_PROBES: tl.constexpr, PROBE_ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean probability that one head's probes give each key of one split."""
    num_heads = num_kv_heads * GROUP
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    kv_head = head // GROUP
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    low = start + tl.program_id(1) * tiles_per_split * BLOCK_N
    high = tl.minimum(low + tiles_per_split * BLOCK_N, end - NUM_PROBES)
    p_scores = scores_ptr + (b * num_heads + head) * num_scored
    if end - NUM_PROBES < tl.maximum(start, first_query):
        high = tl.minimum(low + tiles_per_split * BLOCK_N, num_scored)
        for first in range(low - start, high, BLOCK_N):
            o_key = first + tl.arange(0, BLOCK_N)
            tl.store(p_scores + o_key, float("nan"), mask=o_key < num_scored)
    else:
        p_q = query_ptr + b * stride_qb + head * stride_qh
        p_k = key_ptr + b * stride_kb + kv_head * stride_kh
        o_stat = (b * num_kv_heads + kv_head) * stat_rows + (head % GROUP) * PROBE_ROWS
        p_max = max_ptr + o_stat * MAX_SPLITS
        p_sum = sum_ptr + o_stat * MAX_SPLITS
        o_probe = tl.arange(0, BLOCK_M)
        b_q = load_rows(p_q, end - NUM_PROBES + o_probe - first_query, stride_qs,
                        o_probe < NUM_PROBES, HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
        b_norm = log_denominators(p_max, p_sum, o_probe, num_splits, NUM_PROBES, MAX_SPLITS)
        for first in range(low, high, BLOCK_N):
            o_key = first + tl.arange(0, BLOCK_N)
            b_k = load_rows(p_k, o_key, stride_ks, o_key < end, HEAD_DIM, BLOCK_D, UPCAST)
            b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2
            b_score = tl.sum(tl.exp2(b_logits - b_norm[None, :]), 1)
            if PROBE_ROWS > BLOCK_M:  # the other blocks of probes
                for more in range(BLOCK_M, PROBE_ROWS, BLOCK_M):
                    o_more = more + o_probe
                    b_more = load_rows(p_q, end - NUM_PROBES + o_more - first_query, stride_qs,
                                       o_more < NUM_PROBES, HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
                    b_more_norm = log_denominators(
                        p_max, p_sum, o_more, num_splits, NUM_PROBES, MAX_SPLITS
                    )  # fmt: skip
                    b_logits = tl.dot(b_k, tl.trans(b_more), input_precision=PRECISION)
                    b_logits = b_logits * scale_log2 - b_more_norm[None, :]
                    b_score += tl.sum(tl.exp2(b_logits), 1)
            tl.store(p_scores + o_key, b_score, mask=o_key < high)
