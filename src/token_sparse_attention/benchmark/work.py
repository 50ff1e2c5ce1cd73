"""How many operations sparse attention does, against dense."""

from __future__ import annotations

from token_sparse_attention.config import TokenSparseConfig


def attended_share(kept: int, prompt_tokens: int, config: TokenSparseConfig | None) -> float:
    """Return how many pairs of a query and a key a head attends to, as a share of all causal ones.

    The K selected queries see ``K (K + 1) / 2`` pairs. With ``fallback="window"``, a query
    that was not selected sees ``min(p + 1, fallback_window + far)`` keys at position p, where
    ``far`` is how many sinks, landmarks and samples the settings ask for. Which queries and far
    tokens these are is not recorded: the last queries before the scoring window are counted,
    and far tokens as if they lay far back. So it is never less than what was attended to, and
    in long prompts hardly more, far tokens apart. Samples that ``budget="per_head"`` shares
    out count as their mean, which holds for the heads together.

    With ``select_queries=False`` every query is of that kind, and K is what is recorded of its
    far tokens. The last ``dense_queries`` see all keys.

    Args:
        kept: K, scoring window included; with ``select_queries=False`` the far tokens.
        prompt_tokens: S.
        config: the layer's settings; None for a layer that ran dense, with K = S.

    Example:
        >>> window = TokenSparseConfig.published(
        ...     fallback="window", fallback_window=10, window_size=4
        ... )
        >>> attended_share(20, 100, window)  # (20 * 21 / 2 + 80 * 10) / (100 * 101 / 2)
        0.2
    """
    config = TokenSparseConfig.published() if config is None else config
    dense = min(config.dense_queries, prompt_tokens)
    others = prompt_tokens - dense
    pairs = _banded_pairs(prompt_tokens, prompt_tokens) - _banded_pairs(others, others)
    if not config.select_queries:
        pairs += _banded_pairs(others, config.fallback_window + kept)
    else:
        last = min(max(config.window_size, dense), prompt_tokens)
        early = min(max(kept - config.window_size, 0), prompt_tokens - last)
        chosen = early + max(min(kept, config.window_size) - dense, 0)
        pairs += _banded_pairs(chosen, prompt_tokens)
        if config.fallback == "window":
            reach = config.fallback_window + config.fallback_sinks
            reach += config.fallback_landmarks + config.fallback_samples
            pairs += _banded_pairs(prompt_tokens - last, reach) - _banded_pairs(early, reach)
    return 2 * pairs / (prompt_tokens * (prompt_tokens + 1))


def _banded_pairs(queries: int, reach: int) -> int:
    """Pairs of the first queries where each sees itself and ``reach - 1`` keys before it."""
    full = min(queries, reach)
    return full * (full + 1) // 2 + (queries - full) * reach
