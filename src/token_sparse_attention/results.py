"""What the operator returns: output, the tokens that every head attended over, log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.inputs import RealTokens


class TokenSelection(NamedTuple):
    """The tokens that a method chose for every head.

    For token selection these are the tokens that a head keeps; for KV sampling its sinks and
    samples, which every query sees behind its window. A dense sequence, or head, lists all.

    Attributes:
        indices: ``[B, H, K]`` integers, the chosen slots in ascending order, -1 after a head's
            last one; K is any capacity that fits.
        lengths: ``[B, H]`` integers, how many tokens are chosen for each head.
        ran_sparse: ``[B]`` bool, whether the sequence ran sparse.
        kv_len: slots that the indices count from 0; None means as many as there are queries.
        reasons: ``[B]`` int32, why each sequence ran dense, `gate.reason_of` the number; 0
            for sparse ones; None where nobody asked.
        num_blocks: ``[B]`` integers, KV sampling's blocks of the call whose queries attend to
            samples, 0 for dense sequences; None for other methods and from a compiled call.
    """

    indices: Tensor
    lengths: Tensor
    ran_sparse: Tensor
    kv_len: int | None = None
    reasons: Tensor | None = None
    num_blocks: Tensor | None = None

    def sparse_only(self) -> TokenSelection:
        """Return the selection with the dense sequences emptied."""
        dense = ~self.ran_sparse
        return self._replace(
            indices=self.indices.masked_fill(dense[:, None, None], -1),
            lengths=self.lengths.masked_fill(dense[:, None], 0),
        )

    def without_indices(self) -> TokenSelection:
        """Return the selection without `indices`, and holding no memory of them."""
        return self._replace(indices=self.indices.new_empty(*self.lengths.shape, 0))

    def to_int64(self) -> TokenSelection:
        """Return the selection with 64-bit indices and lengths, which index tensors."""
        return self._replace(indices=self.indices.long(), lengths=self.lengths.long())


class Attended(NamedTuple):
    """Attention output, and its log-sum-exp if it was asked for."""

    out: Tensor
    lse: Tensor | None

    def of_heads(self, heads: slice) -> Attended:
        """Return views of some heads."""
        return Attended(self.out[:, heads], None if self.lse is None else self.lse[:, heads])

    def of_queries(self, queries: slice) -> Attended:
        """Return views of some queries."""
        lse = None if self.lse is None else self.lse[:, :, queries]
        return Attended(self.out[:, :, queries], lse)


class PackedSequences(NamedTuple):
    """Packed attention inputs: one sequence per batch entry and head, in that order.

    The tensors may be larger than the sequences together; rows beyond them hold nothing.

    Attributes:
        query: ``[T_q, D]``, the selected queries.
        key: ``[T_k, D]``, the selected keys.
        value: ``[T_k, D]``, the selected values.
        cu_seqlens_q: ``[B * H + 1]`` int32, where each sequence's queries start.
        cu_seqlens_k: ``[B * H + 1]`` int32, where each sequence's keys start.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class SparseOutput(NamedTuple):
    """What `token_sparse_attention` returns when more than the output is asked for.

    Attributes:
        output: ``[B, H, S_q, D]``.
        selection: what the method chose for each head; None unless asked for.
        lse: ``[B, H, S_q]`` float32, the log-sum-exp of each query's scaled logits over the
            keys it attended to, -inf where the output is zero; None unless asked for.
    """

    output: Tensor
    selection: TokenSelection | None
    lse: Tensor | None


def dense_selection(
    tokens: RealTokens, num_heads: int, *, want_indices: bool = True
) -> TokenSelection:
    """Return the selection of a batch in which every sequence runs dense."""
    start, end = tokens.bounds.long().unbind(-1)
    slot = torch.arange(tokens.kv_len if want_indices else 0, device=start.device)
    listed = torch.where(slot < (end - start)[:, None], slot + start[:, None], -1)
    lengths = (end - start)[:, None].expand(-1, num_heads).contiguous()
    return TokenSelection(
        indices=listed[:, None].expand(-1, num_heads, -1).contiguous(),
        lengths=lengths,
        ran_sparse=torch.zeros(len(start), dtype=torch.bool, device=start.device),
        kv_len=tokens.kv_len,
    )
