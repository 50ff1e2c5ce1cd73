"""The whole method in plain PyTorch, for one sequence: the oracle of every test.

Each function is one step of the paper's method (arXiv 2602.03216) on unpadded tensors
``query [H, S_q, D]``, ``key/value [H_kv, S_kv, D]``. Queries are the last ``S_q`` positions.
Scoring and selecting serve as the ``impl="reference"`` stages; attention is written as a
literal masked softmax, so it shares nothing with compress, attend and decompress.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.config import TokenSparseConfig


def window_scores(query: Tensor, key: Tensor, window_size: int, scale: float) -> Tensor:
    """Step 1: the mean probability that the last `window_size` queries give each earlier key.

    Returns:
        ``[H, S_kv - window_size]``, float32 (float64 for float64 inputs).
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    num_heads, kv_len = query.shape[0], key.shape[1]
    group = num_heads // key.shape[0]
    future = torch.ones(window_size, window_size, dtype=torch.bool, device=query.device).triu(1)
    scores = query.new_empty(num_heads, kv_len - window_size, dtype=precision)
    for kv_head, head_key in enumerate(key):  # one KV head serves its whole group of queries
        heads = slice(kv_head * group, (kv_head + 1) * group)
        logits = query[heads, -window_size:].to(precision) @ head_key.to(precision).T * scale
        logits[..., -window_size:].masked_fill_(future, -torch.inf)
        scores[heads] = logits.softmax(-1)[..., : kv_len - window_size].mean(1)
    return scores


def smooth(scores: Tensor, pool_size: int) -> Tensor:
    """Step 2: average pooling over the tokens, zero padding counted in the mean."""
    return F.avg_pool1d(scores[None], pool_size, stride=1, padding=pool_size // 2)[0]


def token_budget(smoothed: Tensor, config: TokenSparseConfig) -> Tensor:
    """Step 3: how many scored tokens each head keeps; all of them where nothing may be dropped.

    Sorted by mass, the smallest tokens are dropped as long as their mass together stays below
    ``drop_mass``, and then one more.

    Args:
        smoothed: ``[H, N]``.

    Returns:
        ``[H]`` int64.
    """
    num_heads, num_scored = smoothed.shape
    mass = smoothed if config.budget == "per_head" else smoothed.mean(0, keepdim=True)
    mass = mass / (mass.sum(-1, keepdim=True) + 1e-8)
    below = (mass.sort(-1).values.cumsum(-1) < (config.drop_mass or 0.0)).sum(-1)
    kept = (num_scored - (below + 1)).clamp(min=config.min_tokens)
    return torch.where(below == 0, num_scored, kept).expand(num_heads)


def top_tokens(smoothed: Tensor, kept: Tensor, window_size: int) -> Tensor:
    """Step 4: each head's `kept` highest tokens, the lower index on ties, plus the window.

    Args:
        smoothed: ``[H, N]``.
        kept: ``[H]``, scored tokens to keep.

    Returns:
        ``[H, N + window_size]`` bool, True where the head keeps the position.
    """
    order = smoothed.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(order.shape[1], device=order.device) < kept[:, None]
    keep = torch.zeros_like(chosen).scatter_(1, order, chosen)
    return F.pad(keep, (0, window_size), value=True)


def keep_tokens(scores: Tensor, config: TokenSparseConfig) -> Tensor | None:
    """Steps 2 to 4: which positions each head keeps, or None where the sequence runs dense.

    Args:
        scores: ``[H, N]``, not finite where a sequence has no window to score with.

    Returns:
        ``[H, N + window_size]`` bool, or None.
    """
    num_scored = scores.shape[1]
    kv_len = num_scored + config.window_size
    if config.dense_reason(config.window_size, kv_len) or not scores.isfinite().all():
        return None
    smoothed = smooth(scores, config.pool_size)
    kept = token_budget(smoothed, config)
    if (kept == num_scored).all():
        return None
    return top_tokens(smoothed, kept, config.window_size)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, scale: float
) -> Tensor:
    """Softmax attention in which a key counts as often as `counts [H or 1, S_q, S_kv]` says.

    True and False are once and not at all.
    """
    group = query.shape[0] // key.shape[0]
    counts = counts.expand(query.shape[0], -1, -1)
    out = torch.empty_like(query)
    for head in range(query.shape[0]):
        logits = query[head] @ key[head // group].T * scale
        logits = logits + counts[head].to(logits.dtype).log()
        probs = logits.masked_fill(counts[head] == 0, -torch.inf).softmax(-1)
        out[head] = probs @ value[head // group]
    return out


def far_counts(scores: Tensor, config: TokenSparseConfig, kv_len: int) -> Tensor:
    """What each token ``[H, S_kv]`` counts for behind a query's window: 0 if it is not seen.

    An extension: sinks and landmarks, each head's best-scored tokens, count for themselves,
    tokens drawn with probability p for 1 / p.

    Args:
        scores: ``[H, N]``, not smoothed.
        config: says how many of each.
        kv_len: S_kv.
    """
    counts = scores.new_zeros(scores.shape[0], kv_len, dtype=torch.float64)
    counts[:, : config.fallback_sinks] = 1.0
    reach = max(kv_len - config.fallback_window, 0)  # where the last query's window begins
    others = scores[:, config.fallback_sinks : reach]
    best = others.topk(min(config.fallback_landmarks, others.shape[1]), dim=-1).indices
    counts.scatter_(1, best + config.fallback_sinks, 1.0)
    if config.fallback_samples:
        drawn = F.pad(scores.double(), (0, config.window_size))
        budgets = [float(config.fallback_samples)] * len(scores)
        if config.budget == "per_head":
            beyond = drawn[:, :reach].sum(1)
            beyond[list(config.dense_heads)] = 0.0
            sampling = max(len(beyond) - len(config.dense_heads), 1)
            shares = beyond * sampling / beyond.sum().clamp(min=1e-30)
            budgets = (config.fallback_samples * (0.25 + 0.75 * shares).clamp(max=4)).tolist()
        for head, row in enumerate(counts):
            rest = (row[:reach] == 0).nonzero()[:, 0]
            row[rest] = draw(drawn[head, rest], budgets[head])
    return counts


def draw(scores: Tensor, count: float) -> Tensor:
    """Draw about `count` tokens by their scores ``[N]``; 1 / p where drawn, 0 elsewhere.

    Probabilities grow by half with the score and are by half the same for all, at most 1. One
    token is drawn wherever their sum passes a half, one and a half, and so on; they are
    rounded to 2^-32.
    """
    shares = scores / scores.sum().clamp(min=1e-30) + 1 / max(len(scores), 1)
    low, high = 0.0, 1.0
    while (shares * high).clamp(max=1).sum() < min(count, len(scores)) - 1e-9:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        enough = (shares * middle).clamp(max=1).sum() >= min(count, len(scores))
        low, high = (low, middle) if enough else (middle, high)
    units = ((shares * high).clamp(max=1) * 2**32).round().long().tolist()
    drawn = torch.zeros(len(scores), dtype=torch.float64)
    passed, number = 2**31, 0
    for token, unit in enumerate(units):
        passed += unit
        if passed // 2**32 > number:
            number = passed // 2**32
            drawn[token] = 2**32 / unit
    return drawn.to(scores.device)


def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Steps 1 to 7: the output ``[H, S_q, D]`` and what `keep_tokens` returned.

    Where queries are not selected, the latter is what all of them see beyond their windows.
    """
    query_len, kv_len = query.shape[1], key.shape[1]
    position = torch.arange(kv_len, device=query.device)
    query_position = position[kv_len - query_len :, None]
    causal = (position <= query_position)[None]
    keep = None
    if query_len >= config.window_size and kv_len > config.window_size:
        scores = window_scores(query, key, config.window_size, scale)
        if config.select_queries:
            keep = keep_tokens(scores, config)
        elif kv_len > config.min_tokens + config.window_size and scores.isfinite().all():
            keep = far_counts(scores, config, kv_len) > 0
    if keep is None:
        return masked_attention(query, key, value, causal, scale), None

    if config.fallback == "window":
        near = position > query_position - config.fallback_window
        counts = torch.where(near, 1.0, far_counts(scores, config, kv_len)[:, None])
        rest = masked_attention(query, key, value, counts * causal, scale)
    else:
        rest = torch.zeros_like(query)
    if config.dense_queries or config.dense_heads:
        dense = masked_attention(query, key, value, causal, scale)
        last, heads = max(query_len - config.dense_queries, 0), list(config.dense_heads)
        rest[:, last:] = dense[:, last:]
        rest[heads] = dense[heads]
        keep[heads] = True
    if not config.select_queries:
        return rest, keep
    # Queries that a head dropped get a row here too, which is not used.
    sparse = masked_attention(
        query, key, value, causal & (keep[:, None] | (position == query_position)), scale
    )
    chosen = keep[:, kv_len - query_len :, None]
    chosen = chosen & (query_position < kv_len - config.dense_queries)
    return torch.where(chosen, sparse, rest), keep
