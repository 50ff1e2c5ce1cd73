"""What lengths alone decide: rows that run dense, and how much memory a call takes at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.crossover import BreakEven
from token_sparse_attention.inputs import Span

_PACKED_BYTES = 512 * 2**20  # of Q, K, V and output of the heads that are processed at once


def forces_dense(
    config: TokenSparseConfig,
    even: BreakEven,
    span: Span,
    query_len: int,
    kv_len: int,
    kept: float | None,
) -> bool:
    """Return whether a row's lengths alone make it run dense."""
    row_queries = max(span.end - max(span.start, kv_len - query_len), 0)
    row_len = span.end - span.start
    if row_queries < config.window_size or row_len <= config.window_size:
        return True
    if kept is not None:
        return False
    reason = config.dense_reason(row_queries, row_len) or even.dense_reason(row_queries, row_len)
    return reason is not None


def most_tokens(
    config: TokenSparseConfig, even: BreakEven, query_len: int, kv_len: int, kept: float | None
) -> int:
    """Return how many tokens a head can keep at most, which packed tensors must hold."""
    if kept is not None:
        return max(int(kept * kv_len + 0.5), config.window_size)
    if config.budget == "per_head":
        return kv_len
    # The device compares in single precision.
    return min(math.ceil(even.max_share(query_len, kv_len) * kv_len * 1.0001) + 1, kv_len)


def head_groups(
    query: Tensor, max_length: int, impl: str, head_chunk: int | None
) -> Iterator[range]:
    """Yield the sequences, numbered ``b * H + h``, that are processed together."""
    total = query.shape[0] * query.shape[1]
    if impl == "reference":
        size = total
    elif head_chunk is not None:
        size = head_chunk
    else:
        rows = 2 * max_length + 2 * min(max_length, query.shape[2])
        fitting = max(_PACKED_BYTES // (rows * query.shape[3] * query.element_size()), 1)
        size = math.ceil(total / math.ceil(total / fitting))
    for first in range(0, total, size):
        yield range(first, min(first + size, total))
