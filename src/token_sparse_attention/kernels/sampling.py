"""Sample each head's keys by their scores, one program per head.

The same keys as `methods.sampling.sample_keys`, in a few passes over the scores. Keys of
inclusion probability 1 are found without sorting: the keys whose share of the probability
exceeds one sample are taken out, the factor of the other keys grows with what these leave over,
and this repeats until no further key exceeds one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device

_BLOCK = 8192  # keys per iteration; with 16 warps the fastest of those measured on an H200


@on_its_device
def sample_keys(
    scores: Tensor, bounds: Tensor, kv_len: int, window: int, num_samples: int, capacity: int,
    sink_size: int = 0, budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return each head's sinks and samples, and whether its scores are finite.

    Args:
        scores: ``[B, H, N]`` float32, by slot, N at most S_kv; further slots score 0.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        kv_len: S_kv, the slot of an entry without a key; its weight is 1.
        window: the last keys of each sequence, as many as this, are not sampled.
        num_samples: how many keys to sample, unless `budgets` is given.
        capacity: entries for samples per head; no more are returned.
        sink_size: the first keys, as many as this, are the first entries and not sampled.
        budgets: ``[B, H]`` float64, how many keys to sample for each head.

    Returns:
        Slots ``[B, H, sink_size + capacity]`` int32, ascending; their weights, float32, 1 / p
        for a key of inclusion probability p; ``[B, H]`` bool.
    """
    batch_size, num_heads, num_scored = scores.shape
    entries = sink_size + capacity
    slots = scores.new_empty(batch_size, num_heads, entries, dtype=torch.int32)
    weights = scores.new_empty(batch_size, num_heads, entries)
    finite = scores.new_empty(batch_size, num_heads, dtype=torch.bool)
    sample_keys_kernel[(batch_size * num_heads,)](
        scores.contiguous(), None if budgets is None else budgets.contiguous(), bounds,
        slots, weights, finite, num_heads, num_scored, kv_len, window, num_samples, capacity,
        sink_size, BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
    return slots, weights, finite


@triton.jit
def _load_block(p_scores, begin, stop, num_scored, BLOCK: tl.constexpr):
    """A block's slots, which of them may be sampled, and their scores, float64."""
    o_slot = begin + tl.arange(0, BLOCK)
    real = o_slot < stop
    b_score = tl.load(p_scores + o_slot, mask=real & (o_slot < num_scored), other=0.0)
    # Sequences whose scores are not finite run dense, but their slots are read all the same.
    b_score = tl.where(b_score < 1e30, b_score, 0.0)
    return o_slot, real, b_score.to(tl.float64)


@triton.jit
def _all_finite(p_scores, start, end, num_scored, BLOCK: tl.constexpr):
    """Whether a head's scores are finite; all are at least 0, so none cancel in their sum."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for begin in range(start, tl.minimum(end, num_scored), BLOCK):
        o_slot = begin + tl.arange(0, BLOCK)
        b_sum += tl.load(p_scores + o_slot, mask=o_slot < tl.minimum(end, num_scored), other=0.0)
    return tl.sum(b_sum, 0) < float("inf")


@triton.jit(
    do_not_specialize=[
        "num_heads", "num_scored", "kv_len", "window", "num_samples", "capacity", "sink_size",
    ]
)  # fmt: skip
def sample_keys_kernel(
    scores_ptr, budgets_ptr, bounds_ptr, slots_ptr, weights_ptr, finite_ptr,
    num_heads, num_scored, kv_len, window, num_samples, capacity, sink_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head: sums, keys of probability 1, and equal steps through the probabilities."""
    head = tl.program_id(0).to(tl.int64)  # of all sequences' heads
    b = head // num_heads
    first = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    start = tl.minimum(first + sink_size, end)
    stop = end - window
    p_scores = scores_ptr + head * num_scored
    tl.store(finite_ptr + head, _all_finite(p_scores, first, end, num_scored, BLOCK))
    p_slots = slots_ptr + head * (sink_size + capacity)
    p_weights = weights_ptr + head * (sink_size + capacity)
    for begin in range(0, sink_size, BLOCK):
        o_entry = begin + tl.arange(0, BLOCK)
        b_sink = tl.where(first + o_entry < end, first + o_entry, kv_len)
        tl.store(p_slots + o_entry, b_sink, mask=o_entry < sink_size)
        tl.store(p_weights + o_entry, 1.0, mask=o_entry < sink_size)
    p_slots += sink_size
    p_weights += sink_size
    if budgets_ptr is None:
        budget = num_samples.to(tl.float64)
    else:
        budget = tl.load(budgets_ptr + head)

    b_sum = tl.zeros([BLOCK], tl.float64)
    b_number = tl.zeros([BLOCK], tl.int32)
    for begin in range(start, stop, BLOCK):
        _, real, b_score = _load_block(p_scores, begin, stop, num_scored, BLOCK)
        b_sum += b_score
        b_number += real.to(tl.int32)
    total = tl.sum(b_sum, 0)
    number = tl.sum(b_number, 0).to(tl.float64)
    # Half of the probability is in proportion to the scores, half is uniform.
    by_score = 1.0 / tl.maximum(total, 1e-30)
    uniform = 1.0 / tl.maximum(number, 1.0)
    both = tl.maximum(total * by_score + number * uniform, 1e-30)
    by_score = by_score / both
    uniform = uniform / both

    factor = budget
    certain = 0
    more = stop > start
    while more:
        b_mass = tl.zeros([BLOCK], tl.float64)
        b_certain = tl.zeros([BLOCK], tl.int32)
        for begin in range(start, stop, BLOCK):
            _, real, b_score = _load_block(p_scores, begin, stop, num_scored, BLOCK)
            b_share = b_score * by_score + uniform
            inside = real & (b_share * factor >= 1.0)
            b_mass += tl.where(inside, b_share, 0.0)
            b_certain += inside.to(tl.int32)
        found = tl.sum(b_certain, 0)
        more = found > certain
        certain = found
        rest = tl.maximum(1.0 - tl.sum(b_mass, 0), 1e-12)
        factor = tl.maximum(factor, (budget - certain) / rest)

    # In units of 2^-32: integers add up to the same sum in any order. A key is sampled where
    # the sum passes a half, one and a half, and so on.
    passed = tl.zeros([1], tl.int64) + 2147483648
    for begin in range(start, stop, BLOCK):
        o_slot, real, b_score = _load_block(p_scores, begin, stop, num_scored, BLOCK)
        b_probability = tl.minimum((b_score * by_score + uniform) * factor, 1.0)
        b_units = tl.where(real, b_probability * 4294967296.0 + 0.5, 0.0).to(tl.int64)
        b_after = passed + tl.cumsum(b_units, 0)
        o_entry = (b_after - b_units) >> 32
        sampled = ((b_after >> 32) > o_entry) & (o_entry < capacity)
        tl.store(p_slots + o_entry, o_slot, mask=sampled)
        b_weight = 4294967296.0 / tl.maximum(b_units, 1).to(tl.float64)
        tl.store(p_weights + o_entry, b_weight.to(tl.float32), mask=sampled)
        passed += tl.sum(b_units, 0)
    for begin in range(tl.sum(passed >> 32, 0).to(tl.int32), capacity, BLOCK):
        o_entry = begin + tl.arange(0, BLOCK)
        tl.store(p_slots + o_entry, kv_len, mask=o_entry < capacity)
        tl.store(p_weights + o_entry, 1.0, mask=o_entry < capacity)
