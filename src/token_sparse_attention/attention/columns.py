"""Attention of every query over a few keys gathered per head, and merging by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from token_sparse_attention.attention.block_mask import BlockGrid
from token_sparse_attention.attention.block_sparse import (
    OnlineSoftmax,
    choose_block_backend,
    flex_attention,
)
from token_sparse_attention.attention.dense import Attended

_REFERENCE_ROWS = 256  # queries the reference attends at once, which bounds its memory


def attend_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    covered: Tensor,
    grid: BlockGrid,
    *,
    scale: float,
    backend: str,
) -> Attended:
    """Causal attention over the columns, where no block covers them.

    Column j is visible to query i if ``j <= i`` and the block of keys that holds j is not
    covered for the block of queries that holds i. A query that sees no column gets zeros and
    a log-sum-exp of -inf.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``; only the columns are read.
        value: likewise.
        columns: ``[B, H, C]`` int64, positions; S_kv and beyond stand for no column.
        covered: ``[B, H, Q, K]`` bool.
        grid: the blocks of `covered`.
        scale: factor of the logits.
        backend: a block-sparse backend. flash-attn-4 has no cheap form of this mask, so with
            ``"fa4"`` the columns run through FlexAttention.

    Returns:
        ``[B, H, S_q, D]`` and ``[B, H, S_q]`` float32.
    """
    safe = columns.clamp(max=grid.kv_len - 1)
    kv_block = (safe // grid.block_size[1])[:, :, None].expand(-1, -1, grid.query_blocks, -1)
    # From which position on a block of queries sees each column; nowhere if it is covered.
    opens = torch.where(covered.gather(-1, kv_block), grid.kv_len, columns[:, :, None]).int()
    packed_key, packed_value = _gather_tokens(key, safe), _gather_tokens(value, safe)
    if choose_block_backend(backend, query, want_lse=True).name == "reference":
        absent = columns >= grid.kv_len
        return _reference_columns(query, packed_key, packed_value, absent, opens, grid, scale)
    offset = torch.full((), grid.kv_len - grid.query_len, device=query.device)
    rows_per_block = grid.block_size[0]

    def allowed(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return opens[batch, head, row // rows_per_block, slot] <= row + offset

    packed = BlockGrid(grid.query_len, columns.shape[-1])
    every = torch.arange(packed.kv_blocks, dtype=torch.int32, device=query.device)
    every = every.expand(1, 1, packed.query_blocks, -1).contiguous()
    count = every.new_full(every.shape[:3], packed.kv_blocks)
    out, lse = flex_attention(
        query,
        packed_key,
        packed_value,
        (count, every),
        None,
        allowed,
        packed.block_size,
        scale,
        True,
    )
    return Attended(out, lse)


def _gather_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, H_kv, S_kv, D]`` by ``index [B, H, C]``: ``[B, H, C, D]``."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    head = torch.arange(index.shape[1], device=index.device)[:, None]
    return tensor[batch, head // (index.shape[1] // tensor.shape[1]), index]


def _reference_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    absent: Tensor,
    opens: Tensor,
    grid: BlockGrid,
    scale: float,
) -> Attended:
    precision = torch.promote_types(query.dtype, torch.float32)
    # A gathered row that stands for no column must not turn a weight of zero into NaN.
    key, value = key.to(precision), value.to(precision).masked_fill(absent[..., None], 0.0)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for begin in range(0, grid.query_len, _REFERENCE_ROWS):
        rows = torch.arange(
            begin, min(begin + _REFERENCE_ROWS, grid.query_len), device=query.device
        )
        part = query[:, :, begin : begin + len(rows)].to(precision) * scale
        position = rows + (grid.kv_len - grid.query_len)
        seen = opens[:, :, rows // grid.block_size[0]] <= position[:, None]
        logits = (part @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf)
        state = OnlineSoftmax.start(part).add(logits, value)
        out[:, :, begin : begin + len(rows)] = state.output().to(out.dtype)
        lse[:, :, begin : begin + len(rows)] = state.lse()
    return Attended(out, lse)


def merge_attended(one: Attended, other: Attended) -> Attended:
    """Return attention over two disjoint sets of keys from attention over each.

    ``lse = log(exp(lse_1) + exp(lse_2))``, and each output is weighted by
    ``exp(lse_i - lse)``. Where both saw nothing the result is zero.

    Raises:
        ValueError: if a log-sum-exp is missing.
    """
    if one.lse is None or other.lse is None:
        raise ValueError("lse must be given by both parts to merge them, got None")
    lse = torch.logaddexp(one.lse, other.lse)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    first, second = ((part - base).exp()[..., None] for part in (one.lse, other.lse))
    return Attended((one.out * first + other.out * second).to(one.out.dtype), lse)
