"""What the kernels that compute logits share: loads of rows and the online softmax, base 2."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def dot_constants(query: Tensor) -> dict[str, object]:
    """Return the compile-time constants of kernels that multiply queries by keys."""
    return _dot_constants(query.shape[3], query.dtype, query.is_cuda)


@functools.cache
def _dot_constants(head_dim: int, dtype: torch.dtype, is_cuda: bool) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "UPCAST": not is_cuda,  # the interpreter's bfloat16 arithmetic is wrong
    }


@triton.jit
def load_rows(
    p_rows, o_slot, stride_s: tl.int64, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load vectors ``[rows, BLOCK_D]`` at slots `o_slot`, zeros where they do not exist."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows += o_slot.to(tl.int64)[:, None] * stride_s + o_d[None, :]
    b_rows = tl.load(p_rows, mask=exists[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        b_rows = b_rows.to(tl.float32)
    return b_rows


@triton.jit
def update_statistics(b_logits, b_max, b_sum):
    """Update each row's running maximum and sum by logits ``[rows, keys]``, base 2."""
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_safe = finite_maximum(b_new)
    b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_logits - b_safe[:, None]), 1)
    return b_new, b_sum


@triton.jit
def finite_maximum(b_max):
    """The maximum to subtract: 0 for a row that has seen no key yet."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def log_denominators(
    p_max, p_sum, o_probe, num_splits, NUM_PROBES: tl.constexpr, MAX_SPLITS: tl.constexpr
):  # fmt: skip
    """Base-2 logarithm of each probe's softmax denominator times the number of probes.

    The statistics ``[probes, MAX_SPLITS]`` are each of one split of the keys.
    """
    o_split = tl.arange(0, MAX_SPLITS)
    o_stat = o_probe[:, None] * MAX_SPLITS + o_split[None, :]
    mask = (o_probe < NUM_PROBES)[:, None] & (o_split < num_splits)[None, :]
    b_max = tl.load(p_max + o_stat, mask=mask, other=float("-inf"))
    b_sum = tl.load(p_sum + o_stat, mask=mask, other=0.0)
    b_top = tl.max(b_max, 1)
    b_safe = finite_maximum(b_top)
    b_total = tl.sum(b_sum * tl.exp2(b_max - b_safe[:, None]), 1) * NUM_PROBES
    # A row beyond the probes has an infinite denominator: its probabilities are 0.
    return tl.where(o_probe < NUM_PROBES, b_safe + tl.log2(b_total), float("inf"))
