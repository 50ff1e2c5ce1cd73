"""How many pairs of a query and a key attention has: what `Method.work` counts."""

from __future__ import annotations

from token_sparse_attention.config import SparseConfig


def banded_pairs(queries: int, reach: int) -> int:
    """Return the pairs of the first queries where each sees itself and ``reach - 1`` before it."""
    full = min(queries, reach)
    return full * (full + 1) // 2 + (queries - full) * reach


def dense_query_pairs(config: SparseConfig, prompt_tokens: int) -> int:
    """Return the pairs of the last ``dense_queries`` of a prompt, which see all keys."""
    others = prompt_tokens - min(config.dense_queries, prompt_tokens)
    return banded_pairs(prompt_tokens, prompt_tokens) - banded_pairs(others, others)
