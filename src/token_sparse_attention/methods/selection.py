"""Token selection (arXiv 2602.03216): every head attends over its own selected tokens.

    score -> smooth -> budget (Dynamic Token Coverage) -> select
          -> compress Q, K, V -> attend -> decompress

A query that a head did not select receives the fallback there: zero as published, or its
sliding window. Nothing is evicted: each call selects again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from token_sparse_attention import reference
from token_sparse_attention.attention.backend import Backend, PackedHeads
from token_sparse_attention.attention.output import zero_sequences
from token_sparse_attention.compression import compress_sequences, decompress_sequences
from token_sparse_attention.config import TokenSelectionConfig, single_precision
from token_sparse_attention.crossover import (
    MIN_LENGTH,
    NEVER_DENSE,
    BreakEven,
    break_even,
    effective_length,
    kind_of,
    window_overhead,
)
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.impls import load_kernels, resolve_impl
from token_sparse_attention.inputs import (
    Problem,
    RealTokens,
    check_config,
    real_tokens,
)
from token_sparse_attention.methods.base import LayerShape, Method, Plan
from token_sparse_attention.methods.pairs import banded_pairs, dense_query_pairs
from token_sparse_attention.results import Attended, TokenSelection, dense_selection
from token_sparse_attention.scoring import score_keys
from token_sparse_attention.tensor_parallel import gather_heads, own_heads, resolve_tp_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PACKED_BYTES = 512 * 2**20  # of Q, K, V and output of the heads that are processed at once


class TokenSelector(Method[TokenSelectionConfig], config=TokenSelectionConfig):
    """The paper's method; see `TokenSelectionConfig`."""

    @property
    def num_probes(self) -> int:
        """The queries of the observation window."""
        return self.config.observation_window

    def gate(self, device: torch.device, num_heads: int, head_dim: int) -> Gate:
        """See `Method.gate`; with ``keep_ratio`` only the observation window must fit."""
        config = self.config
        if config.keep_ratio is not None:
            return Gate(self.num_probes, self.num_probes)
        overhead = 0.0
        if config.fallback == "window":
            overhead = window_overhead(kind_of(device), config.sliding_window)
        return Gate(
            self.num_probes,
            config.min_tokens + config.observation_window,
            DenseReason.ZERO_DROP_MASS if config.drop_mass == 0 else None,
            break_even(config, overhead, MIN_LENGTH, device, num_heads, head_dim),
        )

    def prepare(self, problem: Problem, gate: Gate) -> Plan:
        """Score, smooth, budget, select: each head's tokens."""
        scores = score_keys(
            problem.query, problem.key, self.num_probes, problem.tokens, problem.scale,
            problem.impl,
        )  # fmt: skip
        selection = select_sequences(
            scores, self.config, problem.tokens, problem.impl,
            gate=gate, query_len=problem.query.shape[2], tp_group=problem.tp_group,
            want_reasons=problem.aux.selection,
        )  # fmt: skip
        keys = (selection, most_tokens(self.config, problem, gate.break_even))
        return Plan(selection.ran_sparse, keys)

    def attend(
        self, plan: Plan, problem: Problem, backend: Backend, into: Attended
    ) -> TokenSelection | None:
        """Compress, attend, decompress; the queries that were not selected get the fallback."""
        windowed = self.config.fallback == "window"
        assert plan.ran_sparse is not None
        if windowed:
            window = self.config.sliding_window
            start, end = problem.tokens.bounds.unbind(-1)
            begins = torch.where(plan.ran_sparse, start, end)
            window = min(window, problem.kv_len)
            backend.dense.attend_sequences(problem, begins, into, window=window)
        selection, max_length = plan.keys
        listed = selection if problem.aux.selection else None
        zeros = not windowed and not problem.tokens.padded
        if problem.impl == "reference":
            if zeros:
                zero_sequences(into, selection.ran_sparse)
            if not selection.ran_sparse.any():
                return listed
            selection = selection.sparse_only()
        elif not backend.device_lengths and not selection.ran_sparse.any():
            return listed
        lengths = selection.lengths * selection.ran_sparse[:, None]
        selection = selection._replace(lengths=lengths)
        for sequences in head_groups(problem, max_length):
            packed = compress_sequences(
                problem[:3], selection, sequences, max_length, impl=problem.impl
            )
            of = PackedHeads([n % problem.num_heads for n in sequences], problem.num_heads)
            attended = backend.attend_packed(
                packed, of, scale=problem.scale, want_lse=problem.aux.lse
            )
            offsets = (packed.cu_seqlens_q, packed.cu_seqlens_k)
            del packed
            decompress_sequences(
                attended, selection, offsets, sequences, into, zeros=zeros, impl=problem.impl
            )
            del attended
        return listed

    def work(self, chosen: int, prompt_tokens: int) -> float:
        """See `Method.work`.

        The K selected queries have ``K (K + 1) / 2`` pairs. With ``fallback="window"`` every
        other query has those of its window. How many these are depends on which queries were
        selected, which is not recorded: counted as if the first tokens were, an upper bound.

        Example:
            >>> config = TokenSelectionConfig(
            ...     fallback="window", sliding_window=10, observation_window=4
            ... )
            >>> TokenSelector(config).work(20, 100)  # (20 * 21 / 2 + 80 * 10) / (100 * 101 / 2)
            0.2
        """
        config, window = self.config, self.config.observation_window
        pairs = dense_query_pairs(config, prompt_tokens)
        dense = min(config.dense_queries, prompt_tokens)
        last = min(max(window, dense), prompt_tokens)
        early = min(max(chosen - window, 0), prompt_tokens - last)
        pairs += banded_pairs(early + max(min(chosen, window) - dense, 0), prompt_tokens)
        if config.fallback == "window":
            reach = config.sliding_window
            pairs += banded_pairs(prompt_tokens - last, reach) - banded_pairs(early, reach)
        return 2 * pairs / (prompt_tokens * (prompt_tokens + 1))

    def workspace(self, shape: LayerShape) -> int:
        """See `Method.workspace`: scores, smoothed scores, indices, and the packed heads."""
        scored = shape.num_heads * shape.kv_len
        lse = 3 * 4 * shape.num_heads * shape.query_len if self.config.fallback == "window" else 0
        rows = shape.num_heads * 2 * (shape.kv_len + shape.query_len)
        packed = min(rows * shape.head_dim * shape.itemsize, _PACKED_BYTES)
        return scored * (2 * 4 + 4 + 8) + lse + packed


def select_tokens(
    scores: Tensor,
    config: TokenSelectionConfig,
    *,
    padding_mask: Tensor | None = None,
    impl: str = "auto",
    tp_group: ProcessGroup | None = None,
) -> TokenSelection:
    """Choose each head's tokens from the scores: smooth, budget, top-k, plus the window.

    Args:
        scores: ``[B, H, N]`` float32 from `score_tokens`.
        config: the settings; the scores were made with its ``observation_window``.
        padding_mask: the mask that the scores were made with. Without one, the sequence has
            ``N + observation_window`` tokens.
        impl: which code runs: ``"auto"``, ``"triton"`` or ``"reference"``.
        tp_group: the ranks that hold the layer's other query heads, see `Execution`; `scores`
            are of this rank's heads.

    Returns:
        The selection; its indices have capacity for all slots where Triton ran. Queries are
        not known here, so the crossover has no say. A sequence runs dense if it is no longer
        than ``min_tokens + observation_window``, has no finite scores, if ``drop_mass`` is 0,
        or if no token fits under it.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit.

    Source:
        arXiv 2602.03216, Dynamic Token Coverage; `reference.keep_tokens` is the literal form.

    Example:
        >>> config = TokenSelectionConfig(observation_window=4, min_tokens=2, keep_ratio=0.5)
        >>> select_tokens(torch.rand(1, 2, 12), config).lengths
        tensor([[8, 8]])
    """
    check_config(config, TokenSelectionConfig)
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        given = getattr(scores, "dtype", type(scores).__name__)
        raise TypeError(f"scores must be a float32 tensor, got {given}")
    if scores.dim() != 3:
        raise ValueError(f"scores must have shape [B, H, N], got {list(scores.shape)}")
    tp_group = resolve_tp_group(tp_group)
    impl = resolve_impl(impl, scores)
    batch_size, _, num_scored = scores.shape
    window = config.observation_window
    kv_len = num_scored + window
    if isinstance(padding_mask, Tensor) and padding_mask.dim() == 2:
        kv_len = padding_mask.shape[1]
        if num_scored != max(kv_len - window, 0):
            raise ValueError(
                f"scores must have N = {max(kv_len - window, 0)} entries for a padding_mask of "
                f"{kv_len} slots and observation_window {window}, got {num_scored}"
            )
    tokens = real_tokens(
        padding_mask, batch_size, kv_len, scores.device, on_device=impl == "triton"
    )
    gate = Gate(break_even=NEVER_DENSE)
    return select_sequences(scores, config, tokens, impl, gate=gate, tp_group=tp_group).to_int64()


def select_sequences(
    scores: Tensor,
    config: TokenSelectionConfig,
    tokens: RealTokens,
    impl: str,
    *,
    gate: Gate,
    query_len: int | None = None,
    tp_group: ProcessGroup | None = None,
    want_reasons: bool = True,
) -> TokenSelection:
    """`select_tokens` on checked arguments; the gate's break-even says where dense is faster."""
    num_heads, kv_len = scores.shape[1], tokens.kv_len
    if scores.shape[2] == 0:
        return dense_selection(tokens, num_heads)
    first_query = kv_len - (kv_len if query_len is None else query_len)
    even = gate.break_even
    if impl == "triton":
        kernels = load_kernels("selection")
        keep_ratio = config.keep_ratio
        rule = kernels.Rule(
            config.drop_mass,
            config.observation_window,
            config.pool_size,
            min(config.min_tokens, 2**31 - 1),
            config.budget == "per_head",
            None if keep_ratio is None else single_precision(keep_ratio),
            even.max_work,
            even.fixed_tokens,
            even.min_length,
        )
        indices, lengths, ran_sparse, budget = kernels.select_tokens(
            scores.contiguous(), tokens.bounds, kv_len, first_query, rule, tp_group
        )
        selection = TokenSelection(indices, lengths, ran_sparse, kv_len)
        if not want_reasons:
            return selection
        start, end = tokens.bounds.unbind(-1)
        why = _reasons(scores, ran_sparse, budget, end - start, tp_group)
        return selection._replace(reasons=why)
    if tp_group is not None:
        scores = gather_heads(scores, tp_group)  # decides for all heads, as one process would
    selection = _select_on_host(scores, config, tokens, first_query, even)
    if tp_group is None:
        return selection
    return selection._replace(
        indices=own_heads(selection.indices, num_heads, tp_group),
        lengths=own_heads(selection.lengths, num_heads, tp_group),
    )


def _reasons(
    scores: Tensor,
    ran_sparse: Tensor,
    budget: Tensor,
    kv_lens: Tensor,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """Why sequences that passed the gate run dense ``[B]`` int32, given their heads' budgets."""
    dropped = budget < kv_lens[:, None]
    finite = scores.sum(2).isfinite()  # none is below 0, so nothing cancels
    if tp_group is not None:  # any rank's heads may be why
        both = gather_heads(torch.stack((dropped, finite), -1).to(torch.int32), tp_group)
        dropped, finite = both.bool().unbind(-1)
    why = torch.where(
        dropped.any(-1), DenseReason.CROSSOVER_KEPT.code, DenseReason.NOTHING_TO_DROP.code
    )
    why = torch.where(finite.all(-1), why, DenseReason.SCORES_NOT_FINITE.code)
    return torch.where(ran_sparse, 0, why).to(torch.int32)


def _select_on_host(
    scores: Tensor,
    config: TokenSelectionConfig,
    tokens: RealTokens,
    first_query: int,
    even: BreakEven,
) -> TokenSelection:
    masks, codes, spans = [], [], tokens.host_spans()
    for number, span in enumerate(spans):
        stop = max(span.end - config.observation_window, span.start)
        keep, reason = _keep(scores[number, :, span.start : stop], config)
        if keep is not None:
            kv_len = span.end - span.start
            length = effective_length(span.end - max(span.start, first_query), kv_len)
            work = (keep.sum(-1).double() / kv_len).square().mean()
            limit = even.max_work - even.fixed_tokens / length
            if length < even.min_length or float(work) > limit:
                keep, reason = None, DenseReason.CROSSOVER_KEPT
        masks.append(keep)
        codes.append(0 if keep is not None else reason.code)
    selection = selection_of_masks(masks, tokens, scores.shape[1], scores.device)
    reasons = torch.tensor(codes, dtype=torch.int32, device=scores.device)
    return selection._replace(reasons=reasons)


def _keep(scores: Tensor, config: TokenSelectionConfig) -> tuple[Tensor | None, DenseReason]:
    """Which tokens of a sequence each head keeps, or None and why not."""
    if not scores.isfinite().all():
        return None, DenseReason.SCORES_NOT_FINITE
    if scores.shape[1] == 0:
        return None, DenseReason.NOTHING_TO_DROP
    return reference.keep_tokens(scores, config), DenseReason.NOTHING_TO_DROP


def selection_of_masks(
    masks: list[Tensor | None], tokens: RealTokens, num_heads: int, device: torch.device
) -> TokenSelection:
    """Turn each sequence's mask of kept real tokens, None for a dense one, into a selection."""
    spans = tokens.host_spans()
    keep = torch.zeros(len(spans), num_heads, tokens.kv_len, dtype=torch.bool, device=device)
    for number, (mask, span) in enumerate(zip(masks, spans)):
        keep[number, :, span.start : span.end] = True if mask is None else mask
    lengths = keep.sum(-1)
    slot = torch.arange(tokens.kv_len, device=device)
    capacity = int(lengths.max())
    indices = torch.where(keep, slot, tokens.kv_len).sort(-1).values[..., :capacity]
    return TokenSelection(
        indices=indices.masked_fill(indices == tokens.kv_len, -1),
        lengths=lengths,
        ran_sparse=torch.tensor([mask is not None for mask in masks], device=device),
        kv_len=tokens.kv_len,
    )


def most_tokens(config: TokenSelectionConfig, problem: Problem, even: BreakEven) -> int:
    """Return how many tokens a head can keep at most, which packed tensors must hold."""
    kv_len = problem.kv_len
    if config.keep_ratio is not None:
        kept = int(single_precision(config.keep_ratio) * kv_len + 0.5)
        return max(kept, config.observation_window)
    if config.budget == "per_head":
        return kv_len
    # The device compares in single precision.
    share = even.max_share(problem.query.shape[2], kv_len)
    return min(math.ceil(share * kv_len * 1.0001) + 1, kv_len)


def head_groups(problem: Problem, max_length: int) -> Iterator[range]:
    """Yield the sequences, numbered ``b * H + h``, that are processed together."""
    batch_size, num_heads, query_len, head_dim = problem.query.shape
    total = batch_size * num_heads
    if problem.impl == "reference":
        size = total
    elif problem.head_chunk is not None:
        size = problem.head_chunk
    else:
        rows = 2 * max_length + 2 * min(max_length, query_len)
        fitting = max(_PACKED_BYTES // (rows * head_dim * problem.query.element_size()), 1)
        size = math.ceil(total / math.ceil(total / fitting))
    for first in range(0, total, size):
        yield range(first, min(first + size, total))
