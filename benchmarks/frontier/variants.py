"""Variants of the method that are not in the library, for the study of what is worth having.

Plain PyTorch around the library's stages, one sequence at a time; made to be measured for
accuracy, not speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention import TokenSelection, TokenSparseConfig, compress
from token_sparse_attention.attention.dense import attend, attend_packed
from token_sparse_attention.integrations import transformers as integration
from token_sparse_attention.selection import score_tokens, select_tokens

_ROWS = 512  # compressed queries whose band is attended at once


@dataclass(frozen=True)
class Variant:
    """What differs from the library's operator.

    Attributes:
        union: selected queries also attend to the tokens of the fallback's window that were
            not selected, so that no query loses its neighbours.
        value_norm: scores are multiplied by the norm of the value.
        spread: how many of the scoring queries lie spread over the whole sequence.
    """

    union: bool = False
    value_norm: bool = False
    spread: int = 0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    variant: Variant,
    *,
    scale: float,
    backend: str = "auto",
) -> tuple[Tensor, TokenSelection]:
    """`token_sparse_attention` of one unpadded sequence, under a variant.

    Args:
        query: ``[1, H, S, D]``.
        key: ``[1, H_kv, S, D]``.
        value: likewise.
        config: the settings; the fallback is `window` whatever they say, without sinks.
        variant: what differs.
        scale: factor of the logits.
        backend: which kernel attends.
    """
    if variant.spread:
        scores = spread_scores(query, key, config.window_size, variant.spread, scale)
    else:
        scores = score_tokens(query, key, config, scale=scale)
    if variant.value_norm:
        norms = value[:, :, : scores.shape[2]].float().norm(dim=-1)
        scores = scores * norms.repeat_interleave(query.shape[1] // key.shape[1], 1)
    selection = select_tokens(scores, config)
    if not bool(selection.ran_sparse.all()):
        return attend(query, key, value, scale=scale, backend=backend).out, selection
    window = config.fallback_window
    near = attend(
        query, key, value, scale=scale, backend=backend, window=window, want_lse=variant.union
    )
    packed = compress(query, key, value, selection)
    chosen = attend_packed(*packed, scale=scale, backend=backend, want_lse=variant.union)
    out = near.out.clone()
    rows = chosen.out
    if variant.union:
        rows = _union(packed, chosen, near, selection, window, scale)
    for head, (begin, size) in enumerate(_sequences(selection)):
        slots = selection.indices[0, head, :size]
        out[0, head, slots] = rows[begin : begin + size].to(out.dtype)
    return out, selection


def _sequences(selection: TokenSelection) -> Iterator[tuple[int, int]]:
    begin = 0
    for size in selection.lengths[0].tolist():
        yield begin, size
        begin += size


def _union(
    packed: Any, chosen: Any, near: Any, selection: TokenSelection, window: int, scale: float
) -> Tensor:
    """Rows of attention over selected and near keys: both, less what both counted."""
    rows = torch.empty(len(chosen.out), chosen.out.shape[1], device=chosen.out.device)
    for head, (begin, size) in enumerate(_sequences(selection)):
        part = slice(begin, begin + size)
        slots = selection.indices[0, head, :size]
        both, both_lse = _band(
            packed.query[part], packed.key[part], packed.value[part], slots, window, scale
        )
        lses = torch.stack((chosen.lse[part], near.lse[0, head, slots], both_lse))
        weights = (lses - lses.amax(0)).exp()
        weights[2].neg_()
        outs = torch.stack((chosen.out[part].float(), near.out[0, head, slots].float(), both))
        rows[part] = (weights[..., None] * outs).sum(0) / weights.sum(0)[:, None]
    return rows


def _band(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of selected queries over the selected keys in their window."""
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(len(query), dtype=torch.float32, device=query.device)
    firsts = torch.searchsorted(slots, slots[::_ROWS] - window + 1).tolist()
    for block, first in enumerate(firsts):
        begin, end = block * _ROWS, min((block + 1) * _ROWS, len(query))
        near = slots[begin:end, None] - slots[first:end]
        logits = query[begin:end].float() @ key[first:end].float().T * scale
        logits = logits.masked_fill((near < 0) | (near >= window), -torch.inf)
        lse[begin:end] = logits.logsumexp(-1)
        out[begin:end] = logits.softmax(-1) @ value[first:end].float()
    return out, lse


def spread_scores(
    query: Tensor, key: Tensor, window_size: int, spread: int, scale: float
) -> Tensor:
    """Scores by the last ``window_size - spread`` queries and `spread` over the sequence.

    Every query counts alike; a key is scored by those after it.
    """
    length, group = key.shape[2], query.shape[1] // key.shape[1]
    last = torch.arange(length - (window_size - spread), length, device=query.device)
    others = torch.linspace(window_size, length - window_size, spread, device=query.device)
    positions = torch.cat((others.long(), last))
    seen = torch.arange(length, device=query.device) <= positions[:, None]
    scores = query.new_empty(1, query.shape[1], length - window_size, dtype=torch.float32)
    for head in range(query.shape[1]):
        chosen = query[0, head, positions].float()
        logits = chosen @ key[0, head // group].float().T * scale
        probs = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        scores[0, head] = probs.mean(0)[: length - window_size]
    return scores


@contextmanager
def varied(variant: Variant) -> Iterator[None]:
    """Let `apply` run the variant in place of the library's operator."""
    original = integration.token_sparse_attention

    def operator(
        query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, **given: Any
    ) -> tuple[Tensor, TokenSelection]:
        scale = given["scale"] or query.shape[-1] ** -0.5
        return attention(
            query,
            key,
            value,
            config,
            variant,
            scale=scale,
            backend=given["attention_backend"],
        )

    integration.token_sparse_attention = operator  # type: ignore[assignment]
    try:
        yield
    finally:
        integration.token_sparse_attention = original
