"""Every reason to run dense, and the gate, which decides by lengths.

A `Gate` is made from a layer's settings, its heads and its device, and knows which lengths run
sparse. The operator asks it about each sequence. The integrations ask the same gate before they
call the operator. Other reasons are given elsewhere: by the methods from scores, in
`integrations.obstacles` and `integrations.layers` for a Hugging Face model, and in
`integrations.vllm` for vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.crossover import (
    ALL_SPARSE,
    NEVER_DENSE,
    BreakEven,
    Length,
    SparseFrom,
    effective_length,
)


class DenseReason(str, Enum):
    """Why a sequence, or a whole layer, ran dense instead of sparse."""

    SHORT_CONTEXT = "context too short for the method to leave any key out"
    SHORT_CHUNK = "too few queries in the call"
    ZERO_DROP_MASS = "drop_mass is 0"
    NO_PROBES = "the queries before, which score the keys, are not known"
    NOTHING_TO_DROP = "no token's mass fits under drop_mass"
    SCORES_NOT_FINITE = "scores are not finite"
    CROSSOVER_LENGTH = "context too short for sparse to be faster (crossover)"
    CROSSOVER_KEPT = "too few tokens would be dropped for sparse to be faster (crossover)"
    LAYER_NOT_SELECTED = "layer is not among the sparse layers"
    DECODE = "decode step"
    DRAFTS = "draft tokens to verify: a decode step of several tokens"
    NOT_CAUSAL = "layer is not causal self-attention"
    SLIDING_WINDOW = "layer attends within a sliding window"
    SOFT_CAP = "layer caps its attention logits"
    ATTENTION_SINKS = "layer has learned attention sinks"
    GRADIENTS = "gradients are being recorded (use torch.no_grad())"
    DROPOUT = "attention dropout is active"
    ATTENTION_WEIGHTS = "attention weights were asked for"
    MASK = "attention mask is not causal with one run of real tokens per sequence"
    HEAD_DIM = "value and key head sizes differ"
    DTYPES = "query, key and value have different dtypes"
    UNKNOWN_ARGUMENT = "layer passes an attention argument the sparse path does not know"
    ALIBI = "layer adds ALiBi to its attention logits"
    SHARED_CACHE = "layer reads another layer's cache"
    QUANTISED_CACHE = "cache is quantised"
    CACHE_LAYOUT = "layout of the cache is not understood"

    def __str__(self) -> str:
        return self.value

    @property
    def code(self) -> int:
        """The reason as a number on the device; 0 means sparse."""
        return _CODES[self]


_REASONS = tuple(DenseReason)
_CODES = {reason: number for number, reason in enumerate(_REASONS, 1)}


def reason_of(code: int) -> DenseReason | None:
    """Return the reason that a code stands for, None for 0: the sequence ran sparse."""
    return _REASONS[code - 1] if code else None


_LONGEST = 2**31 - 1


class Gate(NamedTuple):
    """Which lengths of a layer's sequences run sparse.

    Attributes:
        min_queries: a sequence with fewer queries runs dense.
        max_dense_context: a sequence with this many keys or fewer runs dense.
        always: why every sequence runs dense, None if the lengths decide.
        break_even: the crossover, from which length sparse is faster.
        sparse: KV sampling's crossover: queries before a position attend densely, so a sequence
            with so many keys or fewer runs dense.
    """

    min_queries: int = 1
    max_dense_context: int = 0
    always: DenseReason | None = None
    break_even: BreakEven = NEVER_DENSE
    sparse: SparseFrom = ALL_SPARSE

    @property
    def shortest_prompt(self) -> int | None:
        """How many tokens a whole prompt must have to run sparse; None if it never does.

        Example:
            >>> Gate(min_queries=16, max_dense_context=100).shortest_prompt
            101
        """
        if self.always is not None or math.isinf(self.break_even.min_length):
            return None
        least = math.ceil(self.break_even.min_length)
        least = max(least, self.sparse.shortest_prompt)
        return max(self.min_queries, self.max_dense_context + 1, least)

    def reason(self, query_len: int, kv_len: int) -> DenseReason | None:
        """Return why the lengths of a sequence make it run dense, None if they do not.

        Args:
            query_len: its real queries.
            kv_len: its real keys.
        """
        for reason, holds in self._rules(query_len, kv_len):
            if holds:
                return reason
        return None

    def codes(self, query_lens: Tensor, kv_lens: Tensor) -> Tensor:
        """Return `reason` for many sequences as codes ``[B]`` int32, on the device.

        Args:
            query_lens: ``[B]`` integers.
            kv_lens: ``[B]`` integers.
        """
        codes = torch.zeros_like(kv_lens, dtype=torch.int32)
        gate = self._replace(  # no length is longer, and no tensor takes larger numbers
            min_queries=min(self.min_queries, _LONGEST),
            max_dense_context=min(self.max_dense_context, _LONGEST),
            sparse=self.sparse._replace(
                position=min(self.sparse.position, _LONGEST),
                dense_queries=min(self.sparse.dense_queries, _LONGEST),
            ),
        )
        for reason, holds in reversed([*gate._rules(query_lens.long(), kv_lens.long())]):
            codes = torch.where(torch.as_tensor(holds, device=codes.device), reason.code, codes)
        return codes

    def _rules(
        self, query_len: Length, kv_len: Length
    ) -> Iterator[tuple[DenseReason, bool | Tensor]]:
        if self.sparse.position:  # a short prompt is that first, and only then a short call
            yield DenseReason.SHORT_CONTEXT, kv_len <= self.max_dense_context
            shortest = min(self.sparse.shortest_prompt, _LONGEST + 1)
            yield DenseReason.CROSSOVER_LENGTH, kv_len < shortest
        if self.sparse.least_saved:
            saved = self.sparse.saved(query_len, kv_len)
            yield DenseReason.SHORT_CHUNK, saved < self.sparse.least_saved
        yield DenseReason.SHORT_CHUNK, query_len < self.min_queries
        yield DenseReason.SHORT_CONTEXT, kv_len <= self.max_dense_context
        if self.always is not None:
            yield self.always, True
        if self.break_even.min_length > 0:
            length = effective_length(query_len, kv_len)
            yield DenseReason.CROSSOVER_LENGTH, length < self.break_even.min_length
