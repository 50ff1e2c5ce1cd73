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
# KV sampling decides by positions, so that a prompt's split into calls changes nothing. With 32
# heads of 128 on a GPU, whole prompts of 16K tokens gained 16%; few heads' kernels end before the
# host has started the next. On a CPU the default settings break even between 5K and 6K.
SPARSE_FROM = {"cuda": 16384, "cpu": 8192}
SPARSE_KEYS = 2  # times the keys that a sparse query sees: fewer are left to dense attention
SAMPLED_HOST_WORK = {"cuda": 4.2e11, "cpu": 0.0}  # as `HOST_WORK`
LEAST_CALL = 512  # queries of a call, its dense ones aside; fewer run dense
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
        position: queries before it attend densely.
        min_queries: calls with fewer queries run dense.
    """

    position: int
    min_queries: int


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
        return SparseFrom(0, 1)
    kind = kind_of(device)
    starting = math.sqrt(SAMPLED_HOST_WORK[kind] / (num_heads * head_dim))
    sparse_keys = config.sliding_window + config.num_samples
    position = max(SPARSE_FROM[kind], SPARSE_KEYS * sparse_keys, round(starting))
    return SparseFrom(position, config.dense_queries + LEAST_CALL)


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
