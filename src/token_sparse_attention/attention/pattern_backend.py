"""A block-sparse pattern in the place of dense causal attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from token_sparse_attention.attention.backend import (
    Backend,
    PackedHeads,
    Tensors,
    split_lengths,
)
from token_sparse_attention.attention.block_mask import BLOCK_SIZE
from token_sparse_attention.attention.names import pattern_name
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.results import Attended, PackedSequences


@dataclass(frozen=True, kw_only=True)
class PatternBackend(Backend):
    """A pattern, which reads lengths on the host.

    Attributes:
        pattern: its settings.
        dense_kernel: what attends within sliding windows, and for the dense last queries.
    """

    pattern: PatternConfig
    dense_kernel: Backend

    @property
    def dense(self) -> Backend:
        """See `Backend.dense`."""
        return self.dense_kernel

    def _attend(
        self, tensors: Tensors, scale: float, window: int | None, want_lse: bool
    ) -> Attended:
        """A sliding window is sparse already and needs no pattern."""
        if window is not None and window < tensors[1].shape[2]:
            raise ValueError(f"window must be None for the pattern {self.name}, got {window}")
        return _attend(self.pattern, *tensors, scale, want_lse)

    def attend_packed(
        self, packed: PackedSequences, of: PackedHeads, *, scale: float, want_lse: bool = False
    ) -> Attended:
        """See `Backend.attend_packed`; sequences of equal lengths are the heads of one problem."""
        query, key, value = packed[:3]
        equal: dict[tuple[int, int], list[int]] = {}
        for number, lengths in enumerate(zip(*split_lengths(packed))):
            equal.setdefault(lengths, []).append(number)
        begins_q, begins_k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
        of_heads = PATTERNS[pattern_name(self.pattern)].of_heads
        out = torch.empty_like(query)
        lse = query.new_empty(len(query), dtype=torch.float32) if want_lse else None
        for (query_len, kv_len), numbers in equal.items():
            if query_len == 0:
                continue
            queries = [slice(begins_q[n], begins_q[n] + query_len) for n in numbers]
            keys = [slice(begins_k[n], begins_k[n] + kv_len) for n in numbers]
            one = _attend(
                of_heads(self.pattern, [of.heads[n] for n in numbers], of.num_heads),
                _as_heads(query, queries),
                _as_heads(key, keys),
                _as_heads(value, keys),
                scale,
                want_lse,
            )
            for head, rows in enumerate(queries):
                out[rows] = one.out[0, head]
                if lse is not None and one.lse is not None:
                    lse[rows] = one.lse[0, head]
        return Attended(out, lse)


def _as_heads(packed: Tensor, rows: list[slice]) -> Tensor:
    """Sequences of one length as ``[1, sequences, S, D]``; a view if they lie side by side."""
    first, last = rows[0], rows[-1]
    if last.stop - first.start == len(rows) * (first.stop - first.start):
        return packed[first.start : last.stop].view(1, len(rows), -1, packed.shape[-1])
    return torch.stack([packed[one] for one in rows])[None]


def _attend(
    config: PatternConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    want_lse: bool,
) -> Attended:
    """Attend by a pattern; which executor runs its blocks is chosen by itself."""
    return PATTERNS[pattern_name(config)].run(
        query,
        key,
        value,
        config,
        scale=scale,
        backend="auto",
        block_size=BLOCK_SIZE,
        want_lse=want_lse,
    )
