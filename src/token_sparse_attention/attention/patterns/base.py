"""What a pattern consists of: settings, and a function from Q and K to blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockMask


@dataclass(frozen=True)
class PatternConfig:
    """Settings of a block-sparse pattern: a frozen dataclass whose fields all have defaults."""


class MakeMask(Protocol):
    """Chooses each head's blocks."""

    def __call__(
        self, query: Tensor, key: Tensor, config: Any, scale: float,
        block_size: tuple[int, int] = BLOCK_SIZE, impl: str = "auto",
    ) -> BlockMask:  # fmt: skip
        """Return the blocks to attend to.

        Args:
            query: ``[B, H, S_q, D]``.
            key: ``[B, H_kv, S_kv, D]``.
            config: the settings.
            scale: factor of the logits.
            block_size: queries and keys per block.
            impl: as in `score_tokens`.
        """
