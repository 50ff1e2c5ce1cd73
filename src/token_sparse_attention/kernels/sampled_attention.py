"""Merge each head's sampled keys into the sliding-window attention of all its queries.

All queries of a head share its sampled keys. `gather_sampled_kernel` first copies these keys and
their values. Then `sampled_keys_kernel` takes a block of queries, starts from its sliding-window
output and log-sum-exp, and continues the online softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.softmax import LN_2, LOG2_E, dot_constants, load_rows

_GATHERED = 4096  # numbers of K, and as many of V, per program of the gathering kernel


class Tiles(NamedTuple):
    """Block sizes and launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def pick_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Return the block sizes and launch options for a dtype and a head size."""
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, 32, 4, 2)
    if head_dim > 128:
        return Tiles(64, 64, 8, 2)
    return Tiles(128, 32, 4, 4)  # the fastest of those measured on an H100


@on_its_device
def add_sampled_keys(
    query: Tensor, key: Tensor, value: Tensor, sampled: tuple[Tensor, Tensor | None],
    sequences: tuple[Tensor, Tensor], windowed: tuple[Tensor, Tensor], *,
    window: int, scale: float,
) -> None:  # fmt: skip
    """Merge sampled keys into sliding-window attention, in place, except in padding.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D, as all others.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        sampled: slots ``[B, H, M]`` int32, ascending, S_kv or more for no key, M may be 0; and
            ``[B, H, M]`` float32, factors of the keys' exponentials, None for 1.
        sequences: ``[B, 2]`` int32, each one's real slots ``[start, end)``; and ``[B]`` bool,
            which to change.
        windowed: the sliding-window attention ``[B, H, S_q, D]``, and its log-sum-exp
            ``[B, H, S_q]`` float32.
        window: keys that each query has attended to, its own included; it attends to the
            sampled keys before these.
        scale: factor of the logits.
    """
    (slots, weights), (bounds, wanted), (out, lse) = sampled, sequences, windowed
    if not slots.shape[2]:
        return
    batch_size, num_heads, query_len, head_dim = query.shape
    slots = slots.contiguous()
    sampled_key, sampled_value, log_weights = _gather(key, value, slots, weights)
    block_m, block_n, num_warps, num_stages = pick_tiles(query.dtype, head_dim)
    sampled_keys_kernel[(triton.cdiv(query_len, block_m), batch_size * num_heads)](
        query, slots, sampled_key, sampled_value, log_weights, bounds, wanted, out, lse,
        scale * LOG2_E.value,
        *query.stride()[:3], *out.stride()[:3], *lse.stride(),
        num_heads, query_len, key.shape[2] - query_len,
        **dot_constants(query), NUM_KEYS=slots.shape[2],
        SLOT_BLOCK=min(triton.next_power_of_2(slots.shape[2]), 2048), WINDOW=window,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _gather(
    key: Tensor, value: Tensor, slots: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values ``[B, H, M, D]`` at each query head's slots, and log2 of the weights.

    An entry without a key gets those of the last slot.
    """
    batch_size, num_kv_heads, kv_len, head_dim = key.shape
    num_heads, num_keys = slots.shape[1:]
    keys, values = (key.new_empty(*slots.shape, head_dim) for _ in range(2))
    log_weights = None
    if weights is not None:
        weights, log_weights = weights.contiguous(), torch.empty_like(weights)
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_n = max(_GATHERED // block_d, 1)
    gather_sampled_kernel[(triton.cdiv(num_keys, block_n), batch_size * num_heads)](
        key, value, slots, weights, keys, values, log_weights,
        *key.stride()[:3], *value.stride()[:3], num_heads, num_heads // num_kv_heads, kv_len,
        NUM_KEYS=num_keys, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=block_n,
    )  # fmt: skip
    return keys, values, log_weights


@triton.jit(do_not_specialize=["kv_len"])
def gather_sampled_kernel(
    key_ptr, value_ptr, slots_ptr, weights_ptr, keys_ptr, values_ptr, log_weights_ptr,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    num_heads, group, kv_len,
    NUM_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copy a block of one head's sampled keys and values, and take log2 of the weights."""
    problem = tl.program_id(1).to(tl.int64)
    b = problem // num_heads
    kv_head = problem % num_heads // group
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = o_n < NUM_KEYS
    o_entry = problem * NUM_KEYS + o_n
    b_slot = tl.load(slots_ptr + o_entry, mask=exists, other=0)
    b_slot = tl.minimum(b_slot, kv_len - 1).to(tl.int64)
    if weights_ptr is not None:
        b_weight = tl.load(weights_ptr + o_entry, mask=exists, other=1.0)
        tl.store(log_weights_ptr + o_entry, tl.log2(b_weight), mask=exists)
    o_d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (o_d < HEAD_DIM)[None, :]
    o_out = o_entry[:, None] * HEAD_DIM + o_d[None, :]
    p_key = key_ptr + b * stride_kb + kv_head * stride_kh + b_slot[:, None] * stride_ks
    tl.store(keys_ptr + o_out, tl.load(p_key + o_d[None, :], mask=inside), mask=inside)
    p_value = value_ptr + b * stride_vb + kv_head * stride_vh + b_slot[:, None] * stride_vs
    tl.store(values_ptr + o_out, tl.load(p_value + o_d[None, :], mask=inside), mask=inside)


@triton.jit
def _attend_tile(
    b_q, b_acc, b_max, b_sum, b_reach, b_weight, first_entry, begin, seen,
    slots_ptr, k_ptr, v_ptr, scale_log2,
    MASKED: tl.constexpr, WEIGHTED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Update the online softmax by a head's sampled keys from number `begin` on."""
    o_n = begin + tl.arange(0, BLOCK_N)
    exists = o_n < seen
    b_k = load_rows(k_ptr, first_entry + o_n, HEAD_DIM, exists, HEAD_DIM, BLOCK_D, UPCAST)
    b_v = load_rows(v_ptr, first_entry + o_n, HEAD_DIM, exists, HEAD_DIM, BLOCK_D, UPCAST)
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    if WEIGHTED:
        b_logits += b_weight[None, :]
    if MASKED:
        b_slot = tl.load(slots_ptr + first_entry + o_n, mask=exists, other=2147483647)
        b_logits = tl.where(b_slot[None, :] <= b_reach[:, None], b_logits, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_probs = tl.exp2(b_logits - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_probs, 1)
    b_acc = tl.dot(b_probs.to(b_v.dtype), b_v, b_acc * b_shrink[:, None],
                   input_precision=PRECISION)  # fmt: skip
    return b_acc, b_new, b_sum


@triton.jit
def _load_log_weights(
    log_weights_ptr, first_entry, begin, seen, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What is added to a tile's logits, base 2."""
    if WEIGHTED:
        o_n = begin + tl.arange(0, BLOCK_N)
        b_weight = tl.load(log_weights_ptr + first_entry + o_n, mask=o_n < seen, other=0.0)
    else:
        b_weight = tl.zeros([BLOCK_N], tl.float32)
    return b_weight


@triton.jit(do_not_specialize=["query_len", "first_query", "stride_lb", "stride_lh", "stride_ls"])
def sampled_keys_kernel(
    query_ptr, slots_ptr, k_ptr, v_ptr, log_weights_ptr, bounds_ptr,
    sequences_ptr, out_ptr, lse_ptr, scale_log2,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_ls: tl.int64,
    num_heads, query_len, first_query,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    NUM_KEYS: tl.constexpr, SLOT_BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of one head's queries."""
    WEIGHTED: tl.constexpr = log_weights_ptr is not None
    problem = tl.program_id(1).to(tl.int64)
    first_entry = problem * NUM_KEYS
    b = problem // num_heads
    head = problem % num_heads
    start = tl.load(bounds_ptr + 2 * b)
    end = tl.load(bounds_ptr + 2 * b + 1)
    end = start + (end - start) * tl.load(sequences_ptr + b).to(tl.int32)  # empty if not wanted
    o_query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_slot = first_query + o_query
    real = (o_query < query_len) & (o_slot >= start) & (o_slot < end)
    b_reach = tl.where(real, o_slot - WINDOW, -1)  # the last slot before each query's window
    longest, shortest = tl.max(b_reach, 0), tl.min(b_reach, 0)
    seen = 0  # sampled keys that any of the queries attends to
    shared = 0  # that all of them attend to
    for begin in range(0, NUM_KEYS, SLOT_BLOCK):
        o_n = begin + tl.arange(0, SLOT_BLOCK)
        b_slot = tl.load(slots_ptr + first_entry + o_n, mask=o_n < NUM_KEYS, other=2147483647)
        seen += tl.sum((b_slot <= longest).to(tl.int32), 0)
        shared += tl.sum((b_slot <= shortest).to(tl.int32), 0)
    shared = shared // BLOCK_N * BLOCK_N
    if seen > 0:
        p_q = query_ptr + b * stride_qb + head * stride_qh
        b_q = load_rows(p_q, o_query, stride_qs, real, HEAD_DIM, BLOCK_D, UPCAST)
        p_out = out_ptr + b * stride_ob + head * stride_oh
        b_acc = load_rows(p_out, o_query, stride_os, real, HEAD_DIM, BLOCK_D, UPCAST)
        b_acc = b_acc.to(tl.float32)
        p_lse = lse_ptr + b * stride_lb + head * stride_lh + o_query.to(tl.int64) * stride_ls
        b_max = tl.load(p_lse, mask=real, other=0.0) * LOG2_E
        b_sum = tl.full([BLOCK_M], 1.0, tl.float32)
        b_weight = _load_log_weights(log_weights_ptr, first_entry, 0, seen, WEIGHTED, BLOCK_N)
        for begin in range(0, shared, BLOCK_N):  # every query attends to every key: no mask
            # Weights are read a tile ahead: the pipeline takes care of keys and values only.
            b_next = _load_log_weights(
                log_weights_ptr, first_entry, begin + BLOCK_N, seen, WEIGHTED, BLOCK_N
            )  # fmt: skip
            b_acc, b_max, b_sum = _attend_tile(
                b_q, b_acc, b_max, b_sum, b_reach, b_weight, first_entry, begin, NUM_KEYS,
                slots_ptr, k_ptr, v_ptr, scale_log2, False, WEIGHTED, HEAD_DIM, BLOCK_D, BLOCK_N,
                PRECISION, UPCAST,
            )  # fmt: skip
            b_weight = b_next
        for begin in range(shared, seen, BLOCK_N):
            b_weight = _load_log_weights(
                log_weights_ptr, first_entry, begin, seen, WEIGHTED, BLOCK_N
            )  # fmt: skip
            b_acc, b_max, b_sum = _attend_tile(
                b_q, b_acc, b_max, b_sum, b_reach, b_weight, first_entry, begin, seen, slots_ptr,
                k_ptr, v_ptr, scale_log2, True, WEIGHTED, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
                UPCAST,
            )  # fmt: skip
        o_d = tl.arange(0, BLOCK_D)
        p_out += o_query.to(tl.int64)[:, None] * stride_os + o_d[None, :]
        tl.store(p_out, (b_acc / b_sum[:, None]).to(out_ptr.dtype.element_ty),
                 mask=real[:, None] & (o_d < HEAD_DIM)[None, :])  # fmt: skip
        tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN_2, mask=real)
