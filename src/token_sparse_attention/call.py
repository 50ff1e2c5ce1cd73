"""What one call of the operator is given and returns, and the call as PyTorch's operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.selection import TokenSelection


class SparseOutput(NamedTuple):
    """What `token_sparse_attention` returns when more than the output is asked for.

    Attributes:
        output: ``[B, H, S_q, D]``.
        selection: the tokens each head kept; None unless asked for.
        lse: ``[B, H, S_q]`` float32, the log-sum-exp of each query's scaled logits over the
            keys it attended to, -inf where the output is zero; None unless asked for.
    """

    output: Tensor
    selection: TokenSelection | None
    lse: Tensor | None


class Call(NamedTuple):
    """How one call runs, beside its tensors and config; see `token_sparse_attention`."""

    scale: float
    impl: str
    attention_backend: str
    head_chunk: int | None = None
    kept: float | None = None
    want_selection: bool = False
    want_indices: bool = False  # of a selection that is wanted
    want_lse: bool = False


def call_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    config: TokenSparseConfig,
    call: Call,
) -> SparseOutput:
    """Make the call as one operator, which a compiler does not look into."""
    output, lse, indices, lengths, budget, ran_sparse = torch.ops.token_sparse_attention.prefill(
        query,
        key,
        value,
        padding_mask,
        config.drop_mass,
        config.window_size,
        config.pool_size,
        config.min_tokens,
        config.budget,
        config.select_queries,
        config.dense_queries,
        config.dense_heads,
        config.fallback,
        config.fallback_window,
        config.fallback_sinks,
        config.fallback_landmarks,
        config.fallback_samples,
        config.crossover,
        *call,
    )
    selection = TokenSelection(indices, lengths, ran_sparse, key.shape[2], budget)
    return SparseOutput(
        output, selection if call.want_selection else None, lse if call.want_lse else None
    )
