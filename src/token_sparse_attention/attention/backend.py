"""A resolved attention backend: one object that attends, and says what it can do.

Causal always means aligned at the end: the last query sees every key. GQA is native.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.inputs import Problem
from token_sparse_attention.results import Attended, PackedSequences

Tensors = tuple[Tensor, Tensor, Tensor]  # query, key, value


class PackedHeads(NamedTuple):
    """Which query heads packed sequences belong to.

    Attributes:
        heads: the query head of each sequence.
        num_heads: H.
    """

    heads: Sequence[int]
    num_heads: int


@dataclass(frozen=True)
class Backend(ABC):
    """What attends. `attention.resolve.resolve_backend` makes one per call.

    Attributes:
        name: the kernel's or the pattern's name.
        reason: why this one was chosen.
        device_lengths: whether lengths of packed sequences are read on the device, so that no
            host waits.
        returns_lse: whether the log-sum-exp comes with the output; else the logits are computed
            a second time for it.
    """

    name: str
    reason: str = "asked for"
    device_lengths: bool = False
    returns_lse: bool = False

    @property
    def dense(self) -> Backend:
        """The dense backend that attends where this one, a pattern, has no say."""
        return self

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        want_lse: bool = False,
    ) -> Attended:
        """Causal attention, optionally within a sliding window.

        Args:
            query: ``[B, H, S_q, D]``.
            key: ``[B, H_kv, S_kv, D]``, ``S_kv >= S_q``.
            value: ``[B, H_kv, S_kv, D]``.
            scale: factor of the logits.
            window: each query sees this many keys up to and including itself; None for all.
            want_lse: whether the log-sum-exp ``[B, H, S_q]`` float32 is wanted.

        Raises:
            ValueError: if the backend cannot run these inputs.
        """
        return self._attend((query, key, value), scale, window, want_lse)

    @abstractmethod
    def _attend(
        self, tensors: Tensors, scale: float, window: int | None, want_lse: bool
    ) -> Attended:
        """`attend` with all its arguments."""

    @abstractmethod
    def attend_packed(
        self, packed: PackedSequences, of: PackedHeads, *, scale: float, want_lse: bool = False
    ) -> Attended:
        """Causal attention of packed single-head sequences, each aligned at its end.

        Args:
            packed: the sequences; T_q may be larger than they are together, and what stands
                beyond them means nothing.
            of: which heads they belong to.
            scale: factor of the logits.
            want_lse: whether the log-sum-exp ``[T_q]`` float32 is wanted.
        """

    def attend_sequences(
        self,
        problem: Problem,
        begins: Tensor,
        into: Attended,
        *,
        window: int | None = None,
        ends: Tensor | None = None,
    ) -> None:
        """Causal attention of some of each sequence's queries, in place; the others stay.

        This form reads lengths on the host; backends with `device_lengths` launch for every
        sequence, also where none of its queries attends.

        Args:
            problem: the inputs.
            begins: ``[B]`` int32, the slot of the first query that attends, if it is there: the
                sequence's start for all of its queries, its end for none.
            into: output ``[B, H, S_q, D]`` and log-sum-exp to write.
            window: keys each query sees, itself included; None for all.
            ends: ``[B]`` int32, the slot after the last query that attends; None for the
                sequences' ends.
        """
        query, key, value = problem.query, problem.key, problem.value
        first_query = problem.first_query
        spans = problem.tokens.host_spans()
        lasts = [span.end for span in spans] if ends is None else ends.tolist()
        for number, (begin, end, span) in enumerate(zip(begins.tolist(), lasts, spans)):
            begin = max(begin, first_query)
            if begin >= end:
                continue
            queries = slice(begin - first_query, end - first_query)
            keys = slice(span.start, end)
            one = self.attend(
                query[number : number + 1, :, queries],
                key[number : number + 1, :, keys],
                value[number : number + 1, :, keys],
                scale=problem.scale,
                window=window,
                want_lse=into.lse is not None,
            )
            into.out[number, :, queries] = one.out[0]
            if into.lse is not None and one.lse is not None:
                into.lse[number, :, queries] = one.lse[0]

    def attend_windows(
        self, problem: Problem, begins: Tensor | None, into: Attended, window: int
    ) -> Tensor:
        """`attend_sequences` in a sliding window; also returns the log-sum-exp ``[B, H, S_q]``.

        Where no query attended, it holds anything, unless ``into.lse`` is given. Without
        `begins` every query attends, of sequences without padding.
        """
        if begins is None:
            begins = problem.tokens.bounds[:, 0]
        lse = into.lse
        if lse is None:
            precision = torch.promote_types(problem.query.dtype, torch.float32)
            lse = problem.query.new_empty(problem.query.shape[:3], dtype=precision)
        self.attend_sequences(problem, begins, Attended(into.out, lse), window=window)
        return lse

    def attend_all(self, problem: Problem, into: Attended) -> None:
        """Causal attention of every query, in place, of sequences without padding."""
        one = self.attend(
            problem.query, problem.key, problem.value, scale=problem.scale,
            want_lse=into.lse is not None,
        )  # fmt: skip
        into.out.copy_(one.out)
        if into.lse is not None and one.lse is not None:
            into.lse.copy_(one.lse)

    def attend_last(self, problem: Problem, count: int, into: Attended) -> bool:
        """Causal attention of the last queries by a kernel that splits their keys.

        Args:
            problem: the inputs, without padding.
            count: how many queries of each head.
            into: output and log-sum-exp to write.

        Returns:
            Whether it was done: False where that kernel is missing or no faster.
        """
        del problem, count, into
        return False


def single_head(packed: PackedSequences) -> PackedSequences:
    """Return packed rows ``[T, D]`` as ``[T, 1, D]``, as kernels of several heads take them."""
    query, key, value = (rows[:, None] for rows in packed[:3])
    return packed._replace(query=query, key=key, value=value)


def split_lengths(packed: PackedSequences) -> tuple[list[int], list[int]]:
    """Return each sequence's numbers of queries and keys, read on the host."""
    both = torch.stack((packed.cu_seqlens_q, packed.cu_seqlens_k)).diff().tolist()
    return both[0], both[1]
