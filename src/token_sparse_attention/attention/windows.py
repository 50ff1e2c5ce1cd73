"""The windowed fallback: sliding-window attention, and some tokens from further back.

Models put much of their attention on the first tokens, whatever these say; a sliding window
that has left them behind gives that mass to its own keys instead (StreamingLLM, arXiv
2309.17453). The same holds for all that lies behind the window, so a few of those tokens are
seen besides, see `far_tokens`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_sparse_attention.attention.dense import Attended, attend_rows
from token_sparse_attention.attention.far_tokens import FarTokens
from token_sparse_attention.inputs import RealTokens
from token_sparse_attention.selection import load_kernels

_LOGITS = 2**21  # at once, where PyTorch adds the far tokens


def attend_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: FarTokens | None,
    rows: Tensor,
    tokens: RealTokens,
    into: Attended,
    *,
    window: int,
    scale: float,
    impl: str,
    backend: str,
) -> None:
    """The windowed fallback of every query in some rows, written in place.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        far: the tokens seen besides.
        rows: ``[B]`` bool, the rows wanted; others stay.
        tokens: where the real tokens are.
        into: output ``[B, H, S_q, D]`` and log-sum-exp to write.
        window: keys each query sees, itself included.
        scale: factor of the logits.
        impl: which code adds the far tokens.
        backend: one of `BACKENDS`, which attends within the windows.
    """
    lse = into.lse
    if far is not None and lse is None:
        precision = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:3], dtype=precision)
    start, end = tokens.bounds.unbind(-1)
    attend_rows(
        query,
        key,
        value,
        torch.where(rows, start, end),
        tokens,
        Attended(into.out, lse),
        scale=scale,
        backend=backend,
        window=window,
    )
    if far is None or lse is None:
        return
    if impl == "triton":
        load_kernels("sampled_attention").add_sampled_keys(
            query, key, value, far.slots, tokens.bounds, rows, into.out, lse,
            window=window, scale=scale, weights=far.counts,
        )  # fmt: skip
    else:
        slots, counts = far
        slots = torch.where(rows[:, None, None], slots, tokens.kv_len)
        counts = torch.ones(slots.shape, device=slots.device) if counts is None else counts
        fullest = int((slots < tokens.kv_len).sum(-1).max()) if slots.numel() else 0
        slots, counts = slots[..., :fullest], counts[..., :fullest]
        _add_far(query, key, value, slots, counts, tokens, into.out, lse, window, scale)


def _add_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far: Tensor,
    counts: Tensor,
    tokens: RealTokens,
    out: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
) -> None:
    """Merge far tokens into sliding-window attention, where the window has left them.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        far: ``[B, H, M]`` slots, S_kv for none.
        counts: ``[B, H, M]`` float32, how many tokens each stands for.
        tokens: where the real tokens are.
        out: ``[B, H, S_q, D]``, the windowed attention; updated in place.
        lse: ``[B, H, S_q]`` float32, its log-sum-exp; updated in place.
        window: keys each query saw, itself included.
        scale: factor of the logits.
    """
    group = query.shape[1] // key.shape[1]
    precision = torch.promote_types(query.dtype, torch.float32)
    end = tokens.bounds.long()[:, 1]
    first_query = key.shape[2] - query.shape[2]
    size = max(_LOGITS // max(len(key) * key.shape[1] * far.shape[2], 1), 1)
    for member in range(group):
        slots = far[:, member::group]
        at = slots.clamp(max=key.shape[2] - 1)[..., None]
        far_keys = torch.take_along_dim(key, at, 2).to(precision)
        # Where there is no far token, what was gathered may be padding, and hold anything.
        exists = (slots < key.shape[2])[..., None]
        far_values = torch.take_along_dim(value, at, 2).to(precision)
        far_values = far_values.masked_fill(~exists, 0.0)
        for begin in range(0, query.shape[2], size):
            queries = slice(begin, min(begin + size, query.shape[2]))
            position = torch.arange(queries.start, queries.stop, device=query.device)
            position = (first_query + position)[:, None]
            seen = slots[:, :, None, :] <= position - window
            seen = seen & (position < end[:, None, None, None])
            block = query[:, member::group, queries].to(precision)
            logits = block @ far_keys.transpose(2, 3) * scale
            logits += counts[:, member::group, None].log()
            logits.masked_fill_(~seen, -torch.inf)
            old = lse[:, member::group, queries]
            new = torch.logaddexp(old, logits.logsumexp(-1))
            mixed = out[:, member::group, queries] * (old - new).exp()[..., None]
            mixed = mixed + (logits - new[..., None]).exp() @ far_values
            any_seen = seen.any(-1)
            old.copy_(torch.where(any_seen, new, old))
            target = out[:, member::group, queries]
            target.copy_(torch.where(any_seen[..., None], mixed.to(out.dtype), target))
