"""The default method: a sliding window, sinks, and sampled keys that stand for all others.

    score -> inclusion probabilities -> systematic sampling
          -> one softmax over window, sinks and samples, samples weighted by 1 / p

A key is *behind* a window if it is earlier than the window's first key. Each head samples keys
behind the last query's window. A key that is included with probability p enters the softmax
with the bias log(1 / p), as if it were 1 / p keys. With a random start of the sampling the
numerator and the denominator are unbiased, and their ratio has a bias of O(1 / M) for M
samples. Here the start is fixed, so equal scores give equal samples.

`sample` decides which keys, by `kernels.sampling` on a GPU and by `sample_keys` elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.attention.backend import Backend
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.crossover import (
    MIN_SAMPLED_LENGTH,
    break_even,
    kind_of,
    sampled_overhead,
    window_overhead,
)
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.impls import load_kernels
from token_sparse_attention.inputs import Problem, RealTokens
from token_sparse_attention.methods.base import LayerShape, Method, Plan
from token_sparse_attention.methods.local import SampledKeys, attend_windows
from token_sparse_attention.methods.pairs import banded_pairs, dense_query_pairs
from token_sparse_attention.results import Attended, TokenSelection, dense_selection
from token_sparse_attention.tensor_parallel import gather_heads, own_heads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_UNITS = 2**32  # of a probability; whole numbers add up to the same sum in any order
_ENTRIES = 2**23  # probabilities at once
_LEAST = 0.25  # of the mean budget, for every head
_MOST = 4  # times the mean budget, for any head


class KVSampling(Method[KVSamplingConfig], config=KVSamplingConfig):
    """The default method; see `KVSamplingConfig`."""

    @property
    def num_probes(self) -> int:
        """The queries that score the keys."""
        return self.config.num_probes

    def gate(self, device: torch.device, num_heads: int, head_dim: int) -> Gate:
        """See `Method.gate`; the cost follows from lengths, so the crossover needs no scores."""
        config, kind = self.config, kind_of(device)
        overhead = window_overhead(kind, config.sliding_window)
        overhead += sampled_overhead(kind, config.sink_size + config.num_samples)
        even = break_even(config, overhead, MIN_SAMPLED_LENGTH, device, num_heads, head_dim)
        within = max(config.sliding_window + config.sink_size, config.num_probes)
        return Gate(config.num_probes, within, None, even)

    def prepare(self, scores: Tensor | None, problem: Problem, gate: Gate) -> Plan:
        """Sample each head's keys by their scores."""
        assert scores is not None
        sampled, finite = sample(
            scores, self.config, problem.tokens, problem.impl, problem.tp_group
        )
        if problem.tp_group is not None:
            finite = gather_heads(finite.to(torch.int32), problem.tp_group).bool()
        ran_sparse = finite.all(-1)
        if problem.tokens.padded:
            ran_sparse &= _passes(gate, problem)
        selection = None
        if problem.aux.selection:
            selection = self._list(sampled, ran_sparse, problem)
        return Plan(ran_sparse, sampled, selection)

    def attend(self, plan: Plan, problem: Problem, backend: Backend, into: Attended) -> None:
        """One softmax over each query's window, the sinks and the samples behind the window."""
        window = self.config.sliding_window
        attend_windows(problem, plan.keys, plan.ran_sparse, into, window=window, backend=backend)

    def work(self, chosen: int, prompt_tokens: int) -> float:
        """See `Method.work`; counts every sink and sample for every query, an upper bound.

        Example:
            >>> config = KVSamplingConfig(sliding_window=10, dense_queries=0)
            >>> KVSampling(config).work(10, 100)  # (20 * 21 / 2 + 80 * 20) / (100 * 101 / 2)
            0.3584158415841584
        """
        dense = min(self.config.dense_queries, prompt_tokens)
        pairs = dense_query_pairs(self.config, prompt_tokens)
        pairs += banded_pairs(prompt_tokens - dense, self.config.sliding_window + chosen)
        return 2 * pairs / (prompt_tokens * (prompt_tokens + 1))

    def workspace(self, shape: LayerShape) -> int:
        """See `Method.workspace`: scores, probabilities, log-sum-exps, sampled keys and values."""
        config, scored = self.config, shape.num_heads * shape.kv_len
        capacity = _capacity(config.num_samples, config.budget == "per_head", shape.kv_len)
        sampled = config.sink_size + capacity
        each = 2 * shape.head_dim * shape.itemsize + 5 * 8
        held = scored * (4 + 8) + shape.num_heads * (3 * 4 * shape.query_len + sampled * each)
        if config.num_samples:
            held += 64 * min(scored, max(_ENTRIES, shape.kv_len))
        return held

    def _list(self, sampled: SampledKeys, ran_sparse: Tensor, problem: Problem) -> TokenSelection:
        """Return each head's sinks and samples as a selection; dense sequences list all tokens."""
        kv_len, want_indices = problem.kv_len, problem.aux.indices
        dense = dense_selection(problem.tokens, problem.num_heads, want_indices=want_indices)
        slots = sampled.slots
        lengths = torch.where(ran_sparse[:, None], (slots < kv_len).sum(-1), dense.lengths)
        reasons = torch.where(ran_sparse, 0, DenseReason.SCORES_NOT_FINITE.code)
        selection = dense._replace(
            lengths=lengths, ran_sparse=ran_sparse, reasons=reasons.to(torch.int32)
        )
        if not want_indices:
            return selection
        listed = torch.where(slots < kv_len, slots, -1)
        listed = F.pad(listed, (0, max(kv_len - slots.shape[2], 0)), value=-1)
        indices = torch.where(ran_sparse[:, None, None], listed[..., :kv_len], dense.indices)
        return selection._replace(indices=indices)


def _passes(gate: Gate, problem: Problem) -> Tensor:
    """Which sequences ``[B]`` of a padded batch pass the gate."""
    start, end = problem.tokens.bounds.unbind(-1)
    queries = (end - start.clamp(min=problem.first_query)).clamp(min=0)
    return gate.codes(queries, (end - start).clamp(min=1)) == 0


def sample(
    scores: Tensor,
    config: KVSamplingConfig,
    tokens: RealTokens,
    impl: str,
    tp_group: ProcessGroup | None = None,
) -> tuple[SampledKeys, Tensor]:
    """Return the sinks and the sampled keys of each head, and whether its scores are finite.

    Args:
        scores: ``[B, H, N]`` float32, by slot.
        config: says how many of each.
        tokens: where the real tokens are.
        impl: ``"triton"`` or ``"reference"``; both sample the same keys.
        tp_group: the ranks with the layer's other heads; budgets are shares of all heads' mass.

    Returns:
        The keys, and ``[B, H]`` bool.
    """
    enough = math.ceil(tokens.kv_len / _LEAST)  # with these every head samples all keys
    if config.num_samples > enough:
        config = dataclasses.replace(config, num_samples=enough)
    budgets = None
    if config.budget == "per_head":
        budgets = sample_budgets(scores, config, tokens, tp_group)
    if impl == "triton":
        capacity = _capacity(config.num_samples, budgets is not None, tokens.kv_len)
        slots, weights, finite = load_kernels("sampling").sample_keys(
            scores, tokens.bounds, tokens.kv_len, config.sliding_window, config.num_samples,
            capacity, config.sink_size, budgets,
        )  # fmt: skip
        return SampledKeys(slots, weights), finite
    finite = scores.sum(-1).isfinite()  # none is below 0, so nothing cancels
    start, end = tokens.limits(2)
    first = start + torch.arange(config.sink_size, device=scores.device)
    sinks = torch.where(first < end, first, tokens.kv_len).expand(*scores.shape[:2], -1)
    slots, weights = sample_keys(
        scores, config.num_samples, tokens,
        window=config.sliding_window, sink_size=config.sink_size, budgets=budgets,
    )  # fmt: skip
    certain = weights.new_ones(sinks.shape)
    return SampledKeys(torch.cat((sinks, slots), -1), torch.cat((certain, weights), -1)), finite


def sample_budgets(
    scores: Tensor,
    config: KVSamplingConfig,
    tokens: RealTokens,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """Give each head a quarter of `num_samples`, and the rest by its mass behind the window.

    A head's mass is the sum of its candidates' scores. The error that sampling adds to its
    output grows with the mass and falls with the root of the number of samples. Samples in
    proportion to the mass therefore give the least sum of squared errors.

    Returns:
        ``[B, H]`` float64; ``num_samples`` on average, less if a head reaches four times that.
    """
    behind = _candidates(tokens, config.sliding_window)[:, None, : scores.shape[2]]
    mass = (scores.double().nan_to_num(0.0) * behind).sum(-1)
    all_mass = mass if tp_group is None else gather_heads(mass, tp_group)
    for head in config.dense_heads:  # which need none
        all_mass[:, head] = 0.0
    sampling = max(all_mass.shape[1] - len(config.dense_heads), 1)
    shares = all_mass * sampling / all_mass.sum(-1, keepdim=True).clamp(min=1e-30)
    budgets = config.num_samples * (_LEAST + (1 - _LEAST) * shares).clamp(max=_MOST)
    return budgets if tp_group is None else own_heads(budgets, mass.shape[1], tp_group)


def _candidates(tokens: RealTokens, window: int, sink_size: int = 0) -> Tensor:
    """Which slots ``[B, S_kv]`` lie after the sinks and behind the last query's window."""
    slot = torch.arange(tokens.kv_len, device=tokens.bounds.device)
    start, end = tokens.limits(1)
    inside = (slot >= start + sink_size) & (slot < end - window)
    return inside.expand(len(tokens.bounds), -1)


def sample_keys(
    scores: Tensor,
    num_samples: int,
    tokens: RealTokens,
    *,
    window: int = 0,
    sink_size: int = 0,
    budgets: Tensor | None = None,
) -> SampledKeys:
    """Sample keys for each head, with probabilities that grow with their scores.

    Half of a probability goes by the score and half is uniform; a key whose probability would
    exceed 1 is certain. The samples are equal steps through the cumulative probabilities
    (systematic sampling), which spreads them over the sequence.

    Args:
        scores: ``[B, H, N]`` float32, by slot, N at most S_kv; further slots have none.
        num_samples: M.
        tokens: where the real tokens are.
        window: how many of each sequence's last tokens are not sampled.
        sink_size: how many of its first tokens are not sampled.
        budgets: ``[B, H]`` float64, how many samples for each head, at most four times
            `num_samples`; None for `num_samples` for all.

    Returns:
        ``[B, H, num_samples]``, or four times as many with `budgets`; at most the power of two
        from S_kv on.

    Source:
        An extension; vAttention (arXiv 2510.05688) adds weighted samples to best-scored keys.
    """
    batch_size, num_heads, _ = scores.shape
    capacity = _capacity(num_samples, budgets is not None, tokens.kv_len)
    if budgets is None:
        budgets = scores.new_full((batch_size, num_heads), num_samples, dtype=torch.float64)
    slots = scores.new_empty(batch_size, num_heads, capacity, dtype=torch.int64)
    weights = scores.new_empty(batch_size, num_heads, capacity, dtype=torch.float32)
    if not num_samples:
        return SampledKeys(slots, weights)
    candidates = _candidates(tokens, window, sink_size)
    at_once = max(_ENTRIES // max(batch_size * tokens.kv_len, 1), 1)
    for first in range(0, num_heads, at_once):
        heads = slice(first, first + at_once)
        shares = _shares(scores[:, heads], candidates)
        probabilities = inclusion_probabilities(shares, budgets[:, heads, None], capacity)
        slots[:, heads], weights[:, heads] = _systematic(probabilities, capacity)
    return SampledKeys(slots, weights)


def _capacity(num_samples: int, per_head: bool, kv_len: int) -> int:
    """Return how many samples of a head there is room for.

    Kernels are compiled for this number. A prompt that is shorter bounds it by a power of two.
    """
    return min(_MOST * num_samples if per_head else num_samples, 1 << (kv_len - 1).bit_length())


def _shares(scores: Tensor, candidates: Tensor) -> Tensor:
    """Each slot's share of the inclusion probabilities, ``[B, H, S_kv]`` float64; adds up to 1."""
    real = candidates[:, None]
    shares = F.pad(scores.double(), (0, candidates.shape[1] - scores.shape[2]))
    shares = shares.nan_to_num(0.0, 0.0).masked_fill_(~real, 0.0)
    shares /= shares.sum(-1, keepdim=True).clamp(min=1e-30)
    shares += real / real.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=1)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)


def inclusion_probabilities(shares: Tensor, budgets: Tensor, capacity: int) -> Tensor:
    """Return probabilities in proportion to the shares, at most 1, that add up to the budgets.

    Args:
        shares: ``[B, H, S]`` float64, above 0 for every key that may be sampled.
        budgets: ``[B, H, 1]`` float64, what the probabilities add up to. A head with fewer
            candidates than that includes all of them with probability 1.
        capacity: no budget is larger.
    """
    best = shares.topk(min(capacity, shares.shape[-1]), dim=-1).values
    certain = torch.arange(best.shape[-1], device=shares.device)
    rest = (1 - (best.cumsum(-1) - best)).clamp(min=1e-12)  # the share of the other keys
    factor = (budgets - certain) / rest  # if the best `certain` keys have probability 1
    candidates = (shares > 0).sum(-1, keepdim=True)
    number = (factor * best >= 1).sum(-1, keepdim=True)
    last = (candidates - 1).clamp(0, best.shape[-1] - 1)  # behind it nothing is left to share
    factor = factor.gather(-1, number.minimum(last))
    return (shares * factor).clamp(max=1.0)


def _systematic(probabilities: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return where the cumulative probability passes 1/2, 3/2, 5/2, ..., and 1 / p there."""
    units = (probabilities * _UNITS).round().long()
    passed = (units.cumsum(-1) + _UNITS // 2) // _UNITS
    before = passed.roll(1, -1)
    before[..., 0] = 0
    rank = torch.where((passed > before) & (before < capacity), before, capacity)
    num_slots = probabilities.shape[-1]
    slot = torch.arange(num_slots, device=rank.device).expand_as(rank)
    shape = (*probabilities.shape[:-1], capacity + 1)
    slots = probabilities.new_full(shape, num_slots, dtype=torch.int64)
    slots = slots.scatter_(-1, rank, slot)[..., :capacity]
    sampled = units.gather(-1, slots.clamp(max=num_slots - 1)).clamp(min=1)
    return slots, (_UNITS / sampled.double()).float()
