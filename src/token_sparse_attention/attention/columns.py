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
from token_sparse_attention.results import Attended

_REFERENCE_ROWS = 256  # queries the reference attends at once, which bounds its memory
_GROUP_NUMBERS = 2**27  # of one output of some KV heads: 256 MiB in bfloat16
_MERGED_NUMBERS = 2**24  # of two outputs merged at once: 64 MiB in float32
# Queries, keys and pipeline stages of a tile, larger ones first, for FlexAttention.
_TILES = ((128, 64, 3), (64, 64, 2), (64, 32, 2), (32, 32, 2), (16, 16, 1))
_WIDE_TILES = ((64, 32, 3), *_TILES[2:])  # for heads of more than 128


def add_columns(
    into: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    covered: Tensor,
    grid: BlockGrid,
    *,
    scale: float,
    backend: str,
) -> None:
    """Merge `attend_columns` into attention over the covered blocks, in place.

    Some KV heads at a time, so that little memory is needed beside `into`.

    Args:
        into: attention over `covered`, with its log-sum-exp.
        query: see `attend_columns`, as all others.
        key: likewise.
        value: likewise.
        columns: likewise.
        covered: likewise.
        grid: likewise.
        scale: likewise.
        backend: likewise.

    Raises:
        ValueError: if `into` has no log-sum-exp.
    """
    num_kv_heads = key.shape[1]
    group = query.shape[1] // num_kv_heads
    at_once = max(_GROUP_NUMBERS * num_kv_heads // query.numel(), 1)
    for first in range(0, num_kv_heads, at_once):
        kv_heads = slice(first, first + at_once)
        heads = slice(first * group, (first + at_once) * group)
        lse = None if into.lse is None else into.lse[:, heads]
        merge_into(
            Attended(into.out[:, heads], lse),
            attend_columns(
                query[:, heads],
                key[:, kv_heads],
                value[:, kv_heads],
                columns[:, heads],
                covered[:, heads],
                grid,
                scale=scale,
                backend=backend,
            ),
        )


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
    hidden = covered.gather(-1, kv_block)
    opens = torch.where(hidden, grid.kv_len, columns.int()[:, :, None])
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
        _device_tiles(query) if query.is_cuda else None,
    )
    return Attended(out, lse)


def _device_tiles(query: Tensor) -> dict[str, int]:
    about = torch.cuda.get_device_properties(query.device)
    shared = getattr(about, "shared_memory_per_block_optin", about.shared_memory_per_block)
    return choose_tiles(query.shape[-1], query.element_size(), shared)


def choose_tiles(head_dim: int, element_size: int, shared_memory: int) -> dict[str, int]:
    """Return tiles of FlexAttention that leave room for where each column is seen from.

    Its own choice does not know of that: a number for each query and key of a tile, which is
    pipelined through shared memory like keys and values.

    Args:
        head_dim: size of the heads.
        element_size: bytes of a number of query, key and value.
        shared_memory: bytes that a block of threads may have.
    """
    width = (1 << (head_dim - 1).bit_length()) * element_size  # it pads heads to a power of 2
    tiles = _TILES if head_dim <= 128 else _WIDE_TILES
    for rows, keys, stages in tiles:
        needed = (rows + 2 * stages * keys) * width + max(stages - 1, 1) * rows * keys * 4
        if needed <= shared_memory:
            break
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_stages": stages}


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


def merge_into(into: Attended, other: Attended) -> None:
    """Make attention over some keys, in place, attention over another part's keys as well.

    ``lse = log(exp(lse_1) + exp(lse_2))``, and each output is weighted by
    ``exp(lse_i - lse)``. Where both saw nothing the result is zero.

    Args:
        into: ``[B, H, S, D]`` and ``[B, H, S]``, overwritten.
        other: likewise, over none of the keys of `into`.

    Raises:
        ValueError: if a log-sum-exp is missing.
    """
    if into.lse is None or other.lse is None:
        raise ValueError("lse must be given by both parts to merge them, got None")
    lse = torch.logaddexp(into.lse, other.lse)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    first, second = ((part - base).exp()[..., None] for part in (into.lse, other.lse))
    length = lse.shape[2]
    step = max(_MERGED_NUMBERS * length // max(into.out.numel(), 1), 1)
    for begin in range(0, length, step):
        rows = slice(begin, begin + step)
        merged = into.out[:, :, rows] * first[:, :, rows]
        merged += other.out[:, :, rows] * second[:, :, rows]
        into.out[:, :, rows] = merged
    into.lse.copy_(lse)
