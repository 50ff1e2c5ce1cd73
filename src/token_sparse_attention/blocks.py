"""Blocks of queries at absolute positions: what KV sampling samples keys for.

A position counts a sequence's real tokens from 0. Block b holds the queries at the positions
``[b * C, (b + 1) * C)``, C the block size, however a prompt is split into calls. Its keys are
sampled from the positions before its reach, which the window of its last query has left behind.
"""

from __future__ import annotations

from typing import NamedTuple

GOLDEN = 2654435769  # 2^32 times the golden ratio's fraction
UNIT_BITS = 18  # inclusion probabilities are rounded to 2^-18
FACTOR_STEPS = 3  # at most, towards the factor by which probabilities add up to the budget


class Blocks(NamedTuple):
    """The blocks of one call that sample keys.

    Attributes:
        size: queries of a block, C, a power of two.
        num_probes: queries of the block before that score a block's keys, W; divides C.
        window: keys that each query sees, itself included, w; at least C.
        sink_size: the first keys, which every query sees and none samples.
        first: the number of the first block, at least 1.
        num_blocks: how many blocks.
    """

    size: int
    num_probes: int
    window: int
    sink_size: int
    first: int
    num_blocks: int

    @property
    def stride(self) -> int:
        """The distance between two probes: probe t stands at ``(t + 1) * stride - 1``."""
        return self.size // self.num_probes

    @property
    def first_reach(self) -> int:
        """The reach of the first block; each further one reaches `size` positions on."""
        return (self.first + 1) * self.size - self.window

    @property
    def num_scores(self) -> int:
        """How many scores a head has: those of block after block, each up to its reach."""
        return self.offset(self.num_blocks)

    def offset(self, index: int) -> int:
        """Return where the scores of a block begin, `index` blocks after the first."""
        return index * self.first_reach + self.size * (index * (index - 1) // 2)
