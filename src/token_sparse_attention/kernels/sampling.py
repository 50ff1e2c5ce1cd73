"""Sample each head's keys for each block of queries by their scores, one program per block.

A few passes over the scores. Keys of inclusion probability 1 are found without sorting: the keys
whose share of the probability exceeds one sample are taken out, and the factor of the other keys
grows with what these leave over. This repeats until no further key exceeds one sample, but a few
times at most: keys that still exceed it then count as certain, and a few samples are saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.blocks import FACTOR_STEPS, GOLDEN, UNIT_BITS, Blocks
from token_sparse_attention.device import on_its_device

_BLOCK = 2048  # keys per iteration; their units add up in 32 bits
_WARPS = 8
_GOLDEN = tl.constexpr(GOLDEN)
_FACTOR_STEPS = tl.constexpr(FACTOR_STEPS)
_UNIT_BITS = tl.constexpr(UNIT_BITS)
_INSIDE = tl.constexpr(2**UNIT_BITS - 1)
_POINT_BITS = tl.constexpr(32 - UNIT_BITS)
_UNITS = tl.constexpr(2.0**UNIT_BITS)
_WHOLE = tl.constexpr(2**UNIT_BITS)
_ROUNDING = tl.constexpr(2.0**52)  # added, it leaves a whole number in the low bits


@on_its_device
def sample_blocks(
    scores: Tensor, bounds: Tensor, blocks: Blocks, num_samples: int, capacity: int,
    budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return each block's entries, sinks and samples.

    Args:
        scores: ``[B, H, blocks.num_scores]`` float32, as `score_blocks` returns them.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        blocks: the blocks.
        num_samples: how many keys to sample, unless `budgets` is given.
        capacity: room for samples; a block has no more.
        budgets: ``[B, H, blocks.num_blocks]`` float64, how many keys to sample.

    Returns:
        Slots ``[B, H, blocks.num_blocks, sink_size + capacity]`` int32, ascending; base-2
        logarithms of their weights, float32; and the number of entries, ``[B, H,
        blocks.num_blocks]`` int32, 0 for a block that begins at or behind a sequence's end.
        Nothing is written behind the last entry. Where a score is not finite, the first entry's
        weight is NaN.
    """
    batch_size, num_heads, _ = scores.shape
    shape = (batch_size, num_heads, blocks.num_blocks)
    entries = blocks.sink_size + capacity
    slots = scores.new_empty(*shape, entries, dtype=torch.int32)
    log_weights = scores.new_empty(*shape, entries)
    counts = scores.new_empty(shape, dtype=torch.int32)
    if counts.numel():
        sample_blocks_kernel[(batch_size * num_heads, blocks.num_blocks)](
            scores.contiguous(), None if budgets is None else budgets.contiguous(), bounds,
            slots, log_weights, counts, num_heads, scores.shape[2], blocks.first,
            blocks.first_reach, num_samples, capacity, blocks.sink_size,
            BLOCK_SIZE=blocks.size, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return slots, log_weights, counts


@triton.jit
def _load_scores(p_scores, begin, reach, BLOCK: tl.constexpr):
    """The scores of a tile, 0 behind the last; loops load theirs a tile ahead."""
    o_key = begin + tl.arange(0, BLOCK)
    return tl.load(p_scores + o_key, mask=o_key < reach, other=0.0)


@triton.jit
def _add_scores(p_scores, sink_size, reach, BLOCK: tl.constexpr):
    """The sum of the scores behind the sinks, and the highest; no number if one is not finite."""
    b_sum = tl.zeros([BLOCK], tl.float64)
    b_best = tl.zeros([BLOCK], tl.float32)
    b_next = _load_scores(p_scores, 0, reach, BLOCK)
    for begin in range(0, reach, BLOCK):
        b_score = b_next
        b_next = _load_scores(p_scores, begin + BLOCK, reach, BLOCK)
        o_key = begin + tl.arange(0, BLOCK)
        b_score = tl.where((o_key < sink_size) & (b_score < float("inf")), 0.0, b_score)
        b_sum += b_score.to(tl.float64)
        b_best = tl.maximum(b_best, b_score)
    return tl.sum(b_sum, 0), tl.max(b_best, 0)


@triton.jit
def _find_factor(p_scores, low, reach, by_score, uniform, best, budget, BLOCK: tl.constexpr):
    """The factor by which the shares, each at most 1, add up to the budget, or nearly so."""
    factor = budget
    if budget >= (reach - low).to(tl.float64):
        factor += float("inf")  # all keys are certain
    more = (best * factor >= 1.0) & (factor < float("inf"))
    steps = 0
    while more & (steps < _FACTOR_STEPS):
        b_mass = tl.zeros([BLOCK], tl.float64)
        b_certain = tl.zeros([BLOCK], tl.int32)
        b_best = tl.zeros([BLOCK], tl.float64)
        b_next = _load_scores(p_scores, low, reach, BLOCK)
        for begin in range(low, reach, BLOCK):
            b_score = b_next
            b_next = _load_scores(p_scores, begin + BLOCK, reach, BLOCK)
            real = begin + tl.arange(0, BLOCK) < reach
            b_share = b_score.to(tl.float64) * by_score + uniform
            inside = real & (b_share * factor >= 1.0)
            b_mass += tl.where(inside, b_share, 0.0)
            b_certain += inside.to(tl.int32)
            b_best = tl.maximum(b_best, tl.where(real & ~inside, b_share, 0.0))
        rest = tl.maximum(1.0 - tl.sum(b_mass, 0), 1e-12)
        factor = tl.maximum(factor, (budget - tl.sum(b_certain, 0)) / rest)
        more = tl.max(b_best, 0) * factor >= 1.0
        steps += 1
    return factor


@triton.jit
def _count_points(cells, b_units):
    """How many points lie up to a number of units behind a number of cells, one in each cell.

    A cell is 2^18 units wide. The points' places in their cells are a low-discrepancy sequence.
    """
    b_cell = cells + (b_units >> _UNIT_BITS)
    b_point = ((b_cell + 1).to(tl.uint32) * _GOLDEN) >> _POINT_BITS
    b_inside = b_units & _INSIDE
    return b_cell + (b_inside > b_point.to(tl.int32)).to(tl.int32)


@triton.jit
def _sample(
    p_scores, p_slots, p_weights, start, low, reach, by_score, uniform, factor, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the certain keys, and those at which the others' cumulative units pass a point.

    Whole units of 2^-18 add up to the same sum in any order.
    """
    slope = by_score * factor * _UNITS
    offset = uniform * factor * _UNITS
    if factor == float("inf"):  # all keys are certain
        slope = 0.0 * uniform
        offset = slope + _UNITS
    cells = low * 0  # that are passed, and the units passed in the next one
    inside = low * 0
    found = low * 0
    b_next = _load_scores(p_scores, low, reach, BLOCK)
    for begin in range(low, reach, BLOCK):
        b_score = b_next
        b_next = _load_scores(p_scores, begin + BLOCK, reach, BLOCK)
        o_key = begin + tl.arange(0, BLOCK)
        real = o_key < reach
        b_rounded = tl.minimum(b_score.to(tl.float64) * slope + offset, _UNITS) + _ROUNDING
        b_units = b_rounded.to(tl.int64, bitcast=True).to(tl.int32)
        certain = real & (b_units >= _WHOLE)
        b_units = tl.where(real & (b_units < _WHOLE), b_units, 0)
        b_after = inside + tl.cumsum(b_units, 0)
        b_hits = _count_points(cells, b_after) - _count_points(cells, b_after - b_units)
        taken = (certain | (b_hits > 0)).to(tl.int32)
        o_entry = found + tl.cumsum(taken, 0) - taken
        stored = (taken > 0) & (o_entry < capacity)
        tl.store(p_slots + o_entry, start + o_key, mask=stored)
        b_weight = (b_hits - 1).to(tl.float32) - tl.log2(b_units.to(tl.float32) / _UNITS)
        tl.store(p_weights + o_entry, tl.where(certain, 0.0, b_weight), mask=stored)
        inside += tl.sum(b_units, 0)
        cells += inside >> _UNIT_BITS
        inside = inside & _INSIDE
        found += tl.sum(taken, 0)
    return tl.minimum(found, capacity)


@triton.jit(
    do_not_specialize=[
        "num_heads", "num_scores", "first", "first_reach", "num_samples", "capacity", "sink_size",
    ]
)  # fmt: skip
def sample_blocks_kernel(
    scores_ptr, budgets_ptr, bounds_ptr, slots_ptr, log_weights_ptr, counts_ptr,
    num_heads, num_scores: tl.int64, first, first_reach, num_samples, capacity,
    sink_size, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head's keys of one block: sums, keys of probability 1, and points passed."""
    head = tl.program_id(0).to(tl.int64)  # of all sequences' heads
    index = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)  # the longest runs first
    problem = head * tl.num_programs(1) + index
    b = head // num_heads
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    entries = sink_size + capacity
    p_slots = slots_ptr + problem * entries
    p_weights = log_weights_ptr + problem * entries
    count = 0
    if end - start > (first + index) * BLOCK_SIZE:
        reach = first_reach + index.to(tl.int32) * BLOCK_SIZE
        p_scores = scores_ptr + head * num_scores
        p_scores += index * first_reach + BLOCK_SIZE * (index * (index - 1) // 2)
        count += sink_size
        total, best = _add_scores(p_scores, sink_size, reach, BLOCK)
        finite = total < float("inf")
        shown = tl.where(finite, 0.0, float("nan"))
        for begin in range(0, sink_size, BLOCK):
            o_entry = begin + tl.arange(0, BLOCK)
            tl.store(p_slots + o_entry, start + o_entry, mask=o_entry < sink_size)
            tl.store(p_weights + o_entry, shown, mask=o_entry < sink_size)
        number = reach - sink_size
        if finite & (number > 0):
            if budgets_ptr is None:
                budget = num_samples.to(tl.float64)
            else:
                budget = tl.load(budgets_ptr + problem)
            # Half of the probability is in proportion to the scores, half is uniform.
            by_score = 1.0 / tl.maximum(total, 1e-30)
            uniform = 1.0 / number.to(tl.float64)
            both = total * by_score + number * uniform
            by_score = by_score / both
            uniform = uniform / both
            best_share = best.to(tl.float64) * by_score + uniform
            factor = _find_factor(
                p_scores, sink_size, reach, by_score, uniform, best_share, budget, BLOCK
            )  # fmt: skip
            count += _sample(
                p_scores, p_slots + sink_size, p_weights + sink_size, start, sink_size, reach,
                by_score, uniform, factor, capacity, BLOCK,
            )  # fmt: skip
        if (finite == 0) & (sink_size == 0) & (entries > 0):
            tl.store(p_slots, start)
            tl.store(p_weights, float("nan"))
            count += 1
    tl.store(counts_ptr + problem, count)
