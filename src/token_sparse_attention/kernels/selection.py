"""Select each head's tokens on the device, by radix, without a sort or a host synchronization.

As in `budget`, histograms of the scores' bits lead to a value, here each head's k-th largest. In
the kernels a head is numbered ``b * H + h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.budget import Rule, bits_of, count_tokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TOP_BINS = tl.constexpr(256)
_TOP_LEVELS = tl.constexpr(4)
_CHUNK = 4096  # tokens per program


class Selected(NamedTuple):
    """What `select_tokens` of this module returns.

    Attributes:
        indices: ``[B, H, S_kv]`` int32, the selected slots ascending, then -1.
        lengths: ``[B, H]`` int32.
        ran_sparse: ``[B]`` bool.
        budget: ``[B, H]`` int32, see `budget.Budget`.
    """

    indices: Tensor
    lengths: Tensor
    ran_sparse: Tensor
    budget: Tensor


@on_its_device
def select_tokens(
    scores: Tensor, bounds: Tensor, kv_len: int, first_query: int, rule: Rule,
    tp_group: ProcessGroup | None = None,
) -> Selected:  # fmt: skip
    """Select each head's tokens: those of the highest smoothed scores, and the last W.

    Args:
        scores: ``[B, H, N]`` float32, contiguous, by slot, N at least 1.
        bounds: ``[B, 2]`` int32, each sequence's real slots ``[start, end)``.
        kv_len: S_kv.
        first_query: slot of the first query.
        rule: the settings.
        tp_group: the ranks that hold the layer's other heads, as many each.
    """
    batch_size, num_heads, num_scored = scores.shape
    device, sequences = scores.device, batch_size * num_heads
    top_bins = sequences * _TOP_LEVELS.value * _TOP_BINS.value
    smoothed, lengths, ran_sparse, budget, top_count = count_tokens(
        scores, bounds, first_query, rule, tp_group, top_bins
    )
    scored_chunks = triton.cdiv(num_scored, _CHUNK)
    for level in range(_TOP_LEVELS.value):
        count_top_kernel[(scored_chunks, sequences)](
            smoothed, top_count, bounds, lengths, ran_sparse, num_heads, num_scored,
            WINDOW=rule.num_probes, LEVEL=level, CHUNK=_CHUNK, num_warps=8,
        )  # fmt: skip
    thresholds = torch.empty(sequences, 2, dtype=torch.int32, device=device)
    above = torch.empty(sequences, scored_chunks, dtype=torch.int32, device=device)
    equal = torch.empty_like(above)
    count_above_kernel[(scored_chunks, sequences)](
        smoothed, top_count, bounds, lengths, ran_sparse, thresholds, above, equal,
        num_heads, num_scored, WINDOW=rule.num_probes, CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
    indices = torch.empty(batch_size, num_heads, kv_len, dtype=torch.int32, device=device)
    list_tokens_kernel[(triton.cdiv(kv_len, _CHUNK), sequences)](
        smoothed, bounds, lengths, ran_sparse, thresholds, above, equal, indices,
        num_heads, num_scored, kv_len, WINDOW=rule.num_probes, CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
    return Selected(indices, lengths, ran_sparse, budget)


@triton.jit
def _threshold(p_count, wanted, LEVELS: tl.constexpr):
    """The top bits of a head's k-th largest score, from the levels counted so far.

    Returns:
        The bits, and how many of the tokens with these bits are among the k largest.
    """
    o_bin = tl.arange(0, _TOP_BINS)
    bits = 0
    for level in tl.static_range(LEVELS):
        b_count = tl.load(p_count + level * _TOP_BINS + o_bin)
        b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0)
        found = tl.maximum(tl.sum((b_above + b_count >= wanted).to(tl.int32), 0) - 1, 0)
        wanted -= tl.sum(tl.where(o_bin == found, b_above, 0), 0)
        if level < 3:
            bits = bits | (found << (23 - 8 * level))
        else:  # 31 bits: the last level has 7
            bits = bits | found
    return bits, wanted


@triton.jit(do_not_specialize=["num_scored"])
def count_top_kernel(
    smoothed_ptr, top_count_ptr, bounds_ptr, lengths_ptr, ran_sparse_ptr, num_heads, num_scored,
    WINDOW: tl.constexpr, LEVEL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One level of a head's histogram, over the tokens that have the bits found so far."""
    head = tl.program_id(1).to(tl.int64)
    b = head // num_heads
    if tl.load(ran_sparse_ptr + b):
        start = tl.load(bounds_ptr + 2 * b)
        stop = tl.load(bounds_ptr + 2 * b + 1) - WINDOW
        p_count = top_count_ptr + head * (_TOP_LEVELS * _TOP_BINS)
        o_n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        inside = (o_n >= start) & (o_n < stop)
        b_bits = bits_of(tl.load(smoothed_ptr + head * num_scored + o_n, mask=inside, other=0.0))
        if LEVEL > 0:
            bits, _ = _threshold(p_count, tl.load(lengths_ptr + head) - WINDOW, LEVEL)
            inside = inside & ((b_bits >> (31 - 8 * LEVEL)) == (bits >> (31 - 8 * LEVEL)))
        if LEVEL < 3:
            b_digit = (b_bits >> (23 - 8 * LEVEL)) & 255
        else:
            b_digit = b_bits & 127
        o_bin = tl.arange(0, _TOP_BINS)
        b_count = tl.histogram(tl.where(inside, b_digit, 0), _TOP_BINS)
        outside = CHUNK - tl.sum(inside.to(tl.int32), 0)
        b_count -= tl.where(o_bin == 0, outside, 0)  # these were counted as bin 0
        p_bin = p_count + LEVEL * _TOP_BINS + o_bin
        tl.atomic_add(p_bin, b_count, mask=b_count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_scored"])
def count_above_kernel(
    smoothed_ptr, top_count_ptr, bounds_ptr, lengths_ptr, ran_sparse_ptr,
    thresholds_ptr, above_ptr, equal_ptr, num_heads, num_scored,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each head's k-th largest score, and how many tokens of a chunk lie above or at it."""
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    b = head // num_heads
    if tl.load(ran_sparse_ptr + b):
        start = tl.load(bounds_ptr + 2 * b)
        stop = tl.load(bounds_ptr + 2 * b + 1) - WINDOW
        p_count = top_count_ptr + head * (_TOP_LEVELS * _TOP_BINS)
        wanted = tl.load(lengths_ptr + head) - WINDOW
        threshold, wanted = _threshold(p_count, wanted, _TOP_LEVELS)
        if chunk == 0:
            tl.store(thresholds_ptr + 2 * head, threshold)
            tl.store(thresholds_ptr + 2 * head + 1, wanted)
        o_n = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = (o_n >= start) & (o_n < stop)
        b_bits = bits_of(tl.load(smoothed_ptr + head * num_scored + o_n, mask=inside, other=0.0))
        o_chunk = head * tl.num_programs(0) + chunk
        above = tl.sum((inside & (b_bits > threshold)).to(tl.int32), 0)
        tl.store(above_ptr + o_chunk, above)
        equal = tl.sum((inside & (b_bits == threshold)).to(tl.int32), 0)
        tl.store(equal_ptr + o_chunk, equal)


@triton.jit(do_not_specialize=["num_scored", "kv_len"])
def list_tokens_kernel(
    smoothed_ptr, bounds_ptr, lengths_ptr, ran_sparse_ptr, thresholds_ptr, above_ptr, equal_ptr,
    indices_ptr, num_heads, num_scored, kv_len, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write a chunk's selected slots in ascending order; of equal scores the lower slots."""
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    b = head // num_heads
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    length = tl.load(lengths_ptr + head)
    o_slot = chunk * CHUNK + tl.arange(0, CHUNK)
    p_indices = indices_ptr + head * kv_len
    tl.store(p_indices + o_slot, -1, mask=(o_slot >= length) & (o_slot < kv_len))
    if tl.load(ran_sparse_ptr + b):
        threshold = tl.load(thresholds_ptr + 2 * head)
        wanted = tl.load(thresholds_ptr + 2 * head + 1)
        # Selected before this chunk: all above the threshold, and the first equal ones.
        chunks = tl.cdiv(num_scored, CHUNK)
        above = 0
        equal = 0
        for first in range(0, tl.minimum(chunk, chunks), 1024):
            o_before = first + tl.arange(0, 1024)
            before = o_before < tl.minimum(chunk, chunks)
            o_before = head * chunks + o_before
            above += tl.sum(tl.load(above_ptr + o_before, mask=before, other=0), 0)
            equal += tl.sum(tl.load(equal_ptr + o_before, mask=before, other=0), 0)
        stop = end - WINDOW
        inside = (o_slot >= start) & (o_slot < stop)
        p_smoothed = smoothed_ptr + head * num_scored + o_slot
        b_bits = bits_of(tl.load(p_smoothed, mask=inside, other=0.0))
        at = (inside & (b_bits == threshold)).to(tl.int32)
        fits = (at > 0) & (equal + tl.cumsum(at, 0) <= wanted)
        keep = (inside & (b_bits > threshold)) | fits
        rank = above + tl.minimum(equal, wanted) + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(p_indices + rank, o_slot, mask=keep)
        window = (o_slot >= stop) & (o_slot < end)
        tl.store(p_indices + (length - WINDOW + o_slot - stop), o_slot, mask=window)
    else:
        tl.store(p_indices + (o_slot - start), o_slot, mask=(o_slot >= start) & (o_slot < end))
