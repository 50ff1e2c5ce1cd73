"""Gather Q, K and V of each head's tokens in one launch, and scatter the output back.

A packed sequence is one head of one batch entry, numbered ``b * H + h``. Launches take a range
of them, so that heads can be processed in groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device

_ROWS = 64  # rows of D elements per program
_SLOTS = 1024  # indices per program
# Attention kernels load whole tiles of values and multiply the rows beyond a sequence's end by
# zero, so these must not be NaN: this many rows behind the last sequence are zeroed.
_TAIL = tl.constexpr(256)


@on_its_device
def cumulative_lengths(
    indices: Tensor, lengths: Tensor, first_query: int, sequences: range
) -> tuple[Tensor, Tensor]:
    """Return where each sequence's packed queries and keys start, ``[sequences + 1]`` int32.

    Args:
        indices: ``[B, H, K]`` selected slots, ascending, contiguous.
        lengths: ``[B, H]``, entries of `indices` to use.
        first_query: slot of the first query.
        sequences: which sequences.
    """
    # Two allocations: kernels are compiled anew for pointers of another alignment.
    offsets_q, offsets_k = (
        torch.empty(len(sequences) + 1, dtype=torch.int32, device=indices.device) for _ in range(2)
    )
    cumulative_lengths_kernel[(1,)](
        indices, lengths, offsets_q, offsets_k, first_query, indices.shape[2],
        sequences.start, len(sequences),
        # Of all sequences, not of the range: the size of a range depends on the length.
        BLOCK=triton.next_power_of_2(indices.shape[0] * indices.shape[1]), num_warps=4,
    )  # fmt: skip
    return offsets_q, offsets_k


@on_its_device
def gather(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, offsets: tuple[Tensor, Tensor],
    sequences: range, packed: tuple[Tensor, Tensor, Tensor], max_length: int,
) -> None:  # fmt: skip
    """Write the selected rows into ``packed``, ``[T, D]`` each.

    Args:
        query: ``[B, H, S_q, D]``, unit stride over D.
        key: ``[B, H_kv, S_kv, D]``, unit stride over D.
        value: ``[B, H_kv, S_kv, D]``, unit stride over D.
        indices: ``[B, H, K]``, contiguous.
        offsets: from `cumulative_lengths`.
        sequences: which sequences.
        packed: query, key and value to fill.
        max_length: an upper bound of the sequences' lengths.
    """
    num_heads, query_len, head_dim = query.shape[1:]
    gather_kernel[(triton.cdiv(max_length + _TAIL.value, _ROWS), len(sequences))](
        query, key, value, indices, *offsets, *packed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        key.shape[2] - query_len, indices.shape[2], sequences.start, num_heads, len(packed[2]),
        GROUP=num_heads // key.shape[1], HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


@on_its_device
def scatter(
    indices: Tensor, packed: tuple[Tensor, Tensor | None], offsets: tuple[Tensor, Tensor],
    sequences: range, into: tuple[Tensor, Tensor | None], ran_sparse: Tensor, *,
    first_query: int, zeros: bool,
) -> None:  # fmt: skip
    """Write packed rows, and their log-sum-exp if both sides have one, to their positions.

    Args:
        indices: ``[B, H, K]``, contiguous.
        packed: rows ``[T, D]``, unit stride over D; and ``[T]`` float32 or None.
        offsets: from `cumulative_lengths`.
        sequences: which sequences.
        into: ``[B, H, S_q, D]``, written in batch entries that ran sparse only, unit stride
            over D; and ``[B, H, S_q]`` float32, contiguous, or None.
        ran_sparse: ``[B]`` bool.
        first_query: slot of the first query.
        zeros: whether rows that were not selected become zero, and their log-sum-exp -inf, or
            keep their values.
    """
    (out, packed_lse), (full, full_lse) = packed, into
    with_lse = packed_lse is not None and full_lse is not None
    num_heads, query_len, head_dim = full.shape[1:]
    ranks = torch.full(
        (len(sequences), query_len), -1, dtype=torch.int32, device=full.device
    )  # which packed row of its sequence a query has, -1 for none
    rank_kernel[(triton.cdiv(indices.shape[2], _SLOTS), len(sequences))](
        indices, *offsets, ranks, first_query, indices.shape[2], query_len, sequences.start,
        BLOCK=_SLOTS, num_warps=4,
    )  # fmt: skip
    scatter_kernel[(triton.cdiv(query_len, _ROWS), len(sequences))](
        out, offsets[0], ranks, full, ran_sparse,
        packed_lse if with_lse else out, full_lse if with_lse else out,
        *full.stride()[:3], query_len, sequences.start, num_heads, len(out), out.stride(0),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), ZEROS=zeros,
        WITH_LSE=with_lse, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_query", "capacity", "first_sequence", "num_sequences"])
def cumulative_lengths_kernel(
    indices_ptr, lengths_ptr, offsets_q_ptr, offsets_k_ptr,
    first_query, capacity, first_sequence, num_sequences, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cumulative sums of the sequences' numbers of keys and of queries."""
    o_s = tl.arange(0, BLOCK)
    real = o_s < num_sequences
    o_sequence = (first_sequence + o_s).to(tl.int64)
    b_keys = tl.load(lengths_ptr + o_sequence, mask=real, other=0).to(tl.int32)
    # Indices ascend: bisect for the first one that is a query's slot.
    b_low = tl.zeros([BLOCK], tl.int32)
    b_high = b_keys
    steps = tl.where(first_query > 0, capacity, 0)
    while steps > 0:
        b_middle = (b_low + b_high) // 2
        searching = real & (b_low < b_high)
        p_slot = indices_ptr + o_sequence * capacity + b_middle
        before = searching & (tl.load(p_slot, mask=searching, other=0) < first_query)
        b_low = tl.where(before, b_middle + 1, b_low)
        b_high = tl.where(searching & ~before, b_middle, b_high)
        steps = steps // 2
    tl.store(offsets_q_ptr, 0)
    tl.store(offsets_k_ptr, 0)
    tl.store(offsets_q_ptr + 1 + o_s, tl.cumsum(b_keys - b_low, 0), mask=real)
    tl.store(offsets_k_ptr + 1 + o_s, tl.cumsum(b_keys, 0), mask=real)


@triton.jit(do_not_specialize=["first_query", "capacity", "first_sequence", "packed_rows"])
def gather_kernel(
    query_ptr, key_ptr, value_ptr, indices_ptr, offsets_q_ptr, offsets_k_ptr,
    packed_q_ptr, packed_k_ptr, packed_v_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    first_query, capacity, first_sequence, num_heads, packed_rows,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy a block of one sequence's rows of all three tensors."""
    s = tl.program_id(1)
    begin_q = tl.load(offsets_q_ptr + s)
    begin_k = tl.load(offsets_k_ptr + s)
    count_q = tl.load(offsets_q_ptr + s + 1) - begin_q
    count_k = tl.load(offsets_k_ptr + s + 1) - begin_k
    first_row = tl.program_id(0) * ROWS
    tail = tl.where(s == tl.num_programs(1) - 1, _TAIL, 0)
    if first_row < count_k + tail:
        sequence = (first_sequence + s).to(tl.int64)
        b = sequence // num_heads
        head = sequence % num_heads
        kv_head = head // GROUP
        o_row = first_row + tl.arange(0, ROWS)
        o_d = tl.arange(0, BLOCK_D)
        selected = o_row < count_k
        o_slot = tl.load(indices_ptr + sequence * capacity + o_row, mask=selected, other=0)
        o_slot = o_slot.to(tl.int64)
        mask = selected[:, None] & (o_d < HEAD_DIM)[None, :]
        # In a chunk the first keys have no queries.
        o_query = o_row - (count_k - count_q)
        mask_q = mask & (o_query >= 0)[:, None]
        p_k = key_ptr + b * stride_kb + kv_head * stride_kh + o_slot[:, None] * stride_ks
        p_v = value_ptr + b * stride_vb + kv_head * stride_vh + o_slot[:, None] * stride_vs
        p_q = query_ptr + b * stride_qb + head * stride_qh
        p_q += (o_slot - first_query)[:, None] * stride_qs
        b_k = tl.load(p_k + o_d[None, :], mask=mask)
        b_v = tl.load(p_v + o_d[None, :], mask=mask, other=0.0)
        b_q = tl.load(p_q + o_d[None, :], mask=mask_q)
        o_to = (begin_k + o_row).to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
        tl.store(packed_k_ptr + o_to, b_k, mask=mask)
        written = (o_row < count_k + tail) & (begin_k + o_row < packed_rows)
        tl.store(packed_v_ptr + o_to, b_v, mask=written[:, None] & (o_d < HEAD_DIM)[None, :])
        o_to = (begin_q + o_query).to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
        tl.store(packed_q_ptr + o_to, b_q, mask=mask_q)


@triton.jit(do_not_specialize=["first_query", "capacity", "query_len", "first_sequence"])
def rank_kernel(
    indices_ptr, offsets_q_ptr, offsets_k_ptr, ranks_ptr,
    first_query, capacity, query_len, first_sequence, BLOCK: tl.constexpr,
):  # fmt: skip
    """Invert one sequence's indices: each query's row in the packed queries of the sequence."""
    s = tl.program_id(1)
    count_q = tl.load(offsets_q_ptr + s + 1) - tl.load(offsets_q_ptr + s)
    count_k = tl.load(offsets_k_ptr + s + 1) - tl.load(offsets_k_ptr + s)
    first_row = tl.program_id(0) * BLOCK
    if first_row < count_k:
        o_row = first_row + tl.arange(0, BLOCK)
        o_query = o_row - (count_k - count_q)
        mask = (o_row < count_k) & (o_query >= 0)
        p_slot = indices_ptr + (first_sequence + s).to(tl.int64) * capacity + o_row
        o_slot = tl.load(p_slot, mask=mask, other=0) - first_query
        tl.store(ranks_ptr + s.to(tl.int64) * query_len + o_slot, o_query, mask=mask)


@triton.jit(do_not_specialize=["query_len", "first_sequence", "out_rows"])
def scatter_kernel(
    out_ptr, offsets_q_ptr, ranks_ptr, full_ptr, ran_sparse_ptr, packed_lse_ptr, full_lse_ptr,
    stride_fb: tl.int64, stride_fh: tl.int64, stride_fs: tl.int64,
    query_len, first_sequence, num_heads, out_rows, stride_out: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ZEROS: tl.constexpr,
    WITH_LSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write a block of one sequence's full rows, each at most once."""
    s = tl.program_id(1)
    sequence = (first_sequence + s).to(tl.int64)
    b = sequence // num_heads
    if tl.load(ran_sparse_ptr + b):
        o_query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        exists = o_query < query_len
        p_rank = ranks_ptr + s.to(tl.int64) * query_len + o_query
        rank = tl.load(p_rank, mask=exists, other=-1)
        selected = rank >= 0
        o_from = (tl.load(offsets_q_ptr + s) + rank).to(tl.int64)
        o_d = tl.arange(0, BLOCK_D)
        inside = (o_d < HEAD_DIM)[None, :]
        p_out = out_ptr + o_from[:, None] * stride_out + o_d[None, :]
        there = selected & (o_from < out_rows)
        b_out = tl.load(p_out, mask=there[:, None] & inside, other=0.0)
        p_full = full_ptr + b * stride_fb + (sequence % num_heads) * stride_fh
        p_full += o_query.to(tl.int64)[:, None] * stride_fs + o_d[None, :]
        written = exists if ZEROS else selected
        tl.store(p_full, b_out, mask=written[:, None] & inside)
        if WITH_LSE:
            b_lse = tl.load(packed_lse_ptr + o_from, mask=there, other=float("-inf"))
            tl.store(full_lse_ptr + sequence * query_len + o_query, b_lse, mask=written)
