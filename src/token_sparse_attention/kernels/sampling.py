"""Sample each head's keys by their scores, one program per head.

The same keys as `attention.far_tokens.draw`, in a few passes over the scores. Keys of inclusion
probability 1 are found without sorting: the keys whose share of the probability exceeds one
sample are taken out, the factor of the other keys grows with what these leave over, and this
repeats until no further key exceeds one sample.
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
    scores: Tensor,
    bounds: Tensor,
    kv_len: int,
    window: int,
    num_samples: int,
    capacity: int,
    excluded: Tensor | None = None,
    budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return slots ``[B, H, capacity]`` int64, ascending, and their weights, float32.

    A key of inclusion probability p has weight 1 / p.

    Args:
        scores: ``[B, H, N]`` float32, by slot, N at most S_kv; further slots score 0.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        kv_len: S_kv, the slot of an entry without a key; its weight is 1.
        window: the last keys of each sequence, as many as this, are not sampled.
        num_samples: how many keys to sample, unless `budgets` is given.
        capacity: entries per head; no more keys than these are returned.
        excluded: ``[B, H, M]`` int64, slots that are not sampled, S_kv for none.
        budgets: ``[B, H]`` float64, how many keys to sample for each head.
    """
    batch_size, num_heads, num_scored = scores.shape
    slots = scores.new_empty(batch_size, num_heads, capacity, dtype=torch.int64)
    weights = scores.new_empty(batch_size, num_heads, capacity)
    allowed = None
    if excluded is not None:
        allowed = scores.new_ones(batch_size, num_heads, kv_len + 1, dtype=torch.int8)
        allowed.scatter_(-1, excluded, 0)
    sample_keys_kernel[(batch_size * num_heads,)](
        scores.contiguous(), allowed, None if budgets is None else budgets.contiguous(), bounds,
        slots, weights, num_heads, num_scored, kv_len, window, num_samples, capacity,
        BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
    return slots, weights


@triton.jit
def _load_block(
    p_scores, p_allowed, begin, stop, num_scored, LISTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block's slots, which of them may be sampled, and their scores, float64."""
    o_slot = begin + tl.arange(0, BLOCK)
    real = o_slot < stop
    if LISTED:
        real = tl.load(p_allowed + o_slot, mask=real, other=0) > 0
    b_score = tl.load(p_scores + o_slot, mask=real & (o_slot < num_scored), other=0.0)
    # Sequences whose scores are not finite run dense, but their slots are read all the same.
    b_score = tl.where(b_score < 1e30, b_score, 0.0)
    return o_slot, real, b_score.to(tl.float64)


@triton.jit(
    do_not_specialize=["num_heads", "num_scored", "kv_len", "window", "num_samples", "capacity"]
)
def sample_keys_kernel(
    scores_ptr, allowed_ptr, budgets_ptr, bounds_ptr, slots_ptr, weights_ptr,
    num_heads, num_scored, kv_len, window, num_samples, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head: sums, keys of probability 1, and equal steps through the probabilities."""
    LISTED: tl.constexpr = allowed_ptr is not None
    head = tl.program_id(0).to(tl.int64)  # of all sequences' heads
    b = head // num_heads
    start = tl.load(bounds_ptr + 2 * b)
    stop = tl.load(bounds_ptr + 2 * b + 1) - window
    p_scores = scores_ptr + head * num_scored
    p_allowed = allowed_ptr
    if LISTED:
        p_allowed += head * (kv_len + 1)
    if budgets_ptr is None:
        budget = num_samples.to(tl.float64)
    else:
        budget = tl.load(budgets_ptr + head)

    b_sum = tl.zeros([BLOCK], tl.float64)
    b_number = tl.zeros([BLOCK], tl.int32)
    for begin in range(start, stop, BLOCK):
        _, real, b_score = _load_block(
            p_scores, p_allowed, begin, stop, num_scored, LISTED, BLOCK
        )  # fmt: skip
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
            _, real, b_score = _load_block(
                p_scores, p_allowed, begin, stop, num_scored, LISTED, BLOCK
            )  # fmt: skip
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
        o_slot, real, b_score = _load_block(
            p_scores, p_allowed, begin, stop, num_scored, LISTED, BLOCK
        )  # fmt: skip
        b_probability = tl.minimum((b_score * by_score + uniform) * factor, 1.0)
        b_units = tl.where(real, b_probability * 4294967296.0 + 0.5, 0.0).to(tl.int64)
        b_after = passed + tl.cumsum(b_units, 0)
        o_entry = (b_after - b_units) >> 32
        sampled = ((b_after >> 32) > o_entry) & (o_entry < capacity)
        tl.store(slots_ptr + head * capacity + o_entry, o_slot.to(tl.int64), mask=sampled)
        b_weight = 4294967296.0 / tl.maximum(b_units, 1).to(tl.float64)
        tl.store(weights_ptr + head * capacity + o_entry, b_weight.to(tl.float32), mask=sampled)
        passed += tl.sum(b_units, 0)
    for begin in range(tl.sum(passed >> 32, 0).to(tl.int32), capacity, BLOCK):
        o_entry = head * capacity + begin + tl.arange(0, BLOCK)
        empty = begin + tl.arange(0, BLOCK) < capacity
        tl.store(slots_ptr + o_entry, kv_len.to(tl.int64), mask=empty)
        tl.store(weights_ptr + o_entry, 1.0, mask=empty)
