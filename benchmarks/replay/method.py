"""Token selection that attends over a given number of tokens: a method from outside the package.

Scoring and selecting run as in the paper's method. What they select is then put aside for a
selection of the given numbers, made once and in advance of what is timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from token_sparse_attention.config import TokenSelectionConfig, check_int
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.inputs import Problem, real_tokens
from token_sparse_attention.methods.base import Plan
from token_sparse_attention.methods.selection import TokenSelector, most_tokens
from token_sparse_attention.results import TokenSelection, dense_selection


@dataclass(frozen=True, kw_only=True)
class ReplayedConfig(TokenSelectionConfig, method="replayed_selection"):
    """`TokenSelectionConfig` and the numbers of tokens to attend over.

    Args:
        counts: how many tokens each head keeps, or one number for all; None runs dense after
            scoring and selecting.
    """

    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.counts is not None:
            for count in self.counts:
                check_int("counts", count, self.observation_window)
            object.__setattr__(self, "counts", tuple(self.counts))
        super().__post_init__()


def replayed(
    config: TokenSelectionConfig, counts: tuple[int, ...] | None, seq_len: int
) -> ReplayedConfig:
    """Return a layer's settings with the numbers of tokens that it kept.

    Args:
        config: the layer's settings.
        counts: see `ReplayedConfig`.
        seq_len: S.
    """
    fields = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    if counts is not None:  # selects as many in vain
        fields["keep_ratio"] = min(fmean(counts) / seq_len, 1.0)
    return ReplayedConfig(**fields, counts=counts)


class Replayed(TokenSelector, config=ReplayedConfig):
    """Token selection over given numbers of random tokens; lengths and scores decide nothing."""

    config: ReplayedConfig

    def __init__(self, config: ReplayedConfig) -> None:
        super().__init__(config)
        self._recorded = TokenSelector(replace(config, keep_ratio=None))

    def gate(self, device: torch.device, num_heads: int, head_dim: int) -> Gate:
        """Return the recorded layer's break-even, which bounds memory, and no shortest length."""
        even = self._recorded.gate(device, num_heads, head_dim).break_even
        return Gate(self.num_probes, break_even=even._replace(min_length=0.0))

    def prepare(self, scores: Tensor | None, problem: Problem, gate: Gate) -> Plan:
        """Select as the operator does, and put that aside."""
        plan = super().prepare(scores, problem, gate)
        selection = self.chosen(problem)
        room = most_tokens(self._recorded.config, problem, gate.break_even)
        if max(self.config.counts or (0,)) > room:  # more was kept on another device
            room = problem.kv_len
        wanted = selection if problem.aux.selection else None
        return plan._replace(
            ran_sparse=selection.ran_sparse, keys=(selection, room), selection=wanted
        )

    def chosen(self, problem: Problem) -> TokenSelection:
        """Return what to attend over in place of what was selected."""
        return make_selection(
            self.config.counts,
            self.config.observation_window,
            problem.num_heads,
            problem.kv_len,
            problem.query.device,
            padded=problem.impl == "triton",
        )


@functools.lru_cache(maxsize=1)
def make_selection(
    counts: Sequence[int] | None,
    window: int,
    num_heads: int,
    seq_len: int,
    device: torch.device,
    *,
    padded: bool,
) -> TokenSelection:
    """Return a selection of random slots and the observation window, or one that runs dense.

    Args:
        counts: tokens that each head keeps, or one number for all; None for dense.
        window: how many of the last tokens are kept in any case.
        num_heads: H.
        seq_len: S.
        device: where.
        padded: whether indices have capacity for every slot and 32 bits, as Triton's have.
    """
    dtype = torch.int32 if padded else torch.int64
    if counts is None:
        selection = dense_selection(real_tokens(None, 1, seq_len, device), num_heads)
        reasons = torch.full_like(
            selection.ran_sparse, DenseReason.NOTHING_TO_DROP.code, dtype=torch.int32
        )
        indices, lengths = selection.indices.to(dtype), selection.lengths.to(dtype)
        return selection._replace(indices=indices, lengths=lengths, reasons=reasons)
    each = list(counts) * (num_heads if len(counts) == 1 else 1)
    capacity = seq_len if padded else max(each)
    indices = torch.full((1, num_heads, capacity), -1, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seq_len)
    for head, count in enumerate(each):
        order = torch.rand(seq_len, generator=generator, device=device)
        order[seq_len - window :] = 2
        indices[0, head, :count] = order.topk(count).indices.sort().values.to(dtype)
    return TokenSelection(
        indices,
        torch.tensor([each], dtype=dtype, device=device),
        torch.ones(1, dtype=torch.bool, device=device),
        seq_len,
        torch.zeros(1, dtype=torch.int32, device=device),
    )
