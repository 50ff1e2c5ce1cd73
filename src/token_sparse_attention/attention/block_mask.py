"""Block masks: which blocks of keys each block of queries attends to."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.impls import load_kernels, resolve_impl

BLOCK_SIZE = (128, 128)
_WIDE_ENTRIES = 2**28  # above this many entries (a GiB), a list is as wide as its longest row


class BlockGrid(NamedTuple):
    """How the queries and keys of one problem are divided into blocks.

    Queries are the last `query_len` positions. Their blocks start at the first query, so in a
    chunk the diagonal of the attention matrix need not pass through the corners of blocks.

    Attributes:
        query_len: queries.
        kv_len: keys.
        block_size: queries and keys per block.
    """

    query_len: int
    kv_len: int
    block_size: tuple[int, int] = BLOCK_SIZE

    @property
    def query_blocks(self) -> int:
        """Number of blocks of queries; the last one may be short."""
        return -(-self.query_len // self.block_size[0])

    @property
    def kv_blocks(self) -> int:
        """Number of blocks of keys; the last one may be short."""
        return -(-self.kv_len // self.block_size[1])

    @property
    def diagonal_blocks(self) -> int:
        """Upper bound of the blocks of keys on the diagonal of one block of queries."""
        return min((self.block_size[0] - 2) // self.block_size[1] + 2, self.kv_blocks)

    def query_span(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the first and the last position of each query block, ``[Q]`` int64."""
        begin = torch.arange(self.query_blocks, device=device) * self.block_size[0]
        begin = begin + (self.kv_len - self.query_len)
        return begin, (begin + self.block_size[0] - 1).clamp(max=self.kv_len - 1)

    def kv_begin(self, device: torch.device) -> Tensor:
        """Return the first position of each block of keys, ``[K]`` int64."""
        return torch.arange(self.kv_blocks, device=device) * self.block_size[1]

    def visible(self, device: torch.device) -> Tensor:
        """Return ``[Q, K]`` bool: pairs of blocks in which some query may see some key."""
        return self.kv_begin(device) <= self.query_span(device)[1][:, None]

    def earlier(self, device: torch.device) -> Tensor:
        """Return ``[Q, K]`` bool: blocks of keys that end before the first query of the block.

        The other visible blocks are on the diagonal: they hold the position of a query.
        """
        end = self.kv_begin(device) + (self.block_size[1] - 1)
        return end < self.query_span(device)[0][:, None]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """For each sequence, head and block of queries: the blocks of keys it attends to.

    Within a full block every query attends to every key; within a partial block the causal
    rule applies, aligned at the end. The lists are in the form of flash-attn-4 and
    FlexAttention: `count` block numbers in ascending order, then arbitrary ones.

    Args:
        partial_count: ``[B, H, Q]`` int32.
        partial_index: ``[B, H, Q, P]`` int32, P at most K: only blocks on the diagonal are
            partial, so P is small.
        full_count: ``[B, H, Q]`` int32.
        full_index: ``[B, H, Q, W]`` int32, W at most K.
        grid: the lengths and the block size, which give Q and K.

    Raises:
        TypeError: if a field has the wrong type or dtype.
        ValueError: if shapes or devices do not fit together. `validate` checks the contents.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor
    grid: BlockGrid

    def __post_init__(self) -> None:
        check_grid(self.grid)
        for field in fields(self)[:4]:
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
                given = getattr(tensor, "dtype", type(tensor).__name__)
                raise TypeError(f"{field.name} must be an int32 tensor, got {given}")
            if tensor.device != self.full_count.device:
                raise ValueError(
                    f"{field.name} must be on full_count's device {self.full_count.device}, "
                    f"got {tensor.device}"
                )
        lists = (*self.full_count.shape[:2], self.grid.query_blocks)
        for name in ("partial", "full"):
            count, index = getattr(self, f"{name}_count"), getattr(self, f"{name}_index")
            if count.dim() != 3 or count.shape != lists:
                raise ValueError(
                    f"{name}_count must have shape [B, H, {self.grid.query_blocks}], the same "
                    f"for both lists; got {list(count.shape)}"
                )
            if index.dim() != 4 or index.shape[:3] != lists:
                raise ValueError(
                    f"{name}_index must have shape {[*lists]} and a last dimension, "
                    f"got {list(index.shape)}"
                )
            if index.shape[3] > self.grid.kv_blocks:
                raise ValueError(
                    f"{name}_index must list at most {self.grid.kv_blocks} blocks of keys, "
                    f"got room for {index.shape[3]}"
                )

    @classmethod
    def from_block_map(cls, kept: Tensor, grid: BlockGrid, *, impl: str = "auto") -> BlockMask:
        """Build the lists from a map of blocks to keep, and apply the causal rule.

        Blocks that no query of the block may see are never listed. Blocks on the diagonal are
        always kept, as partial blocks, so that every query sees itself. On CUDA this does not
        wait for the device, unless lists with an entry for every block would exceed a GiB:
        then the length of the longest list is read, and all are as wide as that one.

        Args:
            kept: ``[B, H, Q, K]`` bool.
            grid: the blocks.
            impl: which code packs the lists, as in `score_tokens`.

        Raises:
            TypeError: if `kept` is no bool tensor.
            ValueError: if its shape is not that of the blocks.

        Example:
            >>> kept = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
            >>> kept[..., 0] = True
            >>> mask = BlockMask.from_block_map(kept, BlockGrid(300, 300))
            >>> mask.full_count.tolist(), mask.partial_index[0, 0, :, 0].tolist()
            ([[[0, 1, 1]]], [0, 1, 2])
        """
        check_grid(grid)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            given = getattr(kept, "dtype", type(kept).__name__)
            raise TypeError(f"kept must be a bool tensor, got {given}")
        if kept.dim() != 4 or kept.shape[2:] != (grid.query_blocks, grid.kv_blocks):
            raise ValueError(
                f"kept must have shape [B, H, {grid.query_blocks}, {grid.kv_blocks}] for "
                f"{grid.query_len} queries and {grid.kv_len} keys in blocks of "
                f"{grid.block_size}, "
                f"got {list(kept.shape)}"
            )
        full_count, full_index = _pack_earlier(kept, grid, impl)
        diagonal = grid.visible(kept.device) & ~grid.earlier(kept.device)
        partial_count, partial_index = _pack(diagonal, grid.diagonal_blocks)
        heads = kept.shape[:2]
        return cls(
            partial_count.expand(*heads, -1).contiguous(),
            partial_index.expand(*heads, -1, -1).contiguous(),
            full_count,
            full_index,
            grid,
        )

    def block_map(self) -> Tensor:
        """Return ``[B, H, Q, K]`` bool: the blocks in either list."""
        return self._map("full") | self._map("partial")

    def _map(self, name: str) -> Tensor:
        count, index = getattr(self, f"{name}_count"), getattr(self, f"{name}_index")
        listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        kv_blocks = self.grid.kv_blocks
        found = torch.zeros(
            *count.shape, kv_blocks + 1, dtype=torch.bool, device=index.device
        )  # the last column takes what is not listed
        found.scatter_(-1, torch.where(listed, index.long(), kv_blocks), True)
        return found[..., :kv_blocks]

    def dense_view(self) -> Tensor:
        """Return ``[B, H, S_q, S_kv]`` bool, which keys each query attends to. For tests."""
        query_len, kv_len, (query_size, kv_size) = self.grid
        tokens = self.block_map().repeat_interleave(query_size, -2)[:, :, :query_len]
        tokens = tokens.repeat_interleave(kv_size, -1)[..., :kv_len]
        slot = torch.arange(kv_len, device=tokens.device)
        return tokens & (slot <= slot[kv_len - query_len :, None])

    def density(self) -> Tensor:
        """Return ``[B, H]`` float32: listed pairs of blocks over visible pairs of blocks.

        A partial block counts as much as a full one. Density 1 is dense attention.
        """
        kept = (self.full_count + self.partial_count).sum(-1)
        return kept / self.grid.visible(kept.device).sum()

    def validate(self) -> None:
        """Check the contents; this waits for the device.

        Raises:
            ValueError: if a list breaks a rule; it names the list, the rule and one place.
        """
        device = self.full_count.device
        earlier = self.grid.earlier(device)
        diagonal = self.grid.visible(device) & ~earlier
        for name, allowed, rule in (
            ("full", earlier, "blocks before the block's first query"),
            ("partial", diagonal, "blocks on the diagonal"),
        ):
            count, index = getattr(self, f"{name}_count"), getattr(self, f"{name}_index")
            _reject(
                (count < 0) | (count > index.shape[-1]),
                f"{name}_count must be between 0 and {index.shape[-1]}",
            )
            slot = torch.arange(index.shape[-1], device=device)
            listed = slot < count[..., None]
            outside = listed & ((index < 0) | (index >= self.grid.kv_blocks))
            _reject(outside.any(-1), f"{name}_index must be below {self.grid.kv_blocks}")
            unordered = listed[..., 1:] & (index[..., 1:] <= index[..., :-1])
            _reject(unordered.any(-1), f"{name}_index must ascend without repeats")
            _reject((self._map(name) & ~allowed).any(-1), f"{name}_index must list {rule} only")
        missing = diagonal & ~self._map("partial")
        _reject(missing.any(-1), "partial_index must list every block on the diagonal")


def check_grid(grid: BlockGrid) -> None:
    """Raise TypeError or ValueError unless the lengths and the block size are valid."""
    sizes = grid.block_size
    if not isinstance(sizes, tuple) or len(sizes) != 2:
        raise TypeError(f"block_size must be a pair (queries, keys), got {sizes!r}")
    named = {"query_len": grid.query_len, "kv_len": grid.kv_len, "block_size": sizes[0]}
    for name, value in [*named.items(), ("block_size", sizes[1])]:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must hold whole numbers, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if grid.query_len > grid.kv_len:
        raise ValueError(
            f"query_len must not exceed kv_len, which is {grid.kv_len}; got {grid.query_len}"
        )


def _pack_earlier(kept: Tensor, grid: BlockGrid, impl: str) -> tuple[Tensor, Tensor]:
    """List the kept blocks that end before their row's first query."""
    width = grid.kv_blocks
    triton = resolve_impl(impl, kept.new_empty(0, dtype=torch.float32)) == "triton"
    if kept.numel() > _WIDE_ENTRIES:
        counts = [(rows & grid.earlier(kept.device)).sum(-1).max() for rows in kept.flatten(0, 1)]
        width = max(int(torch.stack(counts).max()), 1)
    if not triton:
        return _pack(kept & grid.earlier(kept.device), width)
    count = torch.empty(kept.shape[:3], dtype=torch.int32, device=kept.device)
    index = torch.zeros(*kept.shape[:3], width, dtype=torch.int32, device=kept.device)
    if kept.stride(-1) != 1:
        kept = kept.contiguous()
    offset = grid.kv_len - grid.query_len
    load_kernels("estimation_lists").pack_blocks(kept, offset, grid.block_size, index, count)
    return count, index


def _pack(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return how many entries of the last dimension are set, and which, in ascending order."""
    slot = torch.where(kept, kept.cumsum(-1) - 1, capacity)
    number = torch.arange(kept.shape[-1], dtype=torch.int32, device=kept.device)
    index = kept.new_zeros(*kept.shape[:-1], capacity + 1, dtype=torch.int32)
    index.scatter_(-1, slot, number.expand_as(slot))
    return kept.sum(-1, dtype=torch.int32), index[..., :capacity].contiguous()


def _reject(broken: Tensor, rule: str) -> None:
    if bool(broken.any()):
        batch, head, block = broken.nonzero()[0].tolist()
        raise ValueError(f"{rule}; broken at batch {batch}, head {head}, query block {block}")
