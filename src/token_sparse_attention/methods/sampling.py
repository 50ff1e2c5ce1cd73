"""The default method: a sliding window, sinks, and sampled keys that stand for all others.

    blocks of queries -> scores by the block before -> inclusion probabilities
          -> systematic sampling -> one softmax over window, sinks and samples

A key is *behind* a window if it is earlier than the window's first key. For each block of
queries each head samples keys behind the window of the block's last query. A key of inclusion
probability p enters the softmax with the bias log(1 / p), as if it were 1 / p keys. The queries
of the block before give the scores, so what a query attends to depends on its past alone.

The points of the systematic sampling are fixed: equal scores give equal samples. One point of a
low-discrepancy sequence lies in each unit cell of the cumulated probabilities. Equal steps would
lock onto text of equal period.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention import crossover, reference
from token_sparse_attention.attention.backend import Backend
from token_sparse_attention.blocks import FACTOR_STEPS, GOLDEN, UNIT_BITS, Blocks
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.impls import load_kernels
from token_sparse_attention.inputs import Problem
from token_sparse_attention.methods.base import LayerShape, Method, Plan
from token_sparse_attention.methods.local import SampledKeys, add_sampled_keys
from token_sparse_attention.methods.pairs import banded_pairs, dense_query_pairs
from token_sparse_attention.methods.probes import (
    Probes,
    blocks_of,
    find_probes,
    first_sparse_slots,
    probe_positions,
)
from token_sparse_attention.results import Attended, TokenSelection, dense_selection
from token_sparse_attention.tensor_parallel import gather_heads, own_heads

_UNITS = 2**UNIT_BITS  # of a probability; whole numbers add up to the same sum in any order
_LEAST = 0.25  # of the mean budget, for every head
_MOST = 4  # times the mean budget, for any head
_SCORES = 2**26  # at once
_SPLIT = 4096  # keys whose softmax statistics the kernels hold on their own


class KVSampling(Method[KVSamplingConfig], config=KVSamplingConfig):
    """The default method; see `KVSamplingConfig`."""

    def gate(self, device: torch.device, num_heads: int, head_dim: int) -> Gate:
        """See `Method.gate`; positions decide, so that a prompt's split into calls does not."""
        config = self.config
        # No query of an earlier block leaves a key behind its window that is no sink.
        first = max((config.sliding_window + config.sink_size) // config.block_size, 1)
        least = first * config.block_size
        sparse = crossover.sparse_from(config, device, num_heads, head_dim)
        position = max(-(-sparse.position // config.block_size) * config.block_size, least)
        return Gate(max_dense_context=least, sparse=sparse._replace(position=position))

    def prepare(self, problem: Problem, gate: Gate) -> Plan | DenseReason:
        """Find the blocks and their probes, and with them where sparse attention begins."""
        blocks = blocks_of(self.config, problem, gate.sparse.position)
        if blocks is None:
            return DenseReason.NO_PROBES
        probes = find_probes(problem, blocks)
        begin = max(blocks.first * blocks.size, problem.first_query)
        if probes.valid is None:
            if begin <= self.config.sliding_window:  # windows see all keys up to there
                begin = problem.first_query
            return Plan(None, (blocks, probes), begin)
        begin = problem.kv_len  # no sequence begins later
        if not problem.tokens.padded:  # earlier calls may have left probes of two blocks
            begin = min((blocks.first + 2) * blocks.size, begin)
        end = problem.tokens.bounds[:, 1]
        begins = first_sparse_slots(problem, blocks, probes)
        ran_sparse = begins < end
        if problem.tokens.padded:
            ran_sparse &= gate.codes(*problem.lengths()) == 0
        return Plan(ran_sparse, (blocks, probes), begin, torch.where(ran_sparse, begins, end))

    def attend(
        self, plan: Plan, problem: Problem, backend: Backend, into: Attended
    ) -> TokenSelection | None:
        """One softmax over each query's window, the sinks and its block's samples."""
        (blocks, probes), whole = plan.keys, problem
        if plan.begins is None and plan.begin > problem.first_query:
            into = into.of_queries(slice(plan.begin - problem.first_query, None))
            problem = problem.since(plan.begin)
        # Windows first: the host prepares the rest while the device attends to them.
        window = min(self.config.sliding_window, problem.kv_len)
        lse = backend.dense.attend_windows(problem, plan.begins, into, window)
        keys = []
        for some, sampled in sample_parts(whole, blocks, probes, self.config):
            add_sampled_keys(problem, some, sampled, plan.begins, into._replace(lse=lse))
            if problem.aux.selection:
                slots = sampled.slots if problem.aux.indices else None
                keys.append((some, sampled.counts, slots))
            del sampled  # before the next are there
        return self._list(keys, plan, whole) if keys else None

    def work(self, chosen: int, prompt_tokens: int) -> float:
        """See `Method.work`; counts every sink and sample for every query, an upper bound.

        What the crossover runs dense is not counted. `chosen` is what the last block has; queries
        with fewer keys behind their windows see all of them.

        Example:
            >>> config = KVSamplingConfig(
            ...     block_size=16, num_probes=4, sliding_window=16, num_samples=8, dense_queries=0
            ... )
            >>> round(KVSampling(config).work(12, 64), 3)
            0.68
        """
        config = self.config
        queries = prompt_tokens - min(config.dense_queries, prompt_tokens)
        pairs = dense_query_pairs(config, prompt_tokens)
        pairs += banded_pairs(queries, config.sliding_window)
        pairs += banded_pairs(max(queries - config.sliding_window, 0), chosen)
        return 2 * pairs / (prompt_tokens * (prompt_tokens + 1))

    def workspace(self, shape: LayerShape) -> int:
        """See `Method.workspace`: scores, sampled slots and weights, probes, log-sum-exps.

        The scores and samples of one run of blocks are held at a time. A call late in a prompt
        has more scores in a run, and one at its beginning more blocks.
        """
        config, heads = self.config, shape.num_heads
        least = max((config.sliding_window + config.sink_size) // config.block_size, 1)
        entry_bytes = 8 * (config.sink_size + _capacity(config, shape.kv_len)) + 4
        scores, samples = [0], [0]
        for first_query in (0, shape.kv_len - shape.query_len):
            first = max(first_query // config.block_size, least)
            count = -(-(first_query + shape.query_len) // config.block_size) - first
            widths = (config.num_probes, config.sliding_window, config.sink_size)
            blocks = Blocks(config.block_size, *widths, first, max(count, 0))
            for _, some in _parts(blocks, heads, _SCORES):
                statistics = some.num_blocks * config.num_probes * (shape.kv_len // _SPLIT + 2)
                scores.append(4 * heads * (some.num_scores + 2 * statistics))
                samples.append(heads * some.num_blocks * entry_bytes)
        probes = -(-shape.query_len // config.block_size) * config.num_probes
        probe_bytes = 2 * heads * probes * shape.head_dim * shape.itemsize
        return max(scores) + max(samples) + probe_bytes + 3 * 4 * heads * shape.query_len

    def _list(
        self,
        keys: list[tuple[Blocks, Tensor, Tensor | None]],
        plan: Plan,
        problem: Problem,
    ) -> TokenSelection:
        """Return the sinks and samples of each sequence's last block as a selection.

        Dense sequences list all tokens.
        """
        kv_len, want_indices = problem.kv_len, problem.aux.indices
        dense = dense_selection(problem.tokens, problem.num_heads, want_indices=want_indices)
        start, end = problem.tokens.bounds.long().unbind(-1)
        ran_sparse, size = plan.ran_sparse, self.config.block_size
        if ran_sparse is None:
            ran_sparse = torch.ones_like(start, dtype=torch.bool)
        number = (end - start - 1) // size
        begins = plan.begin if plan.begins is None else plan.begins
        first = ((begins - start) // size).clamp(min=keys[0][0].first)
        num_blocks = torch.where(ran_sparse, number + 1 - first, 0)
        slots, lengths = None, dense.lengths
        for blocks, counted, listed_slots in keys:
            index = number - blocks.first
            mine = ((index >= 0) & (index < blocks.num_blocks))[:, None]
            at = index.clamp(0, blocks.num_blocks - 1)[:, None, None]
            counts = torch.take_along_dim(counted, at, 2)[..., 0].long()
            lengths = torch.where(mine & ran_sparse[:, None], counts, lengths)
            if listed_slots is not None:
                last = torch.take_along_dim(listed_slots, at[..., None], 2)[:, :, 0]
                slots = last if slots is None else torch.where(mine[..., None], last, slots)
        reasons = torch.where(ran_sparse, 0, DenseReason.NO_PROBES.code)
        selection = dense._replace(
            lengths=lengths,
            ran_sparse=ran_sparse,
            reasons=reasons.to(torch.int32),
            num_blocks=num_blocks,
        )
        if slots is None:
            return selection
        entry = torch.arange(slots.shape[2], device=slots.device)
        listed = torch.where(entry < lengths[..., None], slots, -1)
        listed = F.pad(listed, (0, max(kv_len - slots.shape[2], 0)), value=-1)
        indices = torch.where(ran_sparse[:, None, None], listed[..., :kv_len], dense.indices)
        return selection._replace(indices=indices)


def parts_of(blocks: Blocks, problem: Problem) -> list[tuple[int, Blocks]]:
    """Return runs of blocks whose scores fit in memory, with the index of each one's first."""
    return _parts(blocks, problem.num_heads * len(problem.query), _SCORES)


@functools.lru_cache(maxsize=64)
def _parts(blocks: Blocks, rows: int, most: int) -> list[tuple[int, Blocks]]:
    begin, parts = 0, []
    while begin < blocks.num_blocks:
        some = blocks._replace(first=blocks.first + begin, num_blocks=1)
        while begin + some.num_blocks < blocks.num_blocks:
            longer = some._replace(num_blocks=some.num_blocks + 1)
            if rows * longer.num_scores > most:
                break
            some = longer
        parts.append((begin, some))
        begin += some.num_blocks
    return parts


def sample_parts(
    problem: Problem, blocks: Blocks, probes: Probes, config: KVSamplingConfig
) -> Iterator[tuple[Blocks, SampledKeys]]:
    """Yield what runs of the blocks sample, each as `sample` returns it."""
    for begin, some in parts_of(blocks, problem):
        part = probes.of_blocks(blocks, begin, begin + some.num_blocks)
        yield some, sample(problem, some, part, config)


def _capacity(config: KVSamplingConfig, kv_len: int) -> int:
    """Return how many samples of a head there is room for.

    A prompt that is shorter bounds it by a power of two.
    """
    most = config.num_samples * (_MOST if config.budget == "per_head" else 1)
    return min(most, 1 << (kv_len - 1).bit_length())


def sample(
    problem: Problem, blocks: Blocks, probes: Probes, config: KVSamplingConfig
) -> SampledKeys:
    """Return the sinks and the sampled keys of each block and head.

    Scores that are not finite make a weight NaN, so that the block's output is NaN.

    Args:
        problem: the inputs.
        blocks: of which queries.
        probes: theirs.
        config: the settings.
    """
    tokens, capacity = problem.tokens, _capacity(config, problem.kv_len)
    scores = score_blocks(problem, blocks, probes)
    budgets = None
    if config.budget == "per_head":
        budgets = block_budgets(scores, blocks, problem, config)
    if problem.impl == "triton":
        return SampledKeys(
            *load_kernels("sampling").sample_blocks(
                scores,
                tokens.bounds,
                blocks,
                min(config.num_samples, 2**31 - 1),
                capacity,
                budgets,
            )
        )
    return _sample_blocks(scores, problem, blocks, config, budgets)


def score_blocks(problem: Problem, blocks: Blocks, probes: Probes) -> Tensor:
    """Return the scores ``[B, H, num_scores]``, block after block; see `Blocks.offset`."""
    if problem.impl == "triton":
        scored: Tensor = load_kernels("block_scoring").score_blocks(
            *probes, problem.key, problem.tokens.bounds, blocks, problem.scale
        )
        return scored
    positions = probe_positions(blocks, probes.query.device)
    precision = torch.promote_types(problem.query.dtype, torch.float32)
    scores = probes.query.new_zeros(*probes.query.shape[:2], blocks.num_scores, dtype=precision)
    for number, index, reach in _each(problem, blocks):
        span = problem.tokens.host_spans()[number]
        some = slice(index * blocks.num_probes, (index + 1) * blocks.num_probes)
        query, position = probes.query[number, :, some], positions[some]
        if probes.valid is not None:
            query = query[:, probes.valid[number, some]]
            position = position[probes.valid[number, some]]
        if not len(position):
            continue
        begin = blocks.offset(index)
        key = problem.key[number, :, span.start : span.end]
        scores[number, :, begin : begin + reach] = reference.block_scores(
            query, position, key, reach, blocks.num_probes, problem.scale
        )
    return scores


def _each(problem: Problem, blocks: Blocks) -> Iterator[tuple[int, int, int]]:
    """Yield the sequence, the index and the reach of every block that there is."""
    for number, span in enumerate(problem.tokens.host_spans()):
        for index in range(blocks.num_blocks):
            if (blocks.first + index) * blocks.size < span.end - span.start:
                yield number, index, blocks.first_reach + index * blocks.size


def block_budgets(
    scores: Tensor, blocks: Blocks, problem: Problem, config: KVSamplingConfig
) -> Tensor:
    """Give each head a quarter of a block's mean budget, and the rest by its mass.

    A head's mass is the sum of its candidates' scores. The error that sampling adds to its
    output grows with the mass and falls with the root of the number of samples. Samples in
    proportion to the mass therefore give the least sum of squared errors.

    Returns:
        ``[B, H, count]`` float64; `num_samples` on average, less if a head reaches four times
        that.
    """
    mass = scores.new_empty(*scores.shape[:2], blocks.num_blocks, dtype=torch.float64)
    for index in range(blocks.num_blocks):
        reach = blocks.first_reach + index * blocks.size
        begin = blocks.offset(index)
        candidates = scores[..., begin + blocks.sink_size : begin + reach]
        mass[..., index] = candidates.sum(-1, dtype=torch.float64)
    mass.nan_to_num_(0.0, 0.0)
    all_mass = mass if problem.tp_group is None else gather_heads(mass, problem.tp_group)
    for head in config.dense_heads:  # which need none
        all_mass[:, head] = 0.0
    sampling = max(all_mass.shape[1] - len(config.dense_heads), 1)
    shares = all_mass * sampling / all_mass.sum(1, keepdim=True).clamp(min=1e-30)
    budgets = float(config.num_samples) * (_LEAST + (1 - _LEAST) * shares).clamp(max=_MOST)
    return (
        budgets
        if problem.tp_group is None
        else own_heads(budgets, mass.shape[1], problem.tp_group)
    )


def _sample_blocks(
    scores: Tensor,
    problem: Problem,
    blocks: Blocks,
    config: KVSamplingConfig,
    budgets: Tensor | None,
) -> SampledKeys:
    """`sample` in tensor operations, from the scores."""
    batch_size, num_heads = scores.shape[:2]
    sinks, capacity = config.sink_size, _capacity(config, problem.kv_len)
    shape = (batch_size, num_heads, blocks.num_blocks, sinks + capacity)
    slots = torch.full(shape, problem.kv_len, dtype=torch.int32, device=scores.device)
    log_weights = torch.zeros(shape, dtype=torch.float32, device=scores.device)
    counts = torch.zeros(shape[:3], dtype=torch.int32, device=scores.device)
    for number, index, reach in _each(problem, blocks):
        begin = blocks.offset(index)
        own = scores[number, :, begin : begin + reach]
        candidates = own[:, sinks:]
        if budgets is None:
            most = float(config.num_samples)
            budget = candidates.new_full((num_heads, 1), most, dtype=torch.float64)
        else:
            budget = budgets[number, :, index, None]
        weights = sample_keys(candidates, budget)
        weights = F.pad(weights, (sinks, 0), value=1.0)
        included = weights > 0
        entry = torch.where(included, included.cumsum(-1) - 1, sinks + capacity)
        entry = entry.clamp(max=sinks + capacity)
        slot = torch.arange(reach, dtype=torch.int32, device=scores.device)
        slot = (slot + problem.tokens.host_spans()[number].start).expand_as(entry)
        for target, numbers in ((slots, slot), (log_weights, weights.log2().float())):
            row = F.pad(target[number, :, index], (0, 1))
            target[number, :, index] = row.scatter_(-1, entry, numbers)[:, :-1]
        counts[number, :, index] = included.sum(-1).clamp(max=sinks + capacity)
        finite = own.sum(-1).isfinite()  # no score is below 0, so nothing cancels
        log_weights[number, :, index].masked_fill_(~finite[:, None], torch.nan)
    return SampledKeys(slots, log_weights, counts)


def sample_keys(scores: Tensor, budgets: Tensor) -> Tensor:
    """Sample keys for each head, with probabilities that grow with their scores.

    Half of a probability goes by the score and half is uniform; keys whose probability would
    exceed 1 are certain. The others are sampled by one point in each unit cell of their
    cumulated probabilities.

    Args:
        scores: ``[H, N]``.
        budgets: ``[H, 1]`` float64, how many keys to sample.

    Returns:
        ``[H, N]`` float64: 1 for a certain key, ``hits / p`` for one that points fall on, 0 for
        a key that is not sampled.

    Source:
        An extension; vAttention (arXiv 2510.05688) adds weighted samples to best-scored keys.
    """
    number = scores.shape[1]
    exact = scores.double().nan_to_num(0.0, 0.0)
    total = exact.sum(-1, keepdim=True)
    by_score, uniform = 1 / total.clamp(min=1e-30), torch.full_like(total, 1 / max(number, 1))
    both = total * by_score + number * uniform
    by_score, uniform = by_score / both, uniform / both
    shares = exact * by_score + uniform
    factor, found = budgets, torch.zeros_like(budgets)
    for _ in range(FACTOR_STEPS):
        certain = shares * factor >= 1
        now = certain.sum(-1, keepdim=True)
        if bool((now <= found).all()):
            break
        found = now.double()
        rest = (1 - (shares * certain).sum(-1, keepdim=True)).clamp(min=1e-12)
        factor = torch.maximum(factor, (budgets - found) / rest)
    units = exact * (by_score * factor * _UNITS) + uniform * factor * _UNITS
    units = units.masked_fill(budgets >= number, _UNITS).clamp(max=_UNITS).round().long()
    certain = units == _UNITS
    units.masked_fill_(certain, 0)
    cumulated = units.cumsum(-1)
    cell = cumulated >> UNIT_BITS
    point = (((cell + 1) * GOLDEN) & (2**32 - 1)) >> (32 - UNIT_BITS)
    passed = cell + ((cumulated & (_UNITS - 1)) > point)
    hits = passed.diff(dim=-1, prepend=passed.new_zeros(len(scores), 1))
    return torch.where(certain, 1.0, hits * _UNITS / units.clamp(min=1).double())
