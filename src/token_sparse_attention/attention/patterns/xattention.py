"""XAttention (arXiv 2503.16428): blocks by the sums of their antidiagonals.

Every stride-th antidiagonal of a block of the attention matrix crosses each of its columns and
diagonals, so the sum over these antidiagonals estimates the block's mass. Concatenating `stride`
queries in reverse order, and `stride` keys in order, gives all of these sums in one product that
is `stride` times shorter on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockGrid, BlockMask
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.patterns.estimate import (
    block_sums,
    check_count,
    check_per_head,
    check_share,
    per_head,
    smallest_cover,
)
from token_sparse_attention.impls import load_kernels, resolve_impl

_SCORE_ELEMENTS = 2**26  # scores held at once, which bounds memory at a quarter of a GiB


@dataclass(frozen=True)
class XAttentionConfig(PatternConfig):
    """Settings of XAttention.

    Args:
        stride: every stride-th antidiagonal is scored; it must divide the block size.
        threshold: share of a block of queries' score that its chosen blocks hold, in
            ``(0, 1]``; a tuple holds one share per query head.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if it is out of range.
    """

    stride: int = 8
    threshold: float | tuple[float, ...] = 0.9

    def __post_init__(self) -> None:
        check_count("stride", self.stride, 1)
        if not isinstance(self.threshold, (list, tuple)):
            check_share("threshold", self.threshold)
            return
        for head, share in enumerate(self.threshold):
            check_share(f"threshold[{head}]", share)
        object.__setattr__(self, "threshold", tuple(self.threshold))  # settings are hashed


def of_heads(config: XAttentionConfig, heads: Sequence[int], num_heads: int) -> XAttentionConfig:
    """Return the settings for some of the `num_heads` query heads, in their order.

    Raises:
        ValueError: if `config.threshold` is a tuple, but not one share per query head.
    """
    if not isinstance(config.threshold, tuple):
        return config
    check_per_head("threshold", "share", config.threshold, num_heads)
    return replace(config, threshold=tuple(config.threshold[head] for head in heads))


def xattention_mask(
    query: Tensor, key: Tensor, config: XAttentionConfig, scale: float,
    block_size: tuple[int, int] = BLOCK_SIZE, impl: str = "auto",
) -> BlockMask:  # fmt: skip
    """Choose for each block of queries the fewest blocks whose scores sum to the threshold.

    See `MakeMask`.

    Raises:
        ValueError: if the stride does not divide the block size, or thresholds per head are not
            as many as the heads.
    """
    if block_size[0] % config.stride or block_size[1] % config.stride:
        raise ValueError(f"stride must divide the block size {block_size}, got {config.stride}")
    grid = BlockGrid(query.shape[2], key.shape[2], block_size)
    threshold: float | Tensor
    if isinstance(config.threshold, tuple):
        check_per_head("threshold", "share", config.threshold, query.shape[1])
        threshold = per_head(config.threshold, torch.float32, query.device)[..., None]
    else:
        threshold = config.threshold
    scores = antidiagonal_scores(query, key, config, grid, scale, impl=impl)
    kept = smallest_cover(scores, threshold, impl=impl)
    return BlockMask.from_block_map(kept, grid, impl=impl)


def antidiagonal_scores(
    query: Tensor, key: Tensor, config: XAttentionConfig, grid: BlockGrid, scale: float, *,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Estimate each block's share of attention, ``[B, H, Q, K]`` float32.

    A score is the mean over the real strided rows of the block.
    """
    stride = config.stride
    if resolve_impl(impl, query, query.shape[-1]) == "triton":
        kernels = load_kernels("estimation_antidiagonal")
        if kernels.can_run(query, stride, grid.block_size):
            estimated: Tensor = kernels.antidiagonal_scores(
                query, key, stride, grid.block_size, scale
            )
            return estimated
    # Scaled first, so that the sums of stride products fit into half precision.
    rows = _strided(query * (scale / stride), stride).flip(-2).flatten(-2)
    columns = _strided(key, stride).flatten(-2)
    per_block = grid.block_size[0] // stride
    last_position = torch.arange(rows.shape[2], device=query.device) * stride + (stride - 1)
    last_position = last_position + (grid.kv_len - grid.query_len)
    begin = torch.arange(columns.shape[2], device=query.device) * stride
    block_scores = query.shape[0] * query.shape[1] * per_block * columns.shape[2]
    at_once = max(_SCORE_ELEMENTS // block_scores, 1) * per_block
    scores = []
    for first in range(0, rows.shape[2], at_once):
        part = rows[:, :, first : first + at_once]
        end = (first + at_once) * stride + grid.kv_len - grid.query_len
        group_rows = part.reshape(*key.shape[:2], -1, part.shape[3])
        logits = (group_rows @ columns[:, :, : -(-end // stride)].transpose(2, 3)).float()
        logits = logits.view(*part.shape[:3], -1)
        seen = begin[: logits.shape[-1]] <= last_position[first : first + at_once, None]
        attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        blocks = block_sums(attention, grid.block_size[1] // stride)
        blocks = block_sums(blocks.transpose(2, 3), per_block).transpose(2, 3)
        scores.append(F.pad(blocks, (0, grid.kv_blocks - blocks.shape[-1])))
    per_row = torch.arange(grid.query_blocks, device=query.device) * per_block
    return torch.cat(scores, 2) / (rows.shape[2] - per_row).clamp(max=per_block)[:, None]


def _strided(tokens: Tensor, stride: int) -> Tensor:
    """``[B, H, S, D]`` as ``[B, H, ceil(S / stride), stride, D]``, padded with zeros."""
    padding = -tokens.shape[2] % stride
    padded = F.pad(tokens, (0, 0, 0, padding))
    return padded.reshape(*tokens.shape[:2], -1, stride, tokens.shape[3])
