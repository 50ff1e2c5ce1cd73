"""Sink and local attention (StreamingLLM, arXiv 2309.17453): the first tokens and the last."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockGrid, BlockMask
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.patterns.estimate import check_count


@dataclass(frozen=True)
class StreamingConfig(PatternConfig):
    """Settings of sink and local attention, in tokens; both act in whole blocks.

    Args:
        sink_size: every query sees the blocks that hold these first tokens.
        local_size: a query sees the blocks that hold its last tokens, itself included.

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
    query: Tensor,
    key: Tensor,
    config: StreamingConfig,
    scale: float,  # noqa: ARG001 - all patterns are called alike
    block_size: tuple[int, int] = BLOCK_SIZE,
    impl: str = "auto",
) -> BlockMask:
    """Return the blocks of the sink and of the local window; the inputs only give shapes."""
    grid = BlockGrid(query.shape[2], key.shape[2], block_size)
    begin = grid.kv_begin(query.device)
    oldest = grid.query_span(query.device)[0][:, None] - (config.local_size - 1)
    kept = (begin < config.sink_size) | (begin + block_size[1] > oldest)
    return BlockMask.from_block_map(
        kept.expand(*query.shape[:2], -1, -1),
        query_len=grid.query_len,
        kv_len=grid.kv_len,
        block_size=block_size,
        impl=impl,
    )
