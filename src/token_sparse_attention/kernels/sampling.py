"""Draw each head's far tokens by their scores, one program per head.

What `attention.far_tokens.draw` does in dozens of passes over all scores. Which tokens are
certain is found without sorting: those whose share of the probability would exceed one draw
are taken out, the factor of the others grows with what that leaves over, and this again until
no more exceed it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device

_BLOCK = 8192  # tokens at once; with 16 warps the fastest of those measured on an H200


@on_its_device
def sample_keys(
    scores: Tensor,
    bounds: Tensor,
    kv_len: int,
    window: int,
    count: int,
    room: int,
    without: Tensor | None = None,
    budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return slots ``[B, H, room]`` int64, ascending, and what each stands for, float32.

    Args:
        scores: ``[B, H, N]`` float32, by slot, N at most S_kv; further slots score 0.
        bounds: ``[B, 2]`` int32, each row's real slots ``[start, end)``.
        kv_len: S_kv, the slot that is returned where there is no token.
        window: the last tokens of each row, as many as this, are not drawn.
        count: how many tokens to draw, unless `budgets` says it.
        room: how many there is room for.
        without: ``[B, H, M]`` int64, slots that are not drawn, S_kv for none.
        budgets: ``[B, H]`` float64, how many tokens to draw for each head.
    """
    batch_size, num_heads, num_scored = scores.shape
    slots = scores.new_empty(batch_size, num_heads, room, dtype=torch.int64)
    counts = scores.new_empty(batch_size, num_heads, room)
    allowed = None
    if without is not None:
        allowed = scores.new_ones(batch_size, num_heads, kv_len + 1, dtype=torch.int8)
        allowed.scatter_(-1, without, 0)
    draw_kernel[(batch_size * num_heads,)](
        scores.contiguous(), allowed, None if budgets is None else budgets.contiguous(), bounds,
        slots, counts, num_heads, num_scored, kv_len, window, count, room,
        BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
    return slots, counts


@triton.jit
def _load_block(
    p_scores, p_allowed, begin, stop, num_scored, LISTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block's slots, which of them may be drawn, and their scores, float64."""
    o_slot = begin + tl.arange(0, BLOCK)
    real = o_slot < stop
    if LISTED:
        real = tl.load(p_allowed + o_slot, mask=real, other=0) > 0
    b_score = tl.load(p_scores + o_slot, mask=real & (o_slot < num_scored), other=0.0)
    # Rows whose scores are not finite run dense, but their slots must be slots.
    b_score = tl.where(b_score < 1e30, b_score, 0.0)
    return o_slot, real, b_score.to(tl.float64)


@triton.jit(
    do_not_specialize=["num_heads", "num_scored", "kv_len", "window", "count", "room"]
)  # fmt: skip
def draw_kernel(
    scores_ptr, allowed_ptr, budgets_ptr, bounds_ptr, slots_ptr, counts_ptr,
    num_heads, num_scored, kv_len, window, count, room, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head: sums, which tokens are certain, and equal steps through the probabilities."""
    LISTED: tl.constexpr = allowed_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    b = row // num_heads
    start = tl.load(bounds_ptr + 2 * b)
    stop = tl.load(bounds_ptr + 2 * b + 1) - window
    p_scores = scores_ptr + row * num_scored
    p_allowed = allowed_ptr
    if LISTED:
        p_allowed += row * (kv_len + 1)
    if budgets_ptr is None:
        budget = count.to(tl.float64)
    else:
        budget = tl.load(budgets_ptr + row)

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
    # Half of the probability goes by the scores and half to all tokens alike.
    by_score = 1.0 / tl.maximum(total, 1e-30)
    alike = 1.0 / tl.maximum(number, 1.0)
    both = tl.maximum(total * by_score + number * alike, 1e-30)
    by_score = by_score / both
    alike = alike / both

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
            b_share = b_score * by_score + alike
            inside = real & (b_share * factor >= 1.0)
            b_mass += tl.where(inside, b_share, 0.0)
            b_certain += inside.to(tl.int32)
        found = tl.sum(b_certain, 0)
        more = found > certain
        certain = found
        rest = tl.maximum(1.0 - tl.sum(b_mass, 0), 1e-12)
        factor = tl.maximum(factor, (budget - certain) / rest)

    # In units of 2^-32: whole numbers add up to the same sum in any order.
    passed = (
        tl.zeros([1], tl.int64) + 2147483648
    )  # a token is drawn at a half, one and a half, ...
    for begin in range(start, stop, BLOCK):
        o_slot, real, b_score = _load_block(
            p_scores, p_allowed, begin, stop, num_scored, LISTED, BLOCK
        )  # fmt: skip
        b_likely = tl.minimum((b_score * by_score + alike) * factor, 1.0)
        b_units = tl.where(real, b_likely * 4294967296.0 + 0.5, 0.0).to(tl.int64)
        b_after = passed + tl.cumsum(b_units, 0)
        b_place = (b_after - b_units) >> 32
        drawn = ((b_after >> 32) > b_place) & (b_place < room)
        tl.store(slots_ptr + row * room + b_place, o_slot.to(tl.int64), mask=drawn)
        b_weight = 4294967296.0 / tl.maximum(b_units, 1).to(tl.float64)
        tl.store(counts_ptr + row * room + b_place, b_weight.to(tl.float32), mask=drawn)
        passed += tl.sum(b_units, 0)
    for begin in range(tl.sum(passed >> 32, 0).to(tl.int32), room, BLOCK):
        o_place = row * room + begin + tl.arange(0, BLOCK)
        empty = begin + tl.arange(0, BLOCK) < room
        tl.store(slots_ptr + o_place, kv_len.to(tl.int64), mask=empty)
        tl.store(counts_ptr + o_place, 1.0, mask=empty)
