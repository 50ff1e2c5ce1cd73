"""Smooth the scores and count how many tokens each head keeps, on the device, by radix.

The bits of non-negative floats order like integers. A histogram of the scores' top bits gives
the bin in which the mass of all smaller values reaches ``drop_mass``, a histogram of the next
bits the bin within that bin, and so on down to the value itself. A program counts its chunk in
registers before it adds to global memory: most tokens have about the same score, and one atomic
addition per token would serialize on a few bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.tensor_parallel import counts_of_ranks, mean_of_ranks, own_heads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TILE = 4096  # scores per program of the smoothing kernel
# Bits per level of the budget's histogram. A bin costs a comparison per token: many bins and few
# levels are fastest for a sequence's shared budget, few bins and many levels for one per head.
_SHARED_BITS, _PER_HEAD_BITS = 8, 4


class Rule(NamedTuple):
    """The settings by which tokens are selected, and sequences run dense.

    Attributes:
        drop_mass: share of the mass that may be dropped.
        num_probes: W, the queries that score; the last W tokens are always kept.
        pool_size: width of the smoothing.
        min_tokens: fewest scored tokens to keep.
        per_head: whether each head has its own budget.
        keep_ratio: share of a sequence's tokens to keep; None for as many as `drop_mass` says.
        max_work: a sequence runs dense if the mean square of its heads' kept shares exceeds
            ``max_work - fixed_tokens / effective_length``, see `crossover.effective_length`.
        fixed_tokens: see `max_work`.
        min_length: sequences of a smaller effective length run dense.
    """

    drop_mass: float
    num_probes: int
    pool_size: int
    min_tokens: int
    per_head: bool
    keep_ratio: float | None
    max_work: float
    fixed_tokens: float
    min_length: float


class Budget(NamedTuple):
    """How many tokens to keep.

    Attributes:
        smoothed: ``[B, H, N]`` float32, the scores that the heads choose by.
        lengths: ``[B, H]`` int32, tokens that each head keeps.
        ran_sparse: ``[B]`` bool.
        budget: ``[B, H]`` int32, tokens that the rule keeps, even where the sequence ran dense.
        spare: zeros, int32, as many as requested.
    """

    smoothed: Tensor
    lengths: Tensor
    ran_sparse: Tensor
    budget: Tensor
    spare: Tensor


def count_tokens(
    scores: Tensor, bounds: Tensor, first_query: int, rule: Rule, tp_group: ProcessGroup | None,
    spare: int,
) -> Budget:  # fmt: skip
    """Decide how many tokens each head keeps.

    Args:
        scores: ``[B, H, N]`` float32, contiguous, by slot.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        first_query: slot of the first query.
        rule: the settings.
        tp_group: the ranks that hold the layer's other heads.
        spare: how many zeros to return for the caller's use, from the same launch.
    """
    batch_size, num_heads, num_scored = scores.shape
    device = scores.device
    num_budgets = batch_size * num_heads if rule.per_head else batch_size
    smoothed = torch.empty_like(scores)
    mean = smoothed if rule.per_head else scores.new_empty(batch_size, num_scored)
    bits, levels = _radix(rule)
    mass_bins = num_budgets * levels * 2**bits
    sizes = (2 * mass_bins, mass_bins, spare, batch_size)  # mass sums are float64
    zeros = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    mass_sum, mass_count, spare_zeros, not_finite = zeros.split(sizes)
    mass_sum = mass_sum.view(torch.float64)

    block_h = triton.next_power_of_2(num_heads)
    block_n = max(_TILE // block_h, 16)
    smooth_kernel[(triton.cdiv(num_scored, block_n), batch_size)](
        scores, smoothed, mean, not_finite, bounds, num_heads, num_scored,
        WINDOW=rule.num_probes, POOL=rule.pool_size, PER_HEAD=rule.per_head,
        BLOCK_H=block_h, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    if tp_group is not None and not rule.per_head:
        mean, not_finite = mean_of_ranks(mean, not_finite, tp_group)
    droppable = _count_droppable(mean, mass_sum, mass_count, bounds, rule)
    decided_heads = num_heads
    if tp_group is not None and rule.per_head:
        droppable, not_finite = counts_of_ranks(
            droppable.view(batch_size, num_heads), not_finite, tp_group
        )
        decided_heads = droppable.shape[1]
    # Allocations of their own: kernels are compiled anew for pointers of another alignment.
    lengths = torch.empty(batch_size, decided_heads, dtype=torch.int32, device=device)
    budget = torch.empty_like(lengths)
    ran_sparse = torch.empty(batch_size, dtype=torch.bool, device=device)
    decide_kernel[(batch_size,)](
        droppable, not_finite, bounds, lengths, budget, ran_sparse,
        float(rule.drop_mass), rule.min_tokens, float(rule.keep_ratio or 0.0),
        float(rule.max_work), float(rule.fixed_tokens), float(rule.min_length), first_query,
        decided_heads,
        WINDOW=rule.num_probes, PER_HEAD=rule.per_head, GIVEN=rule.keep_ratio is not None,
        BLOCK_H=triton.next_power_of_2(decided_heads), num_warps=4,
    )  # fmt: skip
    if tp_group is not None and rule.per_head:
        lengths = own_heads(lengths, num_heads, tp_group)
        budget = own_heads(budget, num_heads, tp_group)
    return Budget(smoothed, lengths, ran_sparse, budget, spare_zeros)


def _count_droppable(
    mean: Tensor, mass_sum: Tensor, mass_count: Tensor, bounds: Tensor, rule: Rule
) -> Tensor:
    """Return how many tokens each budget may drop, int32; the sums and counts must be zero."""
    batch_size, num_scored = len(bounds), mean.shape[-1]
    num_budgets = mean.numel() // num_scored
    bits, levels = _radix(rule)
    chunk = 16 * _TILE // 2**bits
    for level in range(levels):
        width = min(bits, 31 - bits * level)
        count_mass_kernel[(triton.cdiv(num_scored, chunk), num_budgets)](
            mean, mass_sum, mass_count, bounds, float(rule.drop_mass), num_scored,
            BUDGETS=num_budgets // batch_size, WINDOW=rule.num_probes,
            BITS=bits, LEVELS=levels, LEVEL=level, WIDTH=width,
            SHIFT=31 - bits * level - width, CHUNK=chunk, num_warps=8,
        )  # fmt: skip
    droppable = torch.empty(num_budgets, dtype=torch.int32, device=mean.device)
    count_droppable_kernel[(num_budgets,)](
        mass_sum, mass_count, droppable, float(rule.drop_mass),
        BITS=bits, LEVELS=levels, num_warps=4,
    )  # fmt: skip
    return droppable


def _radix(rule: Rule) -> tuple[int, int]:
    """Return the bits of a level of the budget's histogram, and the number of levels."""
    bits = _PER_HEAD_BITS if rule.per_head else _SHARED_BITS
    return bits, triton.cdiv(31, bits)


@triton.jit
def bits_of(b_value):
    """Bits of positive floats; 0 for all other values."""
    return tl.where(b_value > 0, b_value.to(tl.int32, bitcast=True), 0)


@triton.jit(do_not_specialize=["num_scored"])
def smooth_kernel(
    scores_ptr, smoothed_ptr, mean_ptr, not_finite_ptr, bounds_ptr, num_heads, num_scored,
    WINDOW: tl.constexpr, POOL: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Average pooling of every head's scores, and the mean over heads of the pooled scores."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.load(bounds_ptr + 2 * b)
    stop = tl.load(bounds_ptr + 2 * b + 1) - WINDOW
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    o_head = (b * num_heads + o_h) * num_scored
    b_sum = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    for offset in tl.static_range(POOL):
        o_from = o_n + (offset - POOL // 2)
        mask = (o_h < num_heads)[:, None] & ((o_from >= start) & (o_from < stop))[None, :]
        b_sum += tl.load(scores_ptr + o_head[:, None] + o_from[None, :], mask=mask, other=0.0)
    b_smooth = tl.math.div_rn(b_sum, tl.full([BLOCK_H, BLOCK_N], POOL, tl.float32))
    scored = (o_n >= start) & (o_n < stop)
    valid = (o_h < num_heads)[:, None] & scored[None, :]
    tl.store(smoothed_ptr + o_head[:, None] + o_n[None, :], b_smooth, mask=valid)
    broken = valid & ((b_smooth != b_smooth) | (tl.abs(b_smooth) == float("inf")))
    any_broken = tl.max(tl.max(broken.to(tl.int32), 1), 0)
    tl.atomic_max(not_finite_ptr + b, 1, mask=any_broken > 0, sem="relaxed")
    if not PER_HEAD:
        b_mean = tl.sum(tl.where(valid, b_smooth, 0.0), 0) / num_heads
        tl.store(mean_ptr + b * num_scored + o_n, b_mean, mask=scored)


@triton.jit
def _mass_below(p_sum, p_count, drop_mass, BITS: tl.constexpr, DONE: tl.constexpr):
    """Find the token at which the mass of the smallest tokens reaches the target.

    The target is the share `drop_mass` of all mass.

    Returns:
        The first `DONE` levels' bits of that token's score, the number of tokens with smaller
        bits, their mass, the target, and whether it is reached at all.
    """
    BINS: tl.constexpr = 2**BITS
    o_bin = tl.arange(0, BINS)
    target = (tl.sum(tl.load(p_sum + o_bin), 0) + 1e-8) * drop_mass
    bits = 0
    count = 0
    mass = target * 0.0
    reached = tl.where(target > 0.0, 1, 0)
    for level in tl.static_range(DONE):
        b_sum = tl.load(p_sum + level * BINS + o_bin)
        b_count = tl.load(p_count + level * BINS + o_bin)
        found = tl.sum((mass + tl.cumsum(b_sum, 0) < target).to(tl.int32), 0)
        reached *= (found < BINS).to(tl.int32)
        found = tl.minimum(found, BINS - 1)
        count += tl.sum(tl.where(o_bin < found, b_count, 0), 0)
        mass += tl.sum(tl.where(o_bin < found, b_sum, 0.0), 0)
        if (level + 1) * BITS <= 31:
            bits = (bits << BITS) | found
        else:  # the last level has what is left
            bits = (bits << (31 - BITS * level)) | found
    return bits, count, mass, target, reached


@triton.jit(do_not_specialize=["num_scored", "drop_mass"])
def count_mass_kernel(
    mean_ptr, mass_sum_ptr, mass_count_ptr, bounds_ptr, drop_mass, num_scored,
    BUDGETS: tl.constexpr, WINDOW: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
    LEVEL: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One level of a budget's histogram, over the tokens that have the bits found so far."""
    BINS: tl.constexpr = 2**BITS
    SUB: tl.constexpr = CHUNK // 16
    budget = tl.program_id(1).to(tl.int64)  # a head's or a sequence's
    b = budget // BUDGETS
    start = tl.load(bounds_ptr + 2 * b)
    stop = tl.load(bounds_ptr + 2 * b + 1) - WINDOW
    p_sum = mass_sum_ptr + budget * (LEVELS * BINS)
    p_count = mass_count_ptr + budget * (LEVELS * BINS)
    prefix, _, _, _, reached = _mass_below(p_sum, p_count, drop_mass, BITS, LEVEL)
    o_bin = tl.arange(0, BINS)
    b_counts = tl.zeros([BINS, SUB], tl.int32)
    b_sums = tl.zeros([BINS, SUB], tl.float32)
    for first in range(0, CHUNK, SUB):
        o_n = tl.program_id(0) * CHUNK + first + tl.arange(0, SUB)
        inside = (o_n >= start) & (o_n < stop)
        b_mass = tl.load(mean_ptr + budget * num_scored + o_n, mask=inside, other=0.0)
        b_bits = bits_of(b_mass)
        if LEVEL > 0:
            inside = inside & (reached > 0) & ((b_bits >> (SHIFT + WIDTH)) == prefix)
        b_digit = tl.where(inside, (b_bits >> SHIFT) & (2**WIDTH - 1), -1)
        hit = b_digit[None, :] == o_bin[:, None]
        b_counts += hit.to(tl.int32)
        b_sums += tl.where(hit, b_mass[None, :], 0.0)
    b_count = tl.sum(b_counts, 1)
    b_sum = tl.sum(b_sums.to(tl.float64), 1)
    o_bin += LEVEL * BINS
    tl.atomic_add(p_count + o_bin, b_count, mask=b_count > 0, sem="relaxed")
    tl.atomic_add(p_sum + o_bin, b_sum, mask=b_count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["drop_mass"])
def count_droppable_kernel(
    mass_sum_ptr, mass_count_ptr, droppable_ptr, drop_mass,
    BITS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """How many of the smallest tokens have less mass together than the target."""
    BINS: tl.constexpr = 2**BITS
    budget = tl.program_id(0).to(tl.int64)
    p_sum = mass_sum_ptr + budget * (LEVELS * BINS)
    p_count = mass_count_ptr + budget * (LEVELS * BINS)
    bits, count, mass, target, reached = _mass_below(p_sum, p_count, drop_mass, BITS, LEVELS)
    # The tokens in the last bin are equal: as many fit as keep the mass below the target.
    LAST_WIDTH: tl.constexpr = 31 - BITS * (LEVELS - 1)
    equal = tl.load(p_count + (LEVELS - 1) * BINS + (bits & (2**LAST_WIDTH - 1)))
    value = bits.to(tl.float32, bitcast=True).to(tl.float64)
    fitting = tl.ceil((target - mass) / tl.where(value > 0, value, 1.0)) - 1
    fitting = tl.minimum(tl.maximum(fitting, 0.0), equal.to(tl.float64)).to(tl.int32)
    count += tl.where(value > 0, fitting, equal)
    everything = tl.sum(tl.load(p_count + tl.arange(0, BINS)), 0)
    tl.store(droppable_ptr + budget, tl.where(reached > 0, count, everything))


@triton.jit(do_not_specialize=[
    "drop_mass", "min_tokens", "keep_ratio", "max_work", "fixed_tokens", "min_length",
    "first_query",
])  # fmt: skip
def decide_kernel(
    droppable_ptr, not_finite_ptr, bounds_ptr, lengths_ptr, budget_ptr, ran_sparse_ptr,
    drop_mass, min_tokens, keep_ratio, max_work, fixed_tokens, min_length, first_query, num_heads,
    WINDOW: tl.constexpr, PER_HEAD: tl.constexpr, GIVEN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Each head's number of tokens, and whether the sequence runs sparse."""
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    length = end - start
    num_scored = length - WINDOW
    o_h = tl.arange(0, BLOCK_H)
    if PER_HEAD:
        p_drop = droppable_ptr + b * num_heads + o_h
        b_drop = tl.load(p_drop, mask=o_h < num_heads, other=0)
    else:
        b_drop = tl.zeros([BLOCK_H], tl.int32) + tl.load(droppable_ptr + b)
    b_kept = tl.maximum(num_scored - (b_drop + 1), min_tokens)
    b_kept = tl.where(b_drop == 0, num_scored, b_kept)
    sparse = (length > min_tokens + WINDOW) & (drop_mass > 0)
    sparse = sparse & (tl.sum(((b_kept < num_scored) & (o_h < num_heads)).to(tl.int32), 0) > 0)
    if GIVEN:
        wanted = tl.floor(length.to(tl.float64) * keep_ratio + 0.5).to(tl.int32) - WINDOW
        b_kept = tl.zeros([BLOCK_H], tl.int32) + tl.minimum(tl.maximum(wanted, 0), num_scored)
        sparse = num_scored > 0
    sparse = sparse & (end - WINDOW >= tl.maximum(start, first_query))
    sparse = sparse & (tl.load(not_finite_ptr + b) == 0)
    b_budget = tl.where(sparse, b_kept + WINDOW, length)
    heads = o_h < num_heads
    tl.store(budget_ptr + b * num_heads + o_h, b_budget, mask=heads)
    b_share = b_budget.to(tl.float32) / tl.maximum(length, 1)
    work = tl.sum(tl.where(heads, b_share * b_share, 0.0), 0) / num_heads
    queries = (end - tl.maximum(start, first_query)).to(tl.float32)
    effective_length = queries * (2 * length - queries) / tl.maximum(length, 1)
    sparse = sparse & (work <= max_work - fixed_tokens / tl.maximum(effective_length, 1.0))
    sparse = sparse & (effective_length >= min_length)
    tl.store(lengths_ptr + b * num_heads + o_h, tl.where(sparse, b_budget, length), mask=heads)
    tl.store(ran_sparse_ptr + b, sparse)
