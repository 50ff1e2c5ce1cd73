"""Where sparse attention is faster than dense: constants, and the lengths and shares they give.

Dense attention over S tokens costs time in proportion to S^2. Sparse attention that keeps a
share k of them costs k^2 of that, plus overhead in proportion to S. The overhead is counted in
the keys on which dense attention spends as much time per query: `BreakEven.fixed_tokens`. So
sparse wins where ``k^2 < 1 - fixed_tokens / S``. Starting its kernels also takes the host time.
Dense attention of a short prompt, or of few heads, may end before that.

`tsa bench op` and `python -m benchmarks.operator.sampling` measure the operator; see
benchmarks/operator/study.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from token_sparse_attention.config import KVSamplingConfig, SparseConfig

# Token selection must score a sequence before it knows whether it drops enough. Shorter ones
# run dense unscored, because scoring alone would cost them over 2% of dense attention.
MIN_LENGTH = {"cuda": 65536, "cpu": 20480}
# KV sampling decides by positions, so that a prompt's split into calls changes nothing. Queries
# before this one attend densely, and those that see fewer keys than `SPARSE_KEYS` times what a
# sparse query sees.
SPARSE_FROM = 8192
SPARSE_KEYS = 2
# A sparse query takes as long as a dense one that sees this many times the keys.
SPARSE_COST = 1.5
# Pairs of query and key, times heads and head size, that a call must save: on a GPU dense
# attention of fewer ends before the host has started the sparse kernels.
LEAST_SAVED = {"cuda": 8e10, "cpu": 6e8}
# Overhead of scoring, selecting, gathering and scattering, in keys per query of dense time.
OVERHEAD_TOKENS = {"cuda": 2400.0, "cpu": 600.0}
# Overhead of the sliding window of all queries: a fixed part, and a part per token of the window.
WINDOW_TOKENS = {"cuda": (900.0, 2.3), "cpu": (700.0, 2.8)}
# Overhead of each of the last queries that attend to every key. Few heads' queries do not fill a
# GPU, so the first number is divided by the number of heads; the second is the least.
DENSE_QUERY_TOKENS = {"cuda": 60.0, "cpu": 0.0}
LEAST_DENSE_QUERY_TOKENS = {"cuda": 5.4, "cpu": 2.0}
# S^2 times heads times head size of the dense attention that ends while the host starts the
# sparse kernels.
HOST_WORK = {"cuda": 1.5e12, "cpu": 0.0}

Length = TypeVar("Length", float, Tensor)


def kind_of(device: torch.device) -> str:
    """Return which constants hold for a device."""
    return "cuda" if device.type == "cuda" else "cpu"


class BreakEven(NamedTuple):
    """Where a sequence runs sparse.

    Attributes:
        min_length: shorter sequences run dense.
        max_work: a sequence runs dense if the mean square of its heads' kept shares exceeds
            ``max_work - fixed_tokens / effective_length``.
        fixed_tokens: the overhead, in keys per query of dense time.
    """

    min_length: float
    max_work: float
    fixed_tokens: float

    def max_share(self, query_len: int, kv_len: int) -> float:
        """Return the largest share of its tokens that a sequence's heads may all keep."""
        work = self.max_work - self.fixed_tokens / effective_length(query_len, kv_len)
        return min(math.sqrt(max(work, 0.0)), 1.0)


NEVER_DENSE = BreakEven(0.0, 2.0, 0.0)


def effective_length(query_len: Length, kv_len: Length) -> Length:
    """Return the length of a whole prompt with the same dense time per key.

    It is S_q where S_q = S_kv. A chunk of few queries has little dense time to save, but all
    keys to score and gather.
    """
    if isinstance(query_len, Tensor):
        query_len = query_len.double()  # a quotient of integers has the default dtype
    return query_len * (2 * kv_len - query_len) / kv_len


def window_overhead(kind: str, width: int) -> float:
    """Return what a sliding window of all queries costs, in keys per query of dense time."""
    base, per_token = WINDOW_TOKENS[kind]
    return base + per_token * width


class SparseFrom(NamedTuple):
    """Where KV sampling is faster than dense attention.

    Attributes:
        position: queries before it attend densely, P.
        cost: a sparse query takes as long as a dense one that sees this many keys.
        least_saved: calls that save fewer pairs of query and key run dense.
        dense_queries: the last queries, which save none.
    """

    position: int
    cost: float = 0.0
    least_saved: float = 0.0
    dense_queries: int = 0

    def saved(self, query_len: Length, kv_len: Length) -> Length:
        """Return how many pairs of query and key a call saves, as if it ended its prompt.

        Args:
            query_len: its queries, which are the last of the keys.
            kv_len: its keys.
        """
        if isinstance(kv_len, Tensor):
            end = kv_len - self.dense_queries
            begin: Length = (kv_len.double() - query_len).clamp(min=self.position)
            return (end - begin).clamp(min=0) * ((begin + end) / 2 - self.cost)
        end, begin = kv_len - self.dense_queries, max(kv_len - query_len, self.position)
        return max(end - begin, 0) * ((begin + end) / 2 - self.cost)

    @property
    def shortest_prompt(self) -> int:
        """How many tokens a whole prompt must have to save enough."""
        if not self.least_saved:
            return self.position + 1
        beyond = math.sqrt((self.position - self.cost) ** 2 + 2 * self.least_saved)
        return math.ceil(self.cost + beyond) + self.dense_queries


ALL_SPARSE = SparseFrom(0)


def sparse_from(
    config: KVSamplingConfig, device: torch.device, num_heads: int, head_dim: int
) -> SparseFrom:
    """Return from which position KV sampling is faster.

    Args:
        config: its settings.
        device: where the layer attends.
        num_heads: its query heads there, H.
        head_dim: D.
    """
    if config.crossover == "off":
        return ALL_SPARSE
    keys = config.sliding_window + config.num_samples
    least_saved = LEAST_SAVED[kind_of(device)] / (num_heads * head_dim)
    position = max(SPARSE_FROM, SPARSE_KEYS * keys)
    return SparseFrom(position, SPARSE_COST * keys, least_saved, config.dense_queries)


def break_even(
    config: SparseConfig,
    overhead: float,
    least: Mapping[str, int],
    device: torch.device,
    num_heads: int,
    head_dim: int,
) -> BreakEven:
    """Return the break-even of a layer.

    Args:
        config: its settings.
        overhead: what the method's fixed part costs, in keys per query of dense time.
        least: the shortest length that was measured, by kind of device.
        device: where the layer attends.
        num_heads: its query heads there, H.
        head_dim: D.
    """
    if config.crossover == "off":
        return NEVER_DENSE
    kind = kind_of(device)
    dense_query = max(DENSE_QUERY_TOKENS[kind] / num_heads, LEAST_DENSE_QUERY_TOKENS[kind])
    fixed = OVERHEAD_TOKENS[kind] + dense_query * config.dense_queries + overhead
    # Below `fixed` sparse could not be faster even if every token were dropped. With tensor
    # parallelism one rank may have all dense heads of the layer.
    sparse_share = max(1 - len(config.dense_heads) / num_heads, 0.0)
    shortest = fixed / sparse_share if sparse_share else math.inf
    starting = math.sqrt(HOST_WORK[kind] / (num_heads * head_dim))
    return BreakEven(max(least[kind], starting, shortest), 1.0, fixed)
