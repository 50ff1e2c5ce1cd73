"""FlexPrefill (arXiv 2502.20766): each head's pattern and budget from its own attention.

The last block of queries represents all queries. Where the attention between block means
predicts that block's true attention, the head is *query-aware*: the means choose its blocks.
Otherwise it is *vertical-slash*: it keeps the columns and diagonals of the last block's
attention. Both kinds keep the fewest blocks that hold a share gamma of the estimated attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockGrid, BlockMask
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.patterns.estimate import (
    block_means,
    block_sums,
    blocks_at_distances,
    check_count,
    check_share,
    last_query_mass,
    smallest_cover,
)


@dataclass(frozen=True)
class FlexPrefillConfig(PatternConfig):
    """Settings of FlexPrefill.

    Args:
        gamma: share of the estimated attention that the chosen blocks hold, in ``(0, 1]``.
        tau: a head is query-aware if the square root of the Jensen-Shannon divergence (in
            nats) between estimate and truth is below this; 0 makes every head vertical-slash.
        min_budget: fewest tokens that a head keeps: per block of queries if query-aware; in
            columns, and again in diagonals, if vertical-slash.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if it is out of range.
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("tau", self.tau, zero=True)
        check_count("min_budget", self.min_budget, 0)


class LastBlock(NamedTuple):
    """The attention of the last block of queries.

    Attributes:
        columns: ``[B, H, K]`` float32, its mass on each block of keys.
        distances: ``[B, H, K]`` float32, its mass at distances of 0, 1, ... blocks of keys.
        divergence: ``[B, H]`` float32, `divergence` of the prediction from block means.
    """

    columns: Tensor
    distances: Tensor
    divergence: Tensor


def flexprefill_mask(
    query: Tensor, key: Tensor, config: FlexPrefillConfig, scale: float,
    block_size: tuple[int, int] = BLOCK_SIZE, impl: str = "auto",
) -> BlockMask:  # fmt: skip
    """Choose every head's blocks (algorithm 1); see `MakeMask`.

    The first block of keys and the blocks on the diagonal are always kept.
    """
    grid = BlockGrid(query.shape[2], key.shape[2], block_size)
    key_means = block_means(key, block_size[1], impl=impl)
    last = last_block(query, key, key_means, grid, scale, impl)
    kept = torch.where(
        (last.divergence < config.tau)[..., None, None],
        query_aware_blocks(query, key_means, config, grid, scale, impl),
        vertical_slash_blocks(last, config, grid, impl),
    )
    kept[..., 0] = True
    return BlockMask.from_block_map(kept, grid, impl=impl)


def last_block(
    query: Tensor, key: Tensor, key_means: Tensor, grid: BlockGrid, scale: float,
    impl: str = "auto",
) -> LastBlock:  # fmt: skip
    """Attend with the last block of queries and compare with the estimate (algorithm 2)."""
    count = min(grid.block_size[0], grid.query_len)
    by_key, by_distance = last_query_mass(query, key, count, scale, impl=impl)
    columns, distances = (block_sums(mass, grid.block_size[1]) for mass in (by_key, by_distance))
    recent = query[:, :, -count:].mean(2, dtype=torch.float32)
    recent = recent.view(*key_means.shape[:2], -1, recent.shape[2])  # a group's heads in a row
    estimate = (recent @ key_means.transpose(2, 3) * scale).softmax(-1).view_as(columns)
    return LastBlock(columns, distances, divergence(estimate, columns))


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions over the last dimension."""
    middle = (one + other) / 2
    apart = sum(torch.xlogy(side, side) - torch.xlogy(side, middle) for side in (one, other))
    return (torch.as_tensor(apart).sum(-1) / 2).clamp(min=0).sqrt()


def query_aware_blocks(
    query: Tensor, key_means: Tensor, config: FlexPrefillConfig, grid: BlockGrid, scale: float,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Blocks by the attention between block means, over all blocks of a head (algorithm 4)."""
    means = block_means(query, grid.block_size[0], impl=impl)
    means = means.reshape(*key_means.shape[:2], -1, means.shape[3])  # a group's heads in a row
    logits = (means * scale) @ key_means.transpose(2, 3)
    logits = logits.view(*query.shape[:2], grid.query_blocks, grid.kv_blocks)
    attention = logits.masked_fill_(~grid.visible(query.device), -torch.inf).softmax(-1)
    chosen = smallest_cover(attention.flatten(2), config.gamma, impl=impl).view_as(attention)
    minimum = _min_blocks(config, grid)
    return chosen | smallest_cover(attention, 0.0, minimum, impl=impl) if minimum else chosen


def vertical_slash_blocks(
    last: LastBlock, config: FlexPrefillConfig, grid: BlockGrid, impl: str = "auto"
) -> Tensor:
    """Blocks of columns and of diagonals, each with the share gamma (algorithm 3).

    Coverage is counted in whole blocks, as a kernel runs them. A chosen block of diagonals
    keeps every block that one of its diagonals passes through.
    """
    minimum = _min_blocks(config, grid)
    vertical = smallest_cover(last.columns, config.gamma, minimum, impl=impl)
    slash = smallest_cover(last.distances, config.gamma, minimum, impl=impl)
    distances = slash.repeat_interleave(grid.block_size[1], -1)[..., : grid.kv_len]
    return vertical[:, :, None] | blocks_at_distances(distances, grid, impl=impl)


def _min_blocks(config: FlexPrefillConfig, grid: BlockGrid) -> int:
    return -(-config.min_budget // grid.block_size[1])
