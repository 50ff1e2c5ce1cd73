"""The queries that score a block's keys: probes, evenly spread over the block before.

Most stand in the call itself. The first blocks of a call that continues a prompt need those of
earlier calls, which the caller may have kept: `inputs.PastProbes`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.blocks import Blocks
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.inputs import Problem


class Probes(NamedTuple):
    """The probes of some blocks.

    Attributes:
        query: ``[B, H, count * W, D]``, block after block.
        valid: ``[B, count * W]`` bool, which are known; None for all.
    """

    query: Tensor
    valid: Tensor | None

    def of_blocks(self, blocks: Blocks, begin: int, end: int) -> Probes:
        """Return the probes of some of the blocks, by their indices."""
        if end - begin == blocks.num_blocks:
            return self
        some = slice(begin * blocks.num_probes, end * blocks.num_probes)
        return Probes(self.query[:, :, some], None if self.valid is None else self.valid[:, some])


def blocks_of(config: KVSamplingConfig, problem: Problem, sparse_from: int) -> Blocks | None:
    """Return the blocks of a call that may have sparse queries; None if there are none.

    Args:
        config: the settings.
        problem: the inputs.
        sparse_from: the first position that may attend sparsely, a multiple of the block size.
    """
    size, tokens = config.block_size, problem.tokens
    first_position, longest = 0, problem.kv_len
    if tokens.spans:
        positions = [max(problem.first_query - span.start, 0) for span in tokens.spans]
        first_position, longest = min(positions), max(s.end - s.start for s in tokens.spans)
    first = max(sparse_from, first_position) // size
    if not tokens.padded and problem.chunk.past_probes is None and problem.first_query:
        first = max(first, _first_scored(problem.first_query, config))
    count = -(-longest // size) - first
    if count <= 0:
        return None
    return Blocks(size, config.num_probes, config.sliding_window, config.sink_size, first, count)


def _first_scored(first_query: int, config: KVSamplingConfig) -> int:
    """Return the first block that the call's own queries score, without earlier ones."""
    block, offset = divmod(first_query, config.block_size)
    own = config.num_probes - offset // config.probe_stride  # probes of that block in the call
    return block + (1 if 2 * own >= config.num_probes else 2)


def probe_positions(blocks: Blocks, device: torch.device) -> Tensor:
    """Return where the blocks' probes stand, ``[count * W]`` int64, block after block."""
    probe = torch.arange(1, blocks.num_blocks * blocks.num_probes + 1, device=device)
    return (blocks.first - 1) * blocks.size + blocks.stride * probe - 1


def find_probes(problem: Problem, blocks: Blocks) -> Probes:
    """Return the probes of the blocks, from the call and from what earlier calls left."""
    stride, number = blocks.stride, blocks.num_blocks * blocks.num_probes
    first = (blocks.first - 1) * blocks.size + stride - 1  # the first one's position
    query, tokens, past = problem.query, problem.tokens, problem.chunk.past_probes
    if not tokens.padded and first >= problem.first_query:
        begin = first - problem.first_query
        return Probes(query[:, :, begin : begin + (number - 1) * stride + 1 : stride], None)
    position = probe_positions(blocks, query.device)
    start = tokens.bounds[:, :1].long()
    index = start + position - problem.first_query
    inside = (index >= 0) & (index < query.shape[2])
    at = index.clamp(0, query.shape[2] - 1)
    found = torch.take_along_dim(query, at[:, None, :, None], 2)
    if past is None:
        return Probes(found, inside)
    entry = (position // stride) % past.position.shape[1]
    kept = (past.position[:, entry] == position) & ~inside
    found = torch.where(kept[:, None, :, None], past.query[:, :, entry], found)
    return Probes(found, inside | kept)


def first_sparse_slots(problem: Problem, blocks: Blocks, probes: Probes) -> Tensor:
    """Return the slot of each sequence's first query that attends sparsely, ``[B]`` int32.

    It is the first in `blocks`, after the last block with fewer than half of its probes.
    """
    start, end = problem.tokens.bounds.unbind(-1)
    first_position = (problem.first_query - start).clamp(min=0)
    begins = torch.full_like(start, blocks.first)
    if probes.valid is not None:
        number = blocks.first + torch.arange(
            blocks.num_blocks, dtype=torch.int32, device=start.device
        )
        known = probes.valid.view(len(start), blocks.num_blocks, -1).sum(-1)
        present = ((number + 1) * blocks.size > first_position[:, None]) & (
            number * blocks.size < (end - start)[:, None]
        )
        unknown = present & (2 * known < blocks.num_probes)
        begins = torch.where(unknown, number + 1, blocks.first).amax(-1)
    return start + torch.maximum(begins * blocks.size, first_position).to(torch.int32)
