"""The windowed fallback: sliding-window attention, and a row's first keys besides.

Models put much of their attention on the first tokens, whatever these say; a sliding window
that has left them behind gives that mass to its own keys instead (StreamingLLM, arXiv
2309.17453).
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_sparse_attention.attention.dense import Attended, attend_rows
from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.inputs import RealTokens

_QUERIES = 8192  # at once, which bounds the memory of the logits


def attend_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    rows: Tensor,
    tokens: RealTokens,
    into: Attended,
    *,
    scale: float,
    backend: str,
) -> None:
    """The windowed fallback of every query in some rows, written in place.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        config: the settings, which have the window and the sinks.
        rows: ``[B]`` bool, the rows wanted; others stay.
        tokens: where the real tokens are.
        into: output ``[B, H, S_q, D]`` and log-sum-exp to write.
        scale: factor of the logits.
        backend: one of `BACKENDS`.
    """
    lse = into.lse
    if config.fallback_sinks and lse is None:
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    attend_rows(
        query,
        key,
        value,
        rows,
        tokens,
        Attended(into.out, lse),
        scale=scale,
        backend=backend,
        window=config.fallback_window,
    )
    if config.fallback_sinks and lse is not None:
        add_sinks(
            query,
            key,
            value,
            rows,
            tokens,
            into.out,
            lse,
            scale=scale,
            window=config.fallback_window,
            sinks=config.fallback_sinks,
        )


def add_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    tokens: RealTokens,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int,
    sinks: int,
) -> None:
    """Merge the first keys into sliding-window attention, where the window has left them.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        rows: ``[B]`` bool, the rows wanted; others stay.
        tokens: where the real tokens are.
        out: ``[B, H, S_q, D]``, the windowed attention; updated in place.
        lse: ``[B, H, S_q]`` float32, its log-sum-exp; updated in place.
        scale: factor of the logits.
        window: keys each query saw, itself included.
        sinks: how many of a row's first keys to add.
    """
    group = query.shape[1] // key.shape[1]
    start, end = tokens.bounds.long().unbind(-1)
    slots = start[:, None] + torch.arange(sinks, device=query.device)
    inside = (slots < end[:, None]) & rows[:, None]
    at = slots.clamp(max=key.shape[2] - 1)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    first_keys = torch.take_along_dim(key, at, 2).float()
    first_values = torch.take_along_dim(value, at, 2).float()
    # Keys of rows that are not wanted may be padding, which may hold anything.
    first_values = first_values.masked_fill(~inside[:, None, :, None], 0.0)
    first_query = key.shape[2] - query.shape[2]
    for begin in range(0, query.shape[2], _QUERIES):
        queries = slice(begin, min(begin + _QUERIES, query.shape[2]))
        position = first_query + torch.arange(queries.start, queries.stop, device=query.device)
        seen = inside[:, None, :] & (slots[:, None, :] <= position[:, None] - window)
        seen = seen & (position < end[:, None])[:, :, None]
        for member in range(group):
            block = query[:, member::group, queries].float()
            logits = block @ first_keys.transpose(2, 3) * scale
            logits.masked_fill_(~seen[:, None], -torch.inf)
            old = lse[:, member::group, queries]
            new = torch.logaddexp(old, logits.logsumexp(-1))
            mixed = out[:, member::group, queries] * (old - new).exp()[..., None]
            mixed = mixed + (logits - new[..., None]).exp() @ first_values
            any_seen = seen.any(-1)[:, None]
            old.copy_(torch.where(any_seen, new, old))
            target = out[:, member::group, queries]
            target.copy_(torch.where(any_seen[..., None], mixed.to(out.dtype), target))
