"""Which tokens each head attends over: score, smooth, budget, select (Dynamic Token Coverage)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention import reference
from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.inputs import (
    Span,
    check_attention_inputs,
    check_config,
    check_no_gradients,
    real_spans,
    resolve_scale,
)


class TokenSelection(NamedTuple):
    """The tokens every head keeps.

    Attributes:
        indices: ``[B, H, K]`` int64, the kept slots in ascending order, -1 after a head's
            last one; K is any capacity that fits. A dense row lists all its real tokens.
        lengths: ``[B, H]`` int64, how many tokens each head keeps.
        ran_sparse: ``[B]`` bool, whether the row was sparsified at all.
        kv_len: slots that the indices count from 0; None means as many as there are queries.
    """

    indices: Tensor
    lengths: Tensor
    ran_sparse: Tensor
    kv_len: int | None = None

    def sparse_rows_only(self) -> TokenSelection:
        """Return the selection with the dense rows emptied."""
        dense = ~self.ran_sparse
        return self._replace(
            indices=self.indices.masked_fill(dense[:, None, None], -1),
            lengths=self.lengths.masked_fill(dense[:, None], 0),
        )


def score_tokens(
    query: Tensor,
    key: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Score every token before the window by the attention it gets from the window.

    The score of key j is the mean over the last W real queries i of
    ``softmax_j(scale * q_i . k_j)``, causal inside the window.

    Args:
        query: ``[B, H, S_q, D]``, any floating dtype, after position encoding; the queries
            occupy the slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv.
        config: gives W, the ``window_size``.
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, one run per row.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.

    Returns:
        ``[B, H, N]`` float32 with ``N = max(S_kv - W, 0)``, indexed by slot. Padding and the
        row's window hold 0; a row with fewer than W real queries has no scores: NaN.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or the mask do not fit.

    Source:
        arXiv 2602.03216, token scoring; `reference.window_scores` is the literal form.

    Example:
        >>> query, key = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 300, 32)
        >>> score_tokens(query, key, TokenSparseConfig(window_size=128)).shape
        torch.Size([1, 4, 172])
    """
    check_config(config)
    check_attention_inputs(query, key, None)
    check_no_gradients(query=query, key=key)
    scale = resolve_scale(scale, query.shape[-1])
    spans = real_spans(padding_mask, key.shape[0], key.shape[2])
    return score_spans(query.detach(), key.detach(), config, spans, scale)


def score_spans(
    query: Tensor, key: Tensor, config: TokenSparseConfig, spans: list[Span], scale: float
) -> Tensor:
    """`score_tokens` on checked arguments."""
    batch_size, num_heads, query_len, _ = query.shape
    window_size, kv_len = config.window_size, key.shape[2]
    first_query = kv_len - query_len
    num_scored = max(kv_len - window_size, 0)
    scores = query.new_zeros(batch_size, num_heads, num_scored, dtype=torch.float32)
    for row, span in enumerate(spans):
        row_queries = query[row, :, max(span.start - first_query, 0) : span.end - first_query]
        if span.end <= first_query or row_queries.shape[1] < window_size:
            scores[row] = torch.nan
        elif span.end - span.start > window_size:
            scores[row, :, span.start : span.end - window_size] = reference.window_scores(
                row_queries, key[row, :, span.start : span.end], window_size, scale
            )
    return scores


def select_tokens(
    scores: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = None,
    kept: float | None = None,
) -> TokenSelection:
    """Choose each head's tokens from the scores: smooth, budget, top-k, plus the window.

    Args:
        scores: ``[B, H, N]`` float32 from `score_tokens`.
        config: the config that the scores were made with.
        padding_mask: the mask that the scores were made with. Without one, the sequence has
            ``N + window_size`` tokens.
        kept: keep this share of a row's real tokens, window included, in place of the
            budget; in ``(0, 1]``. For benchmarks and ablations: ``min_tokens`` and the rule
            for short contexts do not apply then.

    Returns:
        The selection. A row runs dense if it is no longer than ``min_tokens + window_size``,
        has no finite scores, if ``drop_mass`` is 0, or if no token fits under it.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, or `kept` is out of range.

    Source:
        arXiv 2602.03216, Dynamic Token Coverage; `reference.keep_tokens` is the literal form.

    Example:
        >>> config = TokenSparseConfig(window_size=4, min_tokens=2)
        >>> selection = select_tokens(torch.rand(1, 2, 12), config, kept=0.5)
        >>> selection.lengths
        tensor([[8, 8]])
    """
    check_config(config)
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        given = getattr(scores, "dtype", type(scores).__name__)
        raise TypeError(f"scores must be a float32 tensor, got {given}")
    if scores.dim() != 3:
        raise ValueError(f"scores must have shape [B, H, N], got {list(scores.shape)}")
    if kept is not None:
        if isinstance(kept, bool) or not isinstance(kept, (int, float)):
            raise TypeError(f"kept must be a number or None, got {kept!r}")
        if not 0 < kept <= 1:
            raise ValueError(f"kept must be in (0, 1], got {kept}")
    batch_size, _, num_scored = scores.shape
    kv_len = num_scored + config.window_size
    if padding_mask is not None and isinstance(padding_mask, Tensor) and padding_mask.dim() == 2:
        kv_len = padding_mask.shape[1]
        if num_scored != max(kv_len - config.window_size, 0):
            raise ValueError(
                f"scores must have N = {max(kv_len - config.window_size, 0)} entries for a "
                f"padding_mask of {kv_len} slots and window_size {config.window_size}, "
                f"got {num_scored}"
            )
    return select_spans(scores, config, real_spans(padding_mask, batch_size, kv_len), kv_len, kept)


def select_spans(
    scores: Tensor,
    config: TokenSparseConfig,
    spans: list[Span],
    kv_len: int,
    kept: float | None = None,
) -> TokenSelection:
    """`select_tokens` on checked arguments, of sequences with `kv_len` slots."""
    rows = []
    for row, span in enumerate(spans):
        row_scores = scores[row, :, span.start : max(span.end - config.window_size, span.start)]
        rows.append(_keep_row(row_scores, config, span.end - span.start, kept))
    return _selection_of_rows(rows, spans, scores.shape[1], kv_len, scores.device)


def dense_selection(
    spans: list[Span], num_heads: int, kv_len: int, device: torch.device
) -> TokenSelection:
    """Return the selection of a batch in which every row runs dense."""
    return _selection_of_rows([None] * len(spans), spans, num_heads, kv_len, device)


def _keep_row(
    scores: Tensor, config: TokenSparseConfig, kv_len: int, kept: float | None
) -> Tensor | None:
    if scores.shape[1] == 0:
        return None
    if kept is None:
        return reference.keep_tokens(scores, config)
    if not scores.isfinite().all():
        return None
    count = min(max(round(kept * kv_len) - config.window_size, 0), scores.shape[1])
    counts = torch.full((scores.shape[0],), count, device=scores.device)
    return reference.top_tokens(
        reference.smooth(scores, config.pool_size), counts, config.window_size
    )


def _selection_of_rows(
    rows: list[Tensor | None],
    spans: list[Span],
    num_heads: int,
    kv_len: int,
    device: torch.device,
) -> TokenSelection:
    """Turn each row's mask of kept real tokens, None for a dense row, into a selection."""
    keep = torch.zeros(len(spans), num_heads, kv_len, dtype=torch.bool, device=device)
    for row, (row_keep, span) in enumerate(zip(rows, spans)):
        keep[row, :, span.start : span.end] = True if row_keep is None else row_keep
    lengths = keep.sum(-1)
    slot = torch.arange(kv_len, device=device)
    capacity = int(lengths.max())
    indices = torch.where(keep, slot, kv_len).sort(-1).values[..., :capacity]
    return TokenSelection(
        indices=indices.masked_fill(indices == kv_len, -1),
        lengths=lengths,
        ran_sparse=torch.tensor([row_keep is not None for row_keep in rows], device=device),
        kv_len=kv_len,
    )
