"""Block patterns: attention to single keys outside the blocks, merged by log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.block_mask import BlockGrid
from token_sparse_attention.attention.block_reference import OnlineSoftmax, gather_by_head
from token_sparse_attention.attention.block_sparse import (
    FlexBlocks,
    choose_block_backend,
    flex_attention,
    kv_head_portions,
)
from token_sparse_attention.results import Attended

_REFERENCE_QUERIES = 256  # per step of the reference, which bounds its memory
_GROUP_NUMBERS = 2**27  # numbers of one portion's output: 256 MiB in bfloat16
_MERGED_NUMBERS = 2**24  # numbers of an output that are merged at once: 64 MiB in float32
# FlexAttention's queries, keys and pipeline stages per tile, larger tiles first.
_TILES = ((128, 64, 3), (64, 64, 2), (64, 32, 2), (32, 32, 2), (16, 16, 1))
_WIDE_TILES = ((64, 32, 3), *_TILES[2:])  # for heads of more than 128


class Columns(NamedTuple):
    """Keys that every later query of a head attends to, where no block covers them.

    Attributes:
        slots: ``[B, H, C]`` int64; S_kv and beyond stand for no column.
        covered: ``[B, H, Q, K]`` bool, the blocks that are attended to elsewhere.
        grid: the blocks.
    """

    slots: Tensor
    covered: Tensor
    grid: BlockGrid


def add_columns(
    into: Attended, query: Tensor, key: Tensor, value: Tensor, columns: Columns, *,
    scale: float, backend: str,
) -> None:  # fmt: skip
    """Merge `attend_columns` into attention over the covered blocks, in place.

    A portion of the KV heads at a time, which bounds memory.

    Args:
        into: attention over the covered blocks, with its log-sum-exp.
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        columns: the columns and the covered blocks.
        scale: factor of the logits.
        backend: see `attend_columns`.

    Raises:
        ValueError: if `into` has no log-sum-exp.
    """
    num_kv_heads = key.shape[1]
    portion = max(_GROUP_NUMBERS * num_kv_heads // query.numel(), 1)
    for heads, kv_heads in kv_head_portions(query.shape[1], num_kv_heads, portion):
        lse = None if into.lse is None else into.lse[:, heads]
        part = Columns(columns.slots[:, heads], columns.covered[:, heads], columns.grid)
        tensors = query[:, heads], key[:, kv_heads], value[:, kv_heads]
        merge_into(
            Attended(into.out[:, heads], lse),
            attend_columns(*tensors, part, scale=scale, backend=backend),
        )


def attend_columns(
    query: Tensor, key: Tensor, value: Tensor, columns: Columns, *, scale: float, backend: str
) -> Attended:
    """Causal attention over the columns, where no block covers them.

    Column j is visible to query i if ``j <= i`` and the block of keys of j is not covered for
    the block of queries of i. A query that sees no column gets zeros and a log-sum-exp of -inf.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``; only the columns are read.
        value: ``[B, H_kv, S_kv, D]``; only the columns are read.
        columns: the columns and the covered blocks.
        scale: factor of the logits.
        backend: a block-sparse backend. flash-attn-4 has no cheap form of this mask, so
            ``"fa4"`` runs FlexAttention too.

    Returns:
        ``[B, H, S_q, D]`` and ``[B, H, S_q]`` float32.
    """
    slots, covered, grid = columns
    safe = slots.clamp(max=grid.kv_len - 1)
    kv_block = (safe // grid.block_size[1])[:, :, None].expand(-1, -1, grid.query_blocks, -1)
    # The first position from which a block of queries sees each column; S_kv if covered.
    hidden = covered.gather(-1, kv_block)
    opens = torch.where(hidden, grid.kv_len, slots.int()[:, :, None])
    packed_key, packed_value = gather_by_head(key, safe), gather_by_head(value, safe)
    if choose_block_backend(backend, query, want_lse=True).name == "reference":
        # A gathered value that stands for no column must not turn a weight of 0 into NaN.
        packed_value = packed_value.masked_fill((slots >= grid.kv_len)[..., None], 0.0)
        return _reference_columns(query, packed_key, packed_value, opens, grid, scale)
    offset = torch.full((), grid.kv_len - grid.query_len, device=query.device)
    rows_per_block = grid.block_size[0]

    def allowed(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return opens[batch, head, row // rows_per_block, slot] <= row + offset

    packed = BlockGrid(grid.query_len, slots.shape[-1])
    every = torch.arange(packed.kv_blocks, dtype=torch.int32, device=query.device)
    every = every.expand(1, 1, packed.query_blocks, -1).contiguous()
    count = every.new_full(every.shape[:3], packed.kv_blocks)
    blocks = FlexBlocks((count, every), None, allowed, packed.block_size)
    tiles = _device_tiles(query) if query.is_cuda else None
    return Attended(*flex_attention(query, packed_key, packed_value, blocks, scale, True, tiles))


def _device_tiles(query: Tensor) -> dict[str, int]:
    about = torch.cuda.get_device_properties(query.device)
    shared = getattr(about, "shared_memory_per_block_optin", about.shared_memory_per_block)
    return choose_tiles(query.shape[-1], query.element_size(), shared)


def choose_tiles(head_dim: int, element_size: int, shared_memory: int) -> dict[str, int]:
    """Return tiles of FlexAttention that leave shared memory for the mask of the columns.

    The mask reads a number per query and key of a tile, which is pipelined through shared memory
    like keys and values. FlexAttention's own choice does not count these numbers.

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


def _reference_columns(
    query: Tensor, key: Tensor, value: Tensor, opens: Tensor, grid: BlockGrid, scale: float
) -> Attended:
    precision = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(precision), value.to(precision)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for begin in range(0, grid.query_len, _REFERENCE_QUERIES):
        queries = slice(begin, min(begin + _REFERENCE_QUERIES, grid.query_len))
        number = torch.arange(queries.start, queries.stop, device=query.device)
        position = number + (grid.kv_len - grid.query_len)
        seen = opens[:, :, number // grid.block_size[0]] <= position[:, None]
        part = query[:, :, queries].to(precision) * scale
        logits = (part @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf)
        state = OnlineSoftmax.start(part).add(logits, value)
        out[:, :, queries] = state.output().to(out.dtype)
        lse[:, :, queries] = state.lse()
    return Attended(out, lse)


def merge_into(into: Attended, other: Attended) -> None:
    """Merge attention over two disjoint sets of keys into attention over their union, in place.

    ``lse = log(exp(lse_1) + exp(lse_2))``, and each output is weighted by ``exp(lse_i - lse)``.
    A query that sees no key of either gets zeros.

    Args:
        into: ``[B, H, S, D]`` and ``[B, H, S]``, overwritten.
        other: ``[B, H, S, D]`` and ``[B, H, S]``.

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
        queries = slice(begin, begin + step)
        merged = into.out[:, :, queries] * first[:, :, queries]
        merged += other.out[:, :, queries] * second[:, :, queries]
        into.out[:, :, queries] = merged
    into.lse.copy_(lse)
