"""Score the keys before each block of queries by the probes of the block before it.

Three launches: softmax statistics of every probe, a pair for each split of the keys; their
combination into one denominator per probe; and the mean probability of every key. The probes of
block after block, and within a block of the heads that share a KV head, are the rows of one
problem, cut into tiles that several blocks may share: keys are read once for a tile. Splits have
a fixed size and begin at fixed positions, so a score depends on nothing but its probes and keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.blocks import Blocks
from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.softmax import (
    LOG2_E,
    dot_constants,
    finite_maximum,
    load_rows,
    update_statistics,
)


class Tiles(NamedTuple):
    """Block sizes and launch options of one pass: rows of probes, keys, and keys of a split."""

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int


_COMBINED = 64  # probes per program that combines statistics


def pick_tiles(dtype: torch.dtype, head_dim: int) -> tuple[Tiles, Tiles]:
    """Return the tiles of the two passes over the keys."""
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, 32, 4096, 4, 2), Tiles(32, 32, 4096, 4, 2)
    if head_dim > 128:
        return Tiles(128, 64, 4096, 8, 2), Tiles(128, 64, 4096, 8, 2)
    return Tiles(128, 64, 4096, 8, 3), Tiles(128, 64, 4096, 4, 3)


@on_its_device
def score_blocks(
    probes: Tensor, valid: Tensor | None, key: Tensor, bounds: Tensor, blocks: Blocks,
    scale: float, tiles: tuple[Tiles, Tiles] | None = None,
) -> Tensor:  # fmt: skip
    """Return the scores of all blocks' keys, ``[B, H, blocks.num_scores]`` float32.

    The score of the key at position j of block i, at ``blocks.offset(i) + j``, is the mean of the
    probabilities that the block's probes give it, each by a softmax over the keys up to its own.
    The scores of a block that begins at or behind a sequence's end are not written.

    Args:
        probes: ``[B, H, num_blocks * W, D]``, unit stride over D; probe t of a sequence stands
            at position ``(blocks.first - 1) * C + (t + 1) * blocks.stride - 1``.
        valid: ``[B, num_blocks * W]`` bool, which probes there are; the others give every key
            a probability of 0, and may hold anything. None if there are all.
        key: ``[B, H_kv, S_kv, D]``, unit stride over D.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        blocks: the blocks.
        scale: factor of the logits.
        tiles: of the two passes over the keys, for tuning.
    """
    batch_size, num_heads, num_probes, head_dim = probes.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    num_rows = num_probes * group
    num_scores = blocks.num_scores
    scores = probes.new_empty(batch_size, num_heads, num_scores, dtype=torch.float32)
    if not num_scores:
        return scores
    first, second = tiles or pick_tiles(probes.dtype, head_dim)
    problems = batch_size * num_kv_heads
    longest = blocks.first_reach + (blocks.num_blocks - 1) * blocks.size
    # Ceilings by hand: Triton's own functions cost the host more than a launch.
    num_splits = -(-((blocks.first + blocks.num_blocks - 1) * blocks.size) // first.split)
    # An allocation for each: kernels are compiled anew for pointers of another alignment.
    maximum = scores.new_empty(problems, num_splits, num_rows)
    total = torch.empty_like(maximum)
    norms = scores.new_empty(problems, num_rows)
    inputs = (probes, key, bounds, scale * LOG2_E.value, *probes.stride()[:3], *key.stride()[:3])
    counts = (num_kv_heads, blocks.first, blocks.num_blocks)
    shape = {"GROUP": group, "NUM_PROBES": blocks.num_probes, "BLOCK_SIZE": blocks.size}
    constants = shape | dot_constants(probes)
    block_statistics_kernel[(-(-num_rows // first.block_m), num_splits, problems)](
        *inputs, *counts, maximum, total, **constants, **_launch(first)
    )
    block_norms_kernel[(-(-num_rows // _COMBINED), problems)](
        maximum, total, None if valid is None else valid.contiguous(), bounds, *counts,
        num_splits, norms,
        **shape, SPLIT=first.split, BLOCK_M=_COMBINED,
    )  # fmt: skip
    tiles_of_rows = -(-num_rows // max(second.block_m, blocks.num_probes))
    block_scores_kernel[(tiles_of_rows, -(-longest // second.split), problems)](
        *inputs, *counts, norms, blocks.first_reach, num_scores, scores,
        **constants, **_launch(second),
    )  # fmt: skip
    return scores


@functools.cache
def _launch(tiles: Tiles) -> dict[str, int]:
    """Return the compile-time constants and launch options of a pass."""
    return {
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "SPLIT": tiles.split,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip


@triton.jit
def _count_present(bounds_ptr, b, first, count, BLOCK_SIZE: tl.constexpr):
    """How many of the blocks begin before a sequence's end."""
    length = tl.load(bounds_ptr + 2 * b + 1) - tl.load(bounds_ptr + 2 * b)
    return tl.minimum((length + BLOCK_SIZE - 1) // BLOCK_SIZE - first, count)


@triton.jit
def _probe_positions(
    o_row, first, GROUP: tl.constexpr, NUM_PROBES: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Where the probes of some rows stand."""
    o_block = o_row // (NUM_PROBES * GROUP)
    o_probe = o_row % NUM_PROBES
    return (first - 1 + o_block) * BLOCK_SIZE + (o_probe + 1) * (BLOCK_SIZE // NUM_PROBES) - 1


@triton.jit
def _load_probes(
    p_probes, stride_ph: tl.int64, stride_ps: tl.int64, o_row, exists,
    GROUP: tl.constexpr, NUM_PROBES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The probes ``[rows, BLOCK_D]`` of the heads that share a KV head, block after block."""
    o_head = o_row // NUM_PROBES % GROUP
    o_probe = o_row // (NUM_PROBES * GROUP) * NUM_PROBES + o_row % NUM_PROBES
    p_rows = p_probes + o_head.to(tl.int64)[:, None] * stride_ph
    return load_rows(p_rows, o_probe, stride_ps, exists, HEAD_DIM, BLOCK_D, UPCAST)


@triton.jit(do_not_specialize=["first", "count"])
def block_statistics_kernel(
    probes_ptr, key_ptr, bounds_ptr, scale_log2,
    stride_pb: tl.int64, stride_ph: tl.int64, stride_ps: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    num_kv_heads, first, count, max_ptr, sum_ptr,
    GROUP: tl.constexpr, NUM_PROBES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Maximum and sum over one split of the keys, of one tile of a KV head's probes."""
    ROWS: tl.constexpr = NUM_PROBES * GROUP  # of a block
    b = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    present = _count_present(bounds_ptr, b, first, count, BLOCK_SIZE)
    first_row = tl.program_id(0) * BLOCK_M
    last_block = tl.minimum((first_row + BLOCK_M - 1) // ROWS, present - 1)
    low = tl.program_id(1) * SPLIT
    high = tl.minimum(low + SPLIT, (first + last_block) * BLOCK_SIZE)
    if (first_row < present * ROWS) & (low < high):
        o_row = first_row + tl.arange(0, BLOCK_M)
        exists = o_row < present * ROWS
        p_probes = probes_ptr + b * stride_pb + kv_head * GROUP * stride_ph
        b_q = _load_probes(p_probes, stride_ph, stride_ps, o_row, exists,
                           GROUP, NUM_PROBES, HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
        o_position = _probe_positions(o_row, first, GROUP, NUM_PROBES, BLOCK_SIZE)
        p_k = key_ptr + b * stride_kb + kv_head * stride_kh
        p_k += tl.load(bounds_ptr + 2 * b).to(tl.int64) * stride_ks
        # Up to here every key of a tile is visible to every probe; the first one sees least.
        visible_to_all = _probe_positions(first_row, first, GROUP, NUM_PROBES, BLOCK_SIZE) + 1
        full = low + tl.maximum(tl.minimum(high, visible_to_all) - low, 0) // BLOCK_N * BLOCK_N
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        for begin in range(low, full, BLOCK_N):
            o_key = begin + tl.arange(0, BLOCK_N)
            b_k = load_rows(p_k, o_key, stride_ks, o_key >= 0, HEAD_DIM, BLOCK_D, UPCAST)
            b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
            b_max, b_sum = update_statistics(b_logits, b_max, b_sum)
        for begin in range(full, high, BLOCK_N):
            o_key = begin + tl.arange(0, BLOCK_N)
            b_k = load_rows(p_k, o_key, stride_ks, o_key < high, HEAD_DIM, BLOCK_D, UPCAST)
            b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
            visible = (o_key[None, :] <= o_position[:, None]) & (o_key < high)[None, :]
            b_logits = tl.where(visible, b_logits, float("-inf"))
            b_max, b_sum = update_statistics(b_logits, b_max, b_sum)
        o_stat = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        o_stat = o_stat * (count * ROWS) + o_row
        tl.store(max_ptr + o_stat, b_max, mask=exists)
        tl.store(sum_ptr + o_stat, b_sum, mask=exists)


@triton.jit(
    do_not_specialize=["first", "count", "num_splits"],
    do_not_specialize_on_alignment=["valid_ptr"],  # of a part of the blocks: any
)
def block_norms_kernel(
    max_ptr, sum_ptr, valid_ptr, bounds_ptr, num_kv_heads, first, count, num_splits, norms_ptr,
    GROUP: tl.constexpr, NUM_PROBES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Base-2 logarithm of each probe's softmax denominator times the number of probes.

    It is infinite for a probe that is not valid: its probabilities are 0.
    """
    ROWS: tl.constexpr = NUM_PROBES * GROUP
    problem = tl.program_id(1).to(tl.int64)
    b = problem // num_kv_heads
    present = _count_present(bounds_ptr, b, first, count, BLOCK_SIZE)
    first_row = tl.program_id(0) * BLOCK_M
    if first_row < present * ROWS:
        o_row = first_row + tl.arange(0, BLOCK_M)
        o_block = o_row // ROWS
        exists = o_row < present * ROWS
        splits = ((first + o_block) * BLOCK_SIZE + SPLIT - 1) // SPLIT
        splits = tl.where(exists, splits, 0)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        for split in range(tl.max(splits, 0)):
            o_stat = (problem * num_splits + split) * (count * ROWS) + o_row
            b_one = tl.load(max_ptr + o_stat, mask=split < splits, other=float("-inf"))
            b_new = tl.maximum(b_max, b_one)
            b_safe = finite_maximum(b_new)
            b_add = tl.load(sum_ptr + o_stat, mask=split < splits, other=0.0)
            b_sum = b_sum * tl.exp2(b_max - b_safe) + b_add * tl.exp2(b_one - b_safe)
            b_max = b_new
        b_norm = finite_maximum(b_max) + tl.log2(b_sum * NUM_PROBES)
        if valid_ptr is not None:
            o_probe = o_block * NUM_PROBES + o_row % NUM_PROBES
            p_valid = valid_ptr + b * (count * NUM_PROBES) + o_probe
            b_norm = tl.where(tl.load(p_valid, mask=exists, other=0), b_norm, float("inf"))
        tl.store(norms_ptr + problem * (count * ROWS) + o_row, b_norm, mask=exists)


@triton.jit
def _load_normed_probes(
    p_probes, stride_ph: tl.int64, stride_ps: tl.int64, p_norms, first_row, num_rows, first,
    GROUP: tl.constexpr, NUM_PROBES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of probes, their denominators, and their positions."""
    o_row = first_row + tl.arange(0, BLOCK_M)
    b_norm = tl.load(p_norms + o_row, mask=o_row < num_rows, other=float("inf"))
    b_q = _load_probes(p_probes, stride_ph, stride_ps, o_row, b_norm != float("inf"),
                       GROUP, NUM_PROBES, HEAD_DIM, BLOCK_D, UPCAST)  # fmt: skip
    return b_q, b_norm, _probe_positions(o_row, first, GROUP, NUM_PROBES, BLOCK_SIZE)


@triton.jit
def _sum_probabilities(
    b_k, b_q, b_norm, o_key, o_position, scale_log2,
    MASKED: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the probes of each head give each key of a tile, ``[keys, HEADS]``."""
    b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2
    b_share = tl.exp2(b_logits - b_norm[None, :])
    if MASKED:
        b_share = tl.where(o_key[:, None] <= o_position[None, :], b_share, 0.0)
    return tl.sum(tl.reshape(b_share, [b_k.shape[0], HEADS, b_q.shape[0] // HEADS]), 2)


@triton.jit(do_not_specialize=["first", "count", "first_reach", "num_scores"])
def block_scores_kernel(
    probes_ptr, key_ptr, bounds_ptr, scale_log2,
    stride_pb: tl.int64, stride_ph: tl.int64, stride_ps: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    num_kv_heads, first, count, norms_ptr, first_reach, num_scores: tl.int64, scores_ptr,
    GROUP: tl.constexpr, NUM_PROBES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Mean probability that a tile of probes gives each key of one split: some heads' scores.

    The heads count block after block. A head with more probes than a tile has rows is taken in
    several parts.
    """
    ROWS: tl.constexpr = NUM_PROBES * GROUP
    PARTS: tl.constexpr = (NUM_PROBES + BLOCK_M - 1) // BLOCK_M
    HEADS: tl.constexpr = PARTS * BLOCK_M // NUM_PROBES
    b = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    present = _count_present(bounds_ptr, b, first, count, BLOCK_SIZE)
    first_row = tl.program_id(0) * (PARTS * BLOCK_M)
    last_block = tl.minimum((first_row + PARTS * BLOCK_M - 1) // ROWS, present - 1)
    low = tl.program_id(1) * SPLIT
    high = tl.minimum(low + SPLIT, first_reach + last_block * BLOCK_SIZE)
    if (first_row < present * ROWS) & (low < high):
        p_norms = norms_ptr + tl.program_id(2).to(tl.int64) * (count * ROWS)
        p_probes = probes_ptr + b * stride_pb + kv_head * GROUP * stride_ph
        b_q, b_norm, o_position = _load_normed_probes(
            p_probes, stride_ph, stride_ps, p_norms, first_row, present * ROWS, first,
            GROUP, NUM_PROBES, BLOCK_SIZE, HEAD_DIM, BLOCK_D, UPCAST, BLOCK_M,
        )  # fmt: skip
        p_k = key_ptr + b * stride_kb + kv_head * stride_kh
        p_k += tl.load(bounds_ptr + 2 * b).to(tl.int64) * stride_ks
        o_head = first_row // NUM_PROBES + tl.arange(0, HEADS)
        o_block = (o_head // GROUP).to(tl.int64)
        o_scores = ((b * num_kv_heads + kv_head) * GROUP + o_head % GROUP) * num_scores
        o_scores += o_block * first_reach + BLOCK_SIZE * (o_block * (o_block - 1) // 2)
        p_scores = scores_ptr + o_scores[None, :]
        reach = tl.where(o_block < present, first_reach + o_block * BLOCK_SIZE, 0)[None, :]
        # Up to here every key of a tile is visible to every probe; the first one sees least.
        visible_to_all = _probe_positions(first_row, first, GROUP, NUM_PROBES, BLOCK_SIZE) + 1
        full = low
        if PARTS == 1:
            full += tl.maximum(tl.minimum(high, visible_to_all) - low, 0) // BLOCK_N * BLOCK_N
        for begin in range(low, full, BLOCK_N):
            o_key = begin + tl.arange(0, BLOCK_N)
            b_k = load_rows(p_k, o_key, stride_ks, o_key >= 0, HEAD_DIM, BLOCK_D, UPCAST)
            b_score = _sum_probabilities(
                b_k, b_q, b_norm, o_key, o_position, scale_log2, False, HEADS, PRECISION
            )  # fmt: skip
            tl.store(p_scores + o_key[:, None], b_score, mask=o_key[:, None] < reach)
        for begin in range(full, high, BLOCK_N):
            o_key = begin + tl.arange(0, BLOCK_N)
            b_k = load_rows(p_k, o_key, stride_ks, o_key < high, HEAD_DIM, BLOCK_D, UPCAST)
            b_score = _sum_probabilities(
                b_k, b_q, b_norm, o_key, o_position, scale_log2, True, HEADS, PRECISION
            )  # fmt: skip
            for part in tl.static_range(1, PARTS):
                b_more, b_more_norm, o_more = _load_normed_probes(
                    p_probes, stride_ph, stride_ps, p_norms, first_row + part * BLOCK_M,
                    present * ROWS, first, GROUP, NUM_PROBES, BLOCK_SIZE, HEAD_DIM, BLOCK_D,
                    UPCAST, BLOCK_M,
                )  # fmt: skip
                b_score += _sum_probabilities(
                    b_k, b_more, b_more_norm, o_key, o_more, scale_log2, True, HEADS, PRECISION
                )  # fmt: skip
            tl.store(p_scores + o_key[:, None], b_score, mask=o_key[:, None] < reach)
