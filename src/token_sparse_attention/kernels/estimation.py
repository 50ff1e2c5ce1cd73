"""What the block patterns estimate with: block means, and the last queries' attention.

Both read query and key in place. The last queries' attention is recomputed rather than stored:
the first pass of the scoring kernels keeps its softmax statistics, and a second pass sums the
probabilities by key and by distance, tile by tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels import scoring
from token_sparse_attention.kernels.scoring import probe_constants, probe_statistics, split_keys
from token_sparse_attention.kernels.softmax import LOG2_E, load_rows, log_denominators


@on_its_device
def block_means(tokens: Tensor, size: int) -> Tensor:
    """Mean of each block of rows, ``[B, H, S, D]`` to ``[B, H, ceil(S / size), D]`` float32."""
    batch_size, num_heads, length, head_dim = tokens.shape
    blocks = triton.cdiv(length, size)
    means = torch.empty(
        batch_size, num_heads, blocks, head_dim, dtype=torch.float32, device=tokens.device
    )
    block_d = triton.next_power_of_2(head_dim)
    block_mean_kernel[(batch_size * num_heads * blocks,)](
        tokens, means, *tokens.stride()[:3], num_heads, blocks, length,
        SIZE=size, HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_S=min(triton.next_power_of_2(size), max(16384 // block_d, 1)),
    )  # fmt: skip
    return means


class Tiles(NamedTuple):
    """Keys per tile and launch options of the second pass; programs wanted per launch."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


def _pick_tiles(dtype: torch.dtype, probe_rows: int, head_dim: int) -> tuple[scoring.Tiles, Tiles]:
    if dtype == torch.float32:
        return scoring.Tiles(32, 32, 4, 2, 264), Tiles(probe_rows, 8, 1, 264)
    stages = 3 if head_dim <= 128 else 2
    return scoring.Tiles(128, 64, 8, stages, 264), Tiles(64, 4, stages, 1056)


@on_its_device
def last_query_mass(
    query: Tensor, key: Tensor, num_probes: int, scale: float, *,
    tiles: tuple[scoring.Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean attention of the last queries by key and by distance back from the query.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D.
        key: ``[B, H_kv, S_kv, D]``, unit stride over D.
        num_probes: how many of the last queries, at most S_q.
        scale: factor of the logits.
        tiles: of the two passes, for tuning.

    Returns:
        Two tensors ``[B, H, S_kv]`` float32; each sums to 1 over its last dimension.
    """
    shape = (*query.shape[:2], key.shape[2])
    masses = torch.zeros(2, *shape, dtype=torch.float32, device=query.device).unbind()
    # More queries fill the registers; the exact products of float32 fill them sooner.
    portion = 32 if query.dtype == torch.float32 else 64
    for later in range(0, num_probes, portion):
        width = min(portion, num_probes - later)
        _add_portion(query, key, masses, later, width, width / num_probes, scale, tiles)
    return masses


def _add_portion(
    query: Tensor, key: Tensor, masses: tuple[Tensor, Tensor], later: int, width: int,
    share: float, scale: float, tiles: tuple[scoring.Tiles, Tiles] | None,
) -> None:  # fmt: skip
    """Add `share` times the mean attention of `width` queries, which `later` queries follow."""
    batch_size, num_heads, query_len, head_dim = query.shape
    end = key.shape[2] - later
    constants = probe_constants(query, width)
    probe_rows = constants["PROBE_ROWS"]
    first, second = tiles or _pick_tiles(query.dtype, probe_rows, head_dim)
    bounds = torch.zeros(batch_size, 2, dtype=torch.int32, device=query.device)
    bounds[:, 1].fill_(end)
    statistics = probe_statistics(query, key, bounds, width, end, scale, first)
    block_n = max(second.block_n, probe_rows)
    mass_splits, tiles_per_split = split_keys(
        end, block_n, batch_size * num_heads, second.programs
    )
    key_distance_kernel[(batch_size * num_heads, mass_splits)](
        query, key, statistics.maximum, statistics.total, *masses, scale * LOG2_E.value, share,
        *query.stride()[:3], *key.stride()[:3], num_heads, num_heads // key.shape[1],
        key.shape[2] - query_len, statistics.maximum.shape[1], end, key.shape[2],
        statistics.num_splits, tiles_per_split, **constants, BLOCK_N=block_n,
        num_warps=second.num_warps, num_stages=second.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "length"])
def block_mean_kernel(
    tokens_ptr, means_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_s: tl.int64,
    num_heads, blocks, length,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean of one block of one head's rows."""
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % num_heads).to(tl.int64)
    b = (tl.program_id(0) // blocks // num_heads).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    begin = block * SIZE
    end = tl.minimum(begin + SIZE, length)
    p_rows = tokens_ptr + b * stride_b + head * stride_h + o_d[None, :]
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, SIZE, BLOCK_S):
        o_slot = begin + first + tl.arange(0, BLOCK_S)
        exists = (o_slot < end) & (first + tl.arange(0, BLOCK_S) < SIZE)
        mask = exists[:, None] & (o_d < HEAD_DIM)[None, :]
        b_rows = tl.load(p_rows + o_slot.to(tl.int64)[:, None] * stride_s, mask=mask, other=0.0)
        b_sum += tl.sum(b_rows.to(tl.float32), 0)
    p_mean = means_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + o_d
    tl.store(p_mean, b_sum / (end - begin), mask=o_d < HEAD_DIM)


@triton.jit(do_not_specialize=["first_query", "end", "kv_len", "num_splits", "tiles_per_split"])
def key_distance_kernel(
    query_ptr, key_ptr, max_ptr, sum_ptr, by_key_ptr, by_distance_ptr, scale_log2, share,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    num_heads, group, first_query, stat_rows, end, kv_len, num_splits, tiles_per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NUM_PROBES: tl.constexpr,
    PROBE_ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the probabilities of one head's probes, over one split of the keys.

    Probe r has slot ``end - NUM_PROBES + r``, so key slot minus r is constant along a diagonal.
    Rotating column r of a tile by r rows puts each diagonal into one row: the entries that did
    not wrap belong to this tile's diagonals, those that did to the previous tile's. A split
    reads one tile more than it owns, to complete its last diagonals.
    """
    b = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    kv_head = head // group
    o_r = tl.arange(0, PROBE_ROWS)
    o_n = tl.arange(0, BLOCK_N)
    o_slot = end - NUM_PROBES + o_r
    p_q = query_ptr + b * stride_qb + head * stride_qh
    p_k = key_ptr + b * stride_kb + kv_head * stride_kh
    b_q = load_rows(
        p_q, o_slot - first_query, stride_qs, o_r < NUM_PROBES, HEAD_DIM, BLOCK_D, UPCAST
    )  # fmt: skip
    num_kv_heads = num_heads // group
    o_stat = (b * num_kv_heads + kv_head) * stat_rows + (head % group) * PROBE_ROWS
    b_norm = log_denominators(
        max_ptr + o_stat * MAX_SPLITS, sum_ptr + o_stat * MAX_SPLITS, o_r,
        num_splits, NUM_PROBES, MAX_SPLITS,
    )  # fmt: skip
    p_by_key = by_key_ptr + (b * num_heads + head) * kv_len
    p_by_distance = by_distance_ptr + (b * num_heads + head) * kv_len
    o_shifted = o_n[:, None] + o_r[None, :]
    wrapped = o_shifted >= BLOCK_N
    o_shifted = tl.where(wrapped, o_shifted - BLOCK_N, o_shifted)
    begin = tl.program_id(1) * tiles_per_split
    last = begin + tiles_per_split
    lowest = tl.where(begin == 0, -BLOCK_N, begin * BLOCK_N)
    b_open = tl.zeros([BLOCK_N], tl.float32)  # the previous tile's diagonals so far
    for tile in range(begin, last + 1):
        o_key = tile * BLOCK_N + o_n
        b_k = load_rows(p_k, o_key, stride_ks, o_key < end, HEAD_DIM, BLOCK_D, UPCAST)
        b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2
        b_probs = tl.exp2(b_logits - b_norm[None, :]) * share
        b_probs = tl.where(o_key[:, None] <= o_slot[None, :], b_probs, 0.0)
        b_own = tl.sum(b_probs, 1)
        b_shifted = tl.gather(b_probs, o_shifted, 0)
        b_done = b_open + tl.sum(tl.where(wrapped, b_shifted, 0.0), 1)
        b_open = tl.sum(tl.where(wrapped, 0.0, b_shifted), 1)
        p_own = p_by_key + o_key
        owned = (o_key < end) & (o_key < last * BLOCK_N)
        tl.store(p_own, tl.load(p_own, mask=owned, other=0.0) + b_own, mask=owned)
        o_distance = end - NUM_PROBES - (o_key - BLOCK_N)
        exists = (o_distance >= 0) & (o_distance < end) & (o_key - BLOCK_N >= lowest)
        p_done = p_by_distance + o_distance
        tl.store(p_done, tl.load(p_done, mask=exists, other=0.0) + b_done, mask=exists)
