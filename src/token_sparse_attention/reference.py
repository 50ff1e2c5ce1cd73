"""Both methods in plain PyTorch, for one sequence: the oracle of every test.

Each function is one step on unpadded tensors ``query [H, S_q, D]``, ``key/value
[H_kv, S_kv, D]``; queries are the last ``S_q`` positions. Scoring and selecting serve as the
``impl="reference"`` stages. Attention is a literal masked softmax, so it shares nothing with
compress, attend and decompress, nor with windows and their log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
    single_precision,
)


def probe_scores(query: Tensor, key: Tensor, num_probes: int, scale: float) -> Tensor:
    """Step 1 of both methods: the mean probability that the last queries give each earlier key.

    Returns:
        ``[H, S_kv - num_probes]``, float32 (float64 for float64 inputs).
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    num_heads, kv_len = query.shape[0], key.shape[1]
    group = num_heads // key.shape[0]
    future = torch.ones(num_probes, num_probes, dtype=torch.bool, device=query.device).triu(1)
    scores = query.new_empty(num_heads, kv_len - num_probes, dtype=precision)
    for kv_head, head_key in enumerate(key):  # one KV head serves its whole group of queries
        heads = slice(kv_head * group, (kv_head + 1) * group)
        logits = query[heads, -num_probes:].to(precision) @ head_key.to(precision).T * scale
        logits[..., -num_probes:].masked_fill_(future, -torch.inf)
        scores[heads] = logits.softmax(-1)[..., : kv_len - num_probes].mean(1)
    return scores


def smooth(scores: Tensor, pool_size: int) -> Tensor:
    """Step 2 of selection: average pooling over the tokens, zero padding counted in the mean."""
    return F.avg_pool1d(scores[None], pool_size, stride=1, padding=pool_size // 2)[0]


def token_budget(smoothed: Tensor, config: TokenSelectionConfig) -> Tensor:
    """Step 3 of selection: how many scored tokens each head keeps, all if none may be dropped.

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
    below = (mass.sort(-1).values.cumsum(-1) < config.drop_mass).sum(-1)
    kept = (num_scored - (below + 1)).clamp(min=config.min_tokens)
    return torch.where(below == 0, num_scored, kept).expand(num_heads)


def top_tokens(smoothed: Tensor, kept: Tensor, window_size: int) -> Tensor:
    """Step 4 of selection: each head's highest tokens, the lower index on ties, plus the window.

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


def keep_tokens(scores: Tensor, config: TokenSelectionConfig) -> Tensor | None:
    """Steps 2 to 4 of selection: which positions each head keeps, None where it runs dense.

    Args:
        scores: ``[H, N]``, not finite where a sequence has no window to score with.
        config: the settings.

    Returns:
        ``[H, N + observation_window]`` bool, or None.
    """
    num_heads, num_scored = scores.shape
    window = config.observation_window
    if not scores.isfinite().all():
        return None
    smoothed = smooth(scores, config.pool_size)
    if config.keep_ratio is not None:
        count = int(single_precision(config.keep_ratio) * (num_scored + window) + 0.5) - window
        kept = torch.full((num_heads,), min(max(count, 0), num_scored), device=scores.device)
        return top_tokens(smoothed, kept, window)
    if config.drop_mass == 0 or num_scored <= config.min_tokens:
        return None
    kept = token_budget(smoothed, config)
    if (kept == num_scored).all():
        return None
    return top_tokens(smoothed, kept, window)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """Softmax attention in which a key counts ``weights [H or 1, S_q, S_kv]`` times.

    True and False are once and not at all.
    """
    group = query.shape[0] // key.shape[0]
    weights = weights.expand(query.shape[0], -1, -1)
    out = torch.empty_like(query)
    for head in range(query.shape[0]):
        logits = query[head] @ key[head // group].T * scale
        logits = logits + weights[head].to(logits.dtype).log()
        probs = logits.masked_fill(weights[head] == 0, -torch.inf).softmax(-1)
        out[head] = probs @ value[head // group]
    return out


def sampled_weights(scores: Tensor, config: KVSamplingConfig, kv_len: int) -> Tensor:
    """How often each key ``[H, S_kv]`` counts behind a query's window; 0 if it is not seen.

    Sinks count once, a key that was included with probability p counts 1 / p times.

    Args:
        scores: ``[H, N]``.
        config: says how many of each.
        kv_len: S_kv.
    """
    weights = scores.new_zeros(scores.shape[0], kv_len, dtype=torch.float64)
    weights[:, : config.sink_size] = 1.0
    reach = max(kv_len - config.sliding_window, 0)  # where the last query's window begins
    if not config.num_samples or reach <= config.sink_size:
        return weights
    behind = F.pad(scores.double(), (0, config.num_probes))[:, :reach]
    budgets = [float(config.num_samples)] * len(scores)
    if config.budget == "per_head":
        mass = behind.sum(1)
        mass[list(config.dense_heads)] = 0.0
        sampling = max(len(mass) - len(config.dense_heads), 1)
        shares = mass * sampling / mass.sum().clamp(min=1e-30)
        budgets = (config.num_samples * (0.25 + 0.75 * shares).clamp(max=4)).tolist()
    for head, budget in enumerate(budgets):
        sampled = systematic_sample(behind[head, config.sink_size :], budget)
        weights[head, config.sink_size : reach] = sampled
    return weights


def systematic_sample(scores: Tensor, budget: float) -> Tensor:
    """Sample about `budget` keys by their scores ``[N]``; 1 / p where sampled, 0 elsewhere.

    Inclusion probabilities are by half in proportion to the score and by half uniform, at most
    1. One key is sampled wherever their cumulative sum passes 1/2, 3/2, 5/2 and so on; they are
    rounded to 2^-32.
    """
    shares = scores / scores.sum().clamp(min=1e-30) + 1 / max(len(scores), 1)
    low, high = 0.0, 1.0
    while (shares * high).clamp(max=1).sum() < min(budget, len(scores)) - 1e-9:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        enough = (shares * middle).clamp(max=1).sum() >= min(budget, len(scores))
        low, high = (low, middle) if enough else (middle, high)
    units = ((shares * high).clamp(max=1) * 2**32).round().long().tolist()
    sampled = torch.zeros(len(scores), dtype=torch.float64)
    passed, number = 2**31, 0
    for token, unit in enumerate(units):
        passed += unit
        if passed // 2**32 > number:
            number = passed // 2**32
            sampled[token] = 2**32 / unit
    return sampled.to(scores.device)


def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: SparseConfig, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The output ``[H, S_q, D]`` of the method that `config` is for, and what it chose.

    Returns:
        The output; and ``[H, S_kv]`` bool, the tokens that a head keeps or that all its queries
        see behind their windows, None if the sequence runs dense.
    """
    query_len, kv_len = query.shape[1], key.shape[1]
    position = torch.arange(kv_len, device=query.device)
    query_position = position[kv_len - query_len :, None]
    causal = (position <= query_position)[None]
    dense = masked_attention(query, key, value, causal, scale)
    if isinstance(config, TokenSelectionConfig):
        out, chosen = _selection(query, key, value, config, scale, causal)
    elif isinstance(config, KVSamplingConfig):
        out, chosen = _sampling(query, key, value, config, scale, causal)
    else:
        raise TypeError(f"config must be of one of the two methods, got {config!r}")
    if chosen is None:
        return dense, None
    last, heads = max(query_len - config.dense_queries, 0), list(config.dense_heads)
    out[:, last:] = dense[:, last:]
    out[heads] = dense[heads]
    chosen[heads] = True
    return out, chosen


def _sampling(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: KVSamplingConfig,
    scale: float,
    causal: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """One softmax over each query's window, the sinks, and the samples behind the window."""
    query_len, kv_len = query.shape[1], key.shape[1]
    behind_all = kv_len > config.sliding_window + config.sink_size
    if query_len < config.num_probes or kv_len <= config.num_probes or not behind_all:
        return query, None
    scores = probe_scores(query, key, config.num_probes, scale)
    if not scores.isfinite().all():
        return query, None
    weights = sampled_weights(scores, config, kv_len)
    slot = torch.arange(kv_len, device=query.device)
    near = slot > slot[kv_len - query_len :, None] - config.sliding_window
    counts = torch.where(near, 1.0, weights[:, None]) * causal
    return masked_attention(query, key, value, counts, scale), weights > 0


def _selection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSelectionConfig,
    scale: float,
    causal: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Selected queries attend to selected keys; the others get zero or their window."""
    query_len, kv_len = query.shape[1], key.shape[1]
    window = config.observation_window
    if query_len < window or kv_len <= window:
        return query, None
    keep = keep_tokens(probe_scores(query, key, window, scale), config)
    if keep is None:
        return query, None
    position = torch.arange(kv_len, device=query.device)
    query_position = position[kv_len - query_len :, None]
    rest = torch.zeros_like(query)
    if config.fallback == "window":
        near = position > query_position - config.sliding_window
        rest = masked_attention(query, key, value, near[None] & causal, scale)
    # Queries that a head dropped get attention here too, which is not used.
    sparse = masked_attention(
        query, key, value, causal & (keep[:, None] | (position == query_position)), scale
    )
    chosen = keep[:, kv_len - query_len :, None]
    return torch.where(chosen, sparse, rest), keep
