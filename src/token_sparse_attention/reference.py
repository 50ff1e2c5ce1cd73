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

from token_sparse_attention.blocks import FACTOR_STEPS, GOLDEN, UNIT_BITS
from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
    single_precision,
)


def probe_scores(query: Tensor, key: Tensor, num_probes: int, scale: float) -> Tensor:
    """Step 1 of selection: the mean probability that the last queries give each earlier key.

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


def block_scores(
    probes: Tensor, positions: Tensor, key: Tensor, reach: int, num_probes: int, scale: float
) -> Tensor:
    """Step 1 of sampling: the mean probability that a block's probes give each key.

    Args:
        probes: ``[H, P, D]``, those of the `num_probes` that are there.
        positions: ``[P]``, where they stand.
        key: ``[H_kv, S_kv, D]``.
        reach: how many of the first keys are scored.
        num_probes: W; the mean is over W, also where fewer are there.
        scale: factor of the logits.

    Returns:
        ``[H, reach]``, float32 (float64 for float64 inputs).
    """
    precision = torch.promote_types(probes.dtype, torch.float32)
    group = probes.shape[0] // key.shape[0]
    end = max(int(positions[-1]) + 1, reach)  # the last probes may not be known
    future = torch.arange(end, device=key.device) > positions[:, None]
    scores = probes.new_empty(probes.shape[0], reach, dtype=precision)
    for kv_head, head_key in enumerate(key[:, :end]):  # it serves its whole group of queries
        heads = slice(kv_head * group, (kv_head + 1) * group)
        logits = probes[heads].to(precision) @ head_key.to(precision).T * scale
        probabilities = logits.masked_fill_(future, -torch.inf).softmax(-1)
        scores[heads] = probabilities[..., :reach].sum(1) / num_probes
    return scores


def block_budgets(scores: Tensor, config: KVSamplingConfig) -> Tensor:
    """Step 2: how many keys each head samples for a block, ``[H]`` float64.

    Args:
        scores: ``[H, N]`` of the keys that may be sampled.
        config: the settings.
    """
    if config.budget == "shared":
        return scores.new_full((len(scores),), float(config.num_samples), dtype=torch.float64)
    mass = scores.double().sum(1)
    mass[list(config.dense_heads)] = 0.0
    sampling = max(len(mass) - len(config.dense_heads), 1)
    shares = mass * sampling / mass.sum().clamp(min=1e-30)
    return float(config.num_samples) * (0.25 + 0.75 * shares).clamp(max=4)


def sample_block(scores: Tensor, budget: float) -> Tensor:
    """Step 3: how often each key ``[N]`` counts for a block, 0 where it is not sampled.

    Inclusion probabilities are by half in proportion to the score and by half uniform, rounded
    to 2^-18. Keys of probability 1 count once. The probabilities p of the others are cumulated;
    each unit cell of the sum holds one point, and a key that h points fall on counts h / p times.
    """
    number = len(scores)
    if budget >= number:
        return torch.ones(number, dtype=torch.float64, device=scores.device)
    shares = scores.double()
    shares = shares / shares.sum().clamp(min=1e-30) + 1 / number
    shares = shares / shares.sum()
    factor = budget
    for _ in range(FACTOR_STEPS):  # what certain keys leave over goes to the others
        certain = shares * factor >= 1
        left = (1 - shares[certain].sum()).clamp(min=1e-12)
        factor = max(factor, float((budget - int(certain.sum())) / left))
    probabilities = (shares * factor).tolist()
    sampled = torch.zeros(number, dtype=torch.float64)
    cumulated = passed = 0
    for token, probability in enumerate(probabilities):
        units = round(probability * 2**UNIT_BITS)
        if units >= 2**UNIT_BITS:
            sampled[token] = 1.0
            continue
        cumulated += units
        cell = cumulated // 2**UNIT_BITS
        point = (cell + 1) * GOLDEN % 2**32 // 2 ** (32 - UNIT_BITS)
        now = cell + (cumulated % 2**UNIT_BITS > point)
        if now > passed:
            sampled[token] = (now - passed) * 2**UNIT_BITS / units
            passed = now
    return sampled.to(scores.device)


def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SparseConfig,
    scale: float,
    *,
    past_query: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output ``[H, S_q, D]`` of the method that `config` is for, and what it chose.

    Args:
        query: ``[H, S_q, D]``.
        key: ``[H_kv, S_kv, D]``.
        value: ``[H_kv, S_kv, D]``.
        config: the settings.
        scale: factor of the logits.
        past_query: ``[H, S_kv - S_q, D]``, the queries of the positions before, from which
            sampling takes probes; None if they are not known.

    Returns:
        The output; and ``[H, S_kv]`` bool, the tokens that a head keeps, or the sinks and the
        keys that it samples for the last block; None if the sequence, or its last block, runs
        dense.
    """
    query_len, kv_len = query.shape[1], key.shape[1]
    position = torch.arange(kv_len, device=query.device)
    query_position = position[kv_len - query_len :, None]
    causal = (position <= query_position)[None]
    dense = masked_attention(query, key, value, causal, scale)
    if isinstance(config, TokenSelectionConfig):
        out, chosen = _selection(query, key, value, config, scale, causal)
    elif isinstance(config, KVSamplingConfig):
        out, chosen = _sampling(query, key, value, config, scale, causal, past_query)
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
    past_query: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Block by block: one softmax over each query's window, the sinks, and the block's samples."""
    query_len, kv_len = query.shape[1], key.shape[1]
    first_query, size = kv_len - query_len, config.block_size
    known_from = first_query if past_query is None else 0
    every_query = F.pad(query, (0, 0, first_query, 0), value=torch.nan)
    if past_query is not None:
        every_query[:, :first_query] = past_query
    slot = torch.arange(kv_len, device=query.device)
    counts = causal.expand(query.shape[0], -1, -1).double()
    chosen = None
    for block in range(max(first_query // size, 1), (kv_len - 1) // size + 1):
        reach = (block + 1) * size - config.sliding_window
        stride = size // config.num_probes
        probes = slot[(block - 1) * size : block * size][stride - 1 :: stride]
        probes = probes[probes >= known_from]
        if reach <= config.sink_size or 2 * len(probes) < config.num_probes:
            chosen = None
            continue
        scores = block_scores(every_query[:, probes], probes, key, reach, config.num_probes, scale)
        weights = key.new_zeros(query.shape[0], kv_len, dtype=torch.float64)
        weights[:, : config.sink_size] = 1.0
        may = slice(config.sink_size, reach)
        if config.num_samples:
            for head, budget in enumerate(block_budgets(scores[:, may], config).tolist()):
                weights[head, may] = sample_block(scores[head, may], budget)
        chosen = weights > 0
        weights[~scores.sum(-1).isfinite()] = torch.nan
        for position in range(max(block * size, first_query), min((block + 1) * size, kv_len)):
            left = max(position - config.sliding_window + 1, 0)  # behind the query's window
            counts[:, position - first_query, :left] = weights[:, :left]
    return masked_attention(query, key, value, counts, scale), chosen


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
