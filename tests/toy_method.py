"""A third method, as somebody else would write it: one config, one class, no other change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from token_sparse_attention import Method, SparseConfig
from token_sparse_attention.config import check_int
from token_sparse_attention.gate import Gate
from token_sparse_attention.methods.base import Plan
from token_sparse_attention.methods.pairs import banded_pairs
from token_sparse_attention.results import dense_selection

if TYPE_CHECKING:
    from token_sparse_attention.attention.backend import Backend
    from token_sparse_attention.inputs import Problem
    from token_sparse_attention.results import Attended, TokenSelection


@dataclass(frozen=True, kw_only=True)
class ToyConfig(SparseConfig, method="toy"):
    """Settings of a sliding window and nothing else."""

    width: int = 64
    dense_queries: int = 0
    crossover: str = "off"

    def __post_init__(self) -> None:
        check_int("width", self.width, 1)
        super().__post_init__()


class Toy(Method[ToyConfig], config=ToyConfig):
    """Every query attends to its sliding window; no key is scored."""

    def gate(self, device: torch.device, num_heads: int, head_dim: int) -> Gate:
        del device, num_heads, head_dim
        return Gate(max_dense_context=self.config.width)

    def prepare(self, problem: Problem, gate: Gate) -> Plan:
        start, end = problem.tokens.bounds.unbind(-1)
        queries = end - start.clamp(min=problem.first_query)
        return Plan(gate.codes(queries, end - start) == 0, None)

    def attend(
        self, plan: Plan, problem: Problem, backend: Backend, into: Attended
    ) -> TokenSelection | None:
        start, end = problem.tokens.bounds.unbind(-1)
        begins = torch.where(plan.ran_sparse, start, end)
        backend.dense.attend_sequences(problem, begins, into, window=self.config.width)
        if not problem.aux.selection:
            return None
        # Dense sequences list all tokens, sparse ones chose none.
        dense = dense_selection(
            problem.tokens, problem.num_heads, want_indices=problem.aux.indices
        )
        return dense._replace(
            indices=dense.indices.masked_fill(plan.ran_sparse[:, None, None], -1),
            lengths=dense.lengths.masked_fill(plan.ran_sparse[:, None], 0),
            ran_sparse=plan.ran_sparse,
            reasons=torch.zeros_like(plan.ran_sparse, dtype=torch.int32),
        )

    def work(self, chosen: int, prompt_tokens: int) -> float:
        del chosen
        pairs = banded_pairs(prompt_tokens, self.config.width)
        return 2 * pairs / (prompt_tokens * (prompt_tokens + 1))
