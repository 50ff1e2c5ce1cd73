"""Block-sparse patterns by name: each is a config and a function from Q and K to blocks.

A new pattern adds one of each and a line in `PATTERNS`; `streaming` is the shortest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from token_sparse_attention.attention.block_mask import (
    BLOCK_SIZE,
    BlockGrid,
    check_grid,
)
from token_sparse_attention.attention.block_sparse import (
    attend_blocks,
    choose_block_backend,
    kv_head_portions,
)
from token_sparse_attention.attention.patterns.base import MakeMask, PatternConfig
from token_sparse_attention.attention.patterns.flexprefill import (
    FlexPrefillConfig,
    flexprefill_mask,
)
from token_sparse_attention.attention.patterns.minference import (
    MInferenceConfig,
    minference_attention,
    of_heads,
    of_layer,
)
from token_sparse_attention.attention.patterns.streaming import StreamingConfig, streaming_mask
from token_sparse_attention.attention.patterns.xattention import (
    XAttentionConfig,
    xattention_mask,
)
from token_sparse_attention.attention.patterns.xattention import of_heads as thresholds_of_heads
from token_sparse_attention.inputs import (
    check_attention_inputs,
    check_no_gradients,
    resolve_scale,
)
from token_sparse_attention.results import Attended

__all__ = [
    "PATTERNS",
    "FlexPrefillConfig",
    "MInferenceConfig",
    "Pattern",
    "PatternConfig",
    "StreamingConfig",
    "XAttentionConfig",
    "find_pattern",
]


_BLOCK_PAIRS = 2**27  # pairs of blocks per portion: half a GiB of float32


def _same_for_all_heads(config: Any, heads: Sequence[int], num_heads: int) -> Any:  # noqa: ARG001
    return config


def _same_for_all_layers(config: Any, layer: int, num_layers: int) -> Any:  # noqa: ARG001
    return config


class Pattern(NamedTuple):
    """A block-sparse pattern.

    Attributes:
        config: class of its settings.
        run: `attend` on checked arguments.
        of_heads: maps settings, the numbers of some query heads and the number of all heads to
            the settings of these heads; only settings that name heads need it.
        of_layer: maps settings, a layer's number and the number of layers to the settings of
            that layer; only settings that name layers need it.
    """

    config: type[PatternConfig]
    run: Callable[..., Attended]
    of_heads: Callable[[Any, Sequence[int], int], Any] = _same_for_all_heads
    of_layer: Callable[[Any, int, int], Any] = _same_for_all_layers

    @overload
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, config: Any = ..., *,
        scale: float | None = ..., backend: str = ..., return_lse: Literal[False] = ...,
        block_size: tuple[int, int] = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, config: Any = ..., *,
        scale: float | None = ..., backend: str = ..., return_lse: Literal[True],
        block_size: tuple[int, int] = ...,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, config: Any = None, *,
        scale: float | None = None, backend: str = "auto", return_lse: bool = False,
        block_size: tuple[int, int] = BLOCK_SIZE,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Causal attention by this pattern, in place of dense causal attention.

        Args:
            query: ``[B, H, S_q, D]``, the last S_q positions.
            key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv.
            value: ``[B, H_kv, S_kv, D]``.
            config: an instance of the pattern's `config` class; its defaults if None.
            scale: factor of the logits, ``1 / sqrt(D)`` if None.
            backend: as in `block_sparse_attention`.
            return_lse: also return the log-sum-exp.
            block_size: queries and keys per block; fa4 and flex need the default on CUDA.

        Returns:
            ``[B, H, S_q, D]``, or a pair with the log-sum-exp ``[B, H, S_q]`` float32.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if shapes do not fit, or the backend is unknown or cannot run them.

        Example:
            >>> query = torch.randn(1, 4, 300, 32)
            >>> key, value = torch.randn(2, 1, 2, 300, 32)
            >>> find_pattern("streaming").attend(query, key, value).shape
            torch.Size([1, 4, 300, 32])
        """
        check_attention_inputs(query, key, value)
        check_no_gradients(query=query, key=key, value=value)
        if config is None:
            config = self.config()
        if not isinstance(config, self.config):
            raise TypeError(
                f"config must be a {self.config.__name__}, got {type(config).__name__}"
            )
        check_grid(BlockGrid(query.shape[2], key.shape[2], block_size))
        # Before the estimate: a backend that cannot run is refused at no cost.
        choose_block_backend(backend, query, block_size, want_lse=return_lse)
        with torch.no_grad():
            out, lse = self.run(
                *(query, key, value, config),
                scale=resolve_scale(scale, query.shape[-1]),
                backend=backend,
                block_size=block_size,
                want_lse=return_lse,
            )
        return out if lse is None else (out, lse)


def find_pattern(name: str) -> Pattern:
    """Return a pattern by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in PATTERNS:
        near = difflib.get_close_matches(str(name), PATTERNS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}; got {name!r}{hint}")
    return PATTERNS[name]


def _from_mask(make_mask: MakeMask) -> Callable[..., Attended]:
    """Return the `Pattern.run` of a function that chooses blocks."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, config: Any, *,
        scale: float, backend: str, block_size: tuple[int, int], want_lse: bool,
    ) -> Attended:  # fmt: skip
        mask = make_mask(query, key, config, scale, block_size)
        return attend_blocks(
            query, key, value, mask, scale=scale, backend=backend, want_lse=want_lse
        )

    return run


def _in_portions(
    run: Callable[..., Attended],
    of_heads: Callable[[Any, Sequence[int], int], Any] = _same_for_all_heads,
) -> Callable[..., Attended]:
    """Return a `Pattern.run` that takes a portion of the KV heads at a time for many blocks.

    Estimates and lists have an entry for every pair of blocks of a head: at a million tokens
    and 32 heads, eight GiB per tensor.
    """

    def in_portions(
        query: Tensor, key: Tensor, value: Tensor, config: Any, **settings: Any
    ) -> Attended:
        grid = BlockGrid(query.shape[2], key.shape[2], settings["block_size"])
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        pairs = len(query) * num_heads // num_kv_heads * grid.query_blocks * grid.kv_blocks
        portion = max(_BLOCK_PAIRS // pairs, 1)
        if portion >= num_kv_heads:
            return run(query, key, value, config, **settings)
        out, lse = torch.empty_like(query), None
        if settings["want_lse"]:
            lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for heads, kv_heads in kv_head_portions(num_heads, num_kv_heads, portion):
            part = run(
                *(query[:, heads], key[:, kv_heads], value[:, kv_heads]),
                of_heads(config, range(num_heads)[heads], num_heads),
                **settings,
            )
            out[:, heads] = part.out
            if lse is not None and part.lse is not None:
                lse[:, heads] = part.lse
        return Attended(out, lse)

    return in_portions


def _minference(*arguments: Any, want_lse: bool, **settings: Any) -> Attended:
    out, lse = minference_attention(*arguments, **settings)
    return Attended(out, lse if want_lse else None)


PATTERNS = {
    "flexprefill": Pattern(FlexPrefillConfig, _in_portions(_from_mask(flexprefill_mask))),
    "minference": Pattern(
        MInferenceConfig, _in_portions(_minference, of_heads), of_heads, of_layer
    ),
    "xattention": Pattern(
        XAttentionConfig,
        _in_portions(_from_mask(xattention_mask), thresholds_of_heads),
        thresholds_of_heads,
    ),
    "streaming": Pattern(StreamingConfig, _in_portions(_from_mask(streaming_mask))),
}
