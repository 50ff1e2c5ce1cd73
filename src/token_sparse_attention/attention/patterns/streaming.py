"""Attention sinks and a local window (StreamingLLM, arXiv 2309.17453), in blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockGrid, BlockMask
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.patterns.estimate import check_count


@dataclass(frozen=True)
class StreamingConfig(PatternConfig):
    """Settings of sinks and local window, in tokens, rounded to whole blocks.

    Args:
        sink_size: every query attends to the blocks that hold these first tokens.
        local_size: a query attends to the blocks that hold its last tokens, its own included.

    Raises:
        TypeError: if a field is no int.
        ValueError: if it is too small.
    """

    sink_size: int = 128
    local_size: int = 4096

    def __post_init__(self) -> None:
        check_count("sink_size", self.sink_size, 0)
        check_count("local_size", self.local_size, 1)


def streaming_mask(
    query: Tensor, key: Tensor, config: StreamingConfig, scale: float,  # noqa: ARG001
    block_size: tuple[int, int] = BLOCK_SIZE, impl: str = "auto",
) -> BlockMask:  # fmt: skip
    """Return the blocks of the sinks and of the local window; only the inputs' shapes matter."""
    grid = BlockGrid(query.shape[2], key.shape[2], block_size)
    begin = grid.kv_begin(query.device)
    oldest = grid.query_span(query.device)[0][:, None] - (config.local_size - 1)
    kept = (begin < config.sink_size) | (begin + block_size[1] > oldest)
    return BlockMask.from_block_map(kept.expand(*query.shape[:2], -1, -1), grid, impl=impl)
