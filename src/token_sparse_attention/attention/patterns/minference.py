"""MInference's vertical-slash pattern (arXiv 2407.02490), attended as blocks plus columns.

The attention of the last queries gives the heaviest columns (keys that all queries attend to)
and diagonals (distances at which all queries attend). A thousand scattered columns touch nearly
every block, so columns are gathered into a short list of keys, and only diagonals become blocks.
Blocks and columns share no pair of query and key; their outputs are merged by log-sum-exp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockGrid, BlockMask
from token_sparse_attention.attention.block_sparse import attend_blocks
from token_sparse_attention.attention.columns import Columns, add_columns
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.patterns.estimate import (
    blocks_at_distances,
    check_count,
    check_per_head,
    check_share,
    last_query_mass,
    per_head,
)
from token_sparse_attention.records import parse, read_text
from token_sparse_attention.results import Attended

HEAD_PATTERNS = ("vertical_and_slash", "stream_llm")


class HeadBudget(NamedTuple):
    """The budget of one head.

    Attributes:
        pattern: ``"vertical_and_slash"``, or ``"stream_llm"``: the first columns and the
            shortest distances, whatever the attention.
        vertical_size: columns.
        slash_size: diagonals.
    """

    pattern: str
    vertical_size: int
    slash_size: int


@dataclass(frozen=True)
class MInferenceConfig(PatternConfig):
    """Settings of the vertical-slash pattern.

    Args:
        vertical_size: columns per head.
        slash_size: diagonals per head.
        last_queries: how many of the last queries estimate the attention.
        sink_size: the first columns, always kept and counted in the budget.
        local_size: the shortest distances, always kept and counted in the budget; at least 1.
        coverage: if given, a head keeps the fewest columns, and the fewest diagonals, that
            hold this share of the estimated attention; the sizes are then upper bounds.
            It has no effect on ``"stream_llm"`` heads.
        heads: a budget per head, in place of the two sizes.
        layers: `heads` for each layer of a model, or the path of a pattern file, which is read
            at once; see `load_head_budgets`. In a model each layer runs with its own entry;
            attention without a model takes `heads`.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if it is out of range, both `heads` and `layers` are given, or the file
            cannot be read.
    """

    vertical_size: int = 1000
    slash_size: int = 6096
    last_queries: int = 64
    sink_size: int = 30
    local_size: int = 100
    coverage: float | None = None
    heads: tuple[HeadBudget, ...] | None = None
    layers: tuple[tuple[HeadBudget, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_count("vertical_size", self.vertical_size, 1)
        check_count("slash_size", self.slash_size, 1)
        check_count("last_queries", self.last_queries, 1)
        check_count("sink_size", self.sink_size, 0)
        check_count("local_size", self.local_size, 1)
        if self.coverage is not None:
            check_share("coverage", self.coverage)
        if self.heads is not None:
            if not isinstance(self.heads, (list, tuple)):
                raise TypeError(f"heads must hold a budget per head, got {self.heads!r}")
            budgets = tuple(_head_budget(f"heads[{i}]", b) for i, b in enumerate(self.heads))
            object.__setattr__(self, "heads", budgets)
        if self.layers is not None:
            if self.heads is not None:
                raise ValueError("heads and layers must not both be given: layers hold the heads")
            object.__setattr__(self, "layers", _budgets_of_layers(self.layers))


class VerticalSlash(NamedTuple):
    """The columns and diagonals of each head.

    Attributes:
        columns: ``[B, H, C]`` int64, ascending; S_kv stands for no column.
        distances: ``[B, H, S_kv]`` bool, the chosen diagonals by distance.
    """

    columns: Tensor
    distances: Tensor


def minference_attention(
    query: Tensor, key: Tensor, value: Tensor, config: MInferenceConfig, *,
    scale: float, backend: str = "auto", block_size: tuple[int, int] = BLOCK_SIZE,
) -> Attended:  # fmt: skip
    """Attend to the blocks that the chosen diagonals touch, and to the chosen columns.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        config: the settings.
        scale: factor of the logits.
        backend: a block-sparse backend. On CUDA the columns run through FlexAttention, with
            ``"fa4"`` too.
        block_size: queries and keys per block.

    Returns:
        ``[B, H, S_q, D]`` and its log-sum-exp ``[B, H, S_q]`` float32.
    """
    chosen = vertical_slash(query, key, config, scale)
    mask = slash_blocks(chosen, query.shape[2], block_size)
    return attend_chosen(query, key, value, chosen, mask, scale=scale, backend=backend)


def attend_chosen(
    query: Tensor, key: Tensor, value: Tensor, chosen: VerticalSlash, mask: BlockMask, *,
    scale: float, backend: str,
) -> Attended:  # fmt: skip
    """Attend to the blocks of `slash_blocks` and to the chosen columns."""
    attended = attend_blocks(query, key, value, mask, scale=scale, backend=backend, want_lse=True)
    columns = Columns(chosen.columns, mask.block_map(), mask.grid)
    add_columns(attended, query, key, value, columns, scale=scale, backend=backend)
    return attended


def vertical_slash(
    query: Tensor, key: Tensor, config: MInferenceConfig, scale: float, impl: str = "auto"
) -> VerticalSlash:
    """Choose columns and diagonals by the attention of the last queries (algorithm 2).

    Raises:
        ValueError: if `config.heads` is not one budget per query head, or `config.layers` is
            given.
    """
    kv_len = key.shape[2]
    _check_heads(config, query.shape[1])
    count = min(config.last_queries, query.shape[2])
    vertical, slash = last_query_mass(query, key, count, scale, impl=impl)
    budgets = config.heads or (
        HeadBudget("vertical_and_slash", config.vertical_size, config.slash_size),
    )
    streaming = tuple(budget.pattern == "stream_llm" for budget in budgets)
    fixed = per_head(streaming, torch.bool, query.device) if any(streaming) else None
    _, columns_of, diagonals_of = zip(*budgets)
    columns = _heaviest(vertical, config.sink_size, columns_of, config.coverage, fixed)
    chosen = _heaviest(slash, config.local_size, diagonals_of, config.coverage, fixed)
    distances = torch.zeros(*slash.shape[:2], kv_len + 1, dtype=torch.bool, device=slash.device)
    distances.scatter_(-1, chosen, True)
    return VerticalSlash(columns.sort(-1).values, distances[..., :kv_len])


def of_heads(config: MInferenceConfig, heads: Sequence[int], num_heads: int) -> MInferenceConfig:
    """Return the settings for some of the `num_heads` query heads, in their order.

    Raises:
        ValueError: if `config.heads` is not one budget per query head, or `config.layers` is
            given.
    """
    _check_heads(config, num_heads)
    if config.heads is None:
        return config
    return dataclasses.replace(config, heads=tuple(config.heads[head] for head in heads))


def of_layer(config: MInferenceConfig, layer: int, num_layers: int) -> MInferenceConfig:
    """Return the settings for one of a model's layers.

    Raises:
        ValueError: if `config.layers` has not an entry for each of `num_layers` layers.
    """
    if config.layers is None:
        return config
    if len(config.layers) != num_layers:
        raise ValueError(
            f"layers must have an entry for each of the model's {num_layers} layers, "
            f"got {len(config.layers)}"
        )
    return dataclasses.replace(config, heads=config.layers[layer], layers=None)


def _check_heads(config: MInferenceConfig, num_heads: int) -> None:
    if config.layers is not None:
        raise ValueError(
            "layers must be None where one layer's attention runs, which does not know its "
            "number; give that layer's budgets as heads"
        )
    if config.heads is not None:
        check_per_head("heads", "budget", config.heads, num_heads)


def _heaviest(
    mass: Tensor, always: int, sizes: tuple[int, ...], coverage: float | None, fixed: Tensor | None
) -> Tensor:
    """Choose as many entries per head as `sizes` says: the first `always`, then the heaviest.

    Heads in `fixed` choose the first entries only.

    Returns:
        ``[B, H, C]`` int64, in no order; N, the length of `mass`, stands for no entry.
    """
    length = mass.shape[-1]
    most = min(max(sizes), length)
    # Masses are at most 1, so these weights of the first entries exceed all of them.
    nearness = torch.arange(length + 1, 1, -1, device=mass.device, dtype=mass.dtype)
    ahead = torch.arange(length, device=mass.device) < always
    if fixed is not None:
        ahead = ahead | fixed
    ordered = torch.where(ahead, nearness, mass).topk(most, sorted=len(set(sizes)) > 1).indices
    if len(set(sizes)) > 1:
        within = torch.arange(most, device=mass.device) < per_head(sizes, torch.int64, mass.device)
        ordered = ordered.masked_fill(~within, length)
    if coverage is None or coverage >= 1:
        return ordered
    # The budget cuts off a larger cover, so no more entries than the budget are sorted.
    heavy, entries = mass.topk(most)
    covered = heavy.cumsum(-1) - heavy >= coverage * mass.sum(-1, keepdim=True)
    needed = torch.zeros(*mass.shape[:-1], length + 1, dtype=torch.bool, device=mass.device)
    needed[..., :length] = ahead
    needed.scatter_(-1, entries.masked_fill(covered, length), True)
    return ordered.masked_fill(~needed.gather(-1, ordered), length)


def slash_blocks(
    chosen: VerticalSlash, query_len: int, block_size: tuple[int, int] = BLOCK_SIZE,
    impl: str = "auto",
) -> BlockMask:  # fmt: skip
    """Return the blocks that a chosen diagonal passes through."""
    grid = BlockGrid(query_len, chosen.distances.shape[-1], block_size)
    kept = blocks_at_distances(chosen.distances, grid, impl=impl)
    return BlockMask.from_block_map(kept, grid, impl=impl)


def load_head_budgets(path: str | Path) -> list[tuple[HeadBudget, ...]]:
    """Read each layer's head budgets from a JSON pattern file.

    The file holds a list with an entry per layer: a list of heads, or an object from head
    numbers to heads. A head is ``[pattern, vertical_size, slash_size]``; what follows (the
    score in published files) is not read.

    Raises:
        ValueError: if the file cannot be read, is not of this form, or names an unknown pattern.
        TypeError: if a size is no int.
    """
    layers = parse(str(path), read_text(Path(path)))
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{path} must hold a list with an entry per layer")
    return [_layer_budgets(f"{path}: layer {i}", layer) for i, layer in enumerate(layers)]


def _budgets_of_layers(layers: Any) -> tuple[tuple[HeadBudget, ...], ...]:
    if isinstance(layers, (str, Path)):
        return tuple(load_head_budgets(layers))
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(f"layers must hold head budgets per layer, or be a path; got {layers!r}")
    return tuple(_layer_budgets(f"layers[{i}]", layer) for i, layer in enumerate(layers))


def _layer_budgets(where: str, layer: Any) -> tuple[HeadBudget, ...]:
    if isinstance(layer, dict):
        numbers = [str(head) for head in range(len(layer))]
        if sorted(layer) != sorted(numbers):
            raise ValueError(f"{where} must number its heads from 0, got {sorted(layer)}")
        layer = [layer[number] for number in numbers]
    if not isinstance(layer, (list, tuple)) or not layer:
        raise ValueError(f"{where} must be a list of heads or an object from number to head")
    return tuple(_head_budget(f"{where}, head {i}", head) for i, head in enumerate(layer))


def _head_budget(where: str, head: Any) -> HeadBudget:
    if not isinstance(head, (list, tuple)) or len(head) < 3:
        raise ValueError(f"{where} must be [pattern, vertical_size, slash_size], got {head!r}")
    pattern, vertical_size, slash_size = head[:3]
    if pattern not in HEAD_PATTERNS:
        raise ValueError(
            f"{where} must have a pattern among {', '.join(HEAD_PATTERNS)}; got {pattern!r}"
        )
    check_count(f"{where} vertical_size", vertical_size, 1)
    check_count(f"{where} slash_size", slash_size, 1)
    return HeadBudget(pattern, vertical_size, slash_size)
