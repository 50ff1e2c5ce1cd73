"""One call of the operator from start to end, for every method. Read this first.

    gate -> method: prepare, attend -> dense queries and heads

The gate decides from lengths which sequences run dense. The method scores the keys, chooses from
the scores what each head attends to, and computes the output. Dense attention then writes what
is left or overwrites it: sequences that run dense, the first queries, the last queries, and dense
heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from token_sparse_attention.attention.backend import Backend
from token_sparse_attention.attention.output import (
    mark_invalid_sequences,
    new_output,
)
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.impls import resolve_impl
from token_sparse_attention.inputs import (
    AuxRequest,
    Chunk,
    Problem,
    Span,
    real_tokens,
    unit_stride,
)
from token_sparse_attention.methods import method_of
from token_sparse_attention.methods.base import Plan
from token_sparse_attention.results import (
    Attended,
    SparseOutput,
    TokenSelection,
    dense_selection,
)
from token_sparse_attention.tensor_parallel import local_heads


def prefill(
    tensors: tuple[Tensor, Tensor, Tensor],
    padding_mask: Tensor | None,
    config: SparseConfig,
    execution: Execution,
    scale: float,
    aux: AuxRequest,
    chunk: Chunk,
) -> SparseOutput:
    """`token_sparse_attention` on checked arguments."""
    problem = _problem(tensors, padding_mask, execution, scale, aux, chunk)
    query = problem.query
    backend = resolve_backend(execution.backend, query, problem.key)
    method = method_of(config)
    gate = method.gate(query.device, problem.num_heads, query.shape[3])
    if _all_dense(gate, problem):
        return _attend_densely(problem, backend, gate)
    plan = method.prepare(problem, gate)
    if isinstance(plan, DenseReason):
        return _attend_densely(problem, backend, gate._replace(always=plan))

    into = new_output(problem)
    selection = method.attend(plan, problem, backend, into)
    dense_heads = local_heads(config.dense_heads, problem.num_heads, problem.tp_group)
    _attend_dense_prefix(problem, backend, plan, into)
    dense_queries = config.dense_queries if chunk.ends_prompt else 0
    _attend_dense_queries(problem, backend, plan.ran_sparse, dense_queries, into)
    _attend_dense_heads(problem, backend, plan.ran_sparse, dense_heads, into)
    mark_invalid_sequences(into, problem.tokens)
    if selection is None:
        return SparseOutput(into.out, None, into.lse)
    selection = _with_dense_heads(selection, dense_heads, problem)
    selection = _with_reasons(selection, problem, gate)
    return SparseOutput(into.out, selection.to_int64(), into.lse)


def _problem(
    tensors: tuple[Tensor, Tensor, Tensor],
    padding_mask: Tensor | None,
    execution: Execution,
    scale: float,
    aux: AuxRequest,
    chunk: Chunk,
) -> Problem:
    query, key, value = (unit_stride(tensor) for tensor in tensors)
    impl = resolve_impl(execution.impl, query, query.shape[-1])
    tokens = real_tokens(
        padding_mask, len(query), key.shape[2], query.device, on_device=impl == "triton"
    )
    how = (execution.head_chunk, execution.tp_group, aux, chunk)
    return Problem(query, key, value, tokens, scale, impl, *how)


def _all_dense(gate: Gate, problem: Problem) -> bool:
    """Whether the lengths that the host knows make every sequence run dense.

    Where only the device knows the lengths, the longest possible sequence decides.
    """
    return all(
        gate.reason(*_lengths(span, problem)) is not None
        for span in problem.tokens.spans or [Span(0, problem.kv_len)]
    )


def _lengths(span: Span, problem: Problem) -> tuple[int, int]:
    """Return a sequence's real queries and keys."""
    return max(span.end - max(span.start, problem.first_query), 0), span.end - span.start


def _attend_densely(problem: Problem, backend: Backend, gate: Gate) -> SparseOutput:
    """Dense attention of every sequence."""
    query, tokens, aux = problem.query, problem.tokens, problem.aux
    if not tokens.padded:
        into = backend.attend(
            query, problem.key, problem.value, scale=problem.scale, want_lse=aux.lse
        )
        into = into._replace(lse=None if into.lse is None else into.lse.float())
    else:
        into = new_output(problem)
        backend.attend_sequences(problem, tokens.bounds[:, 0], into)
        mark_invalid_sequences(into, tokens)
    if not aux.selection:
        return SparseOutput(into.out, None, into.lse)
    selection = dense_selection(tokens, problem.num_heads, want_indices=aux.indices)
    return SparseOutput(into.out, _with_reasons(selection, problem, gate), into.lse)


def _attend_dense_prefix(problem: Problem, backend: Backend, plan: Plan, into: Attended) -> None:
    """Attend the queries before those that attend sparsely, to all keys."""
    begin = min(plan.begin, problem.kv_len)
    if begin <= problem.first_query:
        return
    if not problem.tokens.padded:
        into = into.of_queries(slice(begin - problem.first_query))
        problem = problem.until(begin)
    if plan.begins is None:
        backend.dense.attend_all(problem, into)
        return
    assert plan.ran_sparse is not None, "what begins where differs"
    start = problem.tokens.bounds[:, 0]
    ends = torch.where(plan.ran_sparse, plan.begins, start)
    backend.dense.attend_sequences(problem, start, into, ends=ends)


def _attend_dense_queries(
    problem: Problem, backend: Backend, ran_sparse: Tensor | None, count: int, into: Attended
) -> None:
    """Attend all queries of sequences that run dense, and the last `count` of the others."""
    count = min(count, problem.query.shape[2])
    if backend.dense.attend_last(problem, count, into):
        count = 0
    if ran_sparse is None and not count:
        return
    start, end = problem.tokens.bounds.unbind(-1)
    last = (end - count).maximum(start)
    if ran_sparse is None:
        backend.dense.attend_sequences(problem, last, into)
        return
    if backend.dense is backend:  # one launch for both
        launches = [(backend, torch.where(ran_sparse, last, start))]
    else:
        launches = [(backend, torch.where(ran_sparse, end, start))]
        if count:
            launches.append((backend.dense, torch.where(ran_sparse, last, end)))
    for one, begins in launches:
        one.attend_sequences(problem, begins, into)


def _attend_dense_heads(
    problem: Problem,
    backend: Backend,
    ran_sparse: Tensor | None,
    heads: Sequence[int],
    into: Attended,
) -> None:
    """Attend all queries of some heads in the sequences that run sparse; overwrites them."""
    if not heads:
        return
    start, end = problem.tokens.bounds.unbind(-1)
    begins = start if ran_sparse is None else torch.where(ran_sparse, start, end)
    group = problem.num_heads // problem.key.shape[1]
    for adjacent, kv_head in adjacent_heads(heads, group):
        part = problem.of_heads(adjacent, kv_head)
        backend.dense.attend_sequences(part, begins, into.of_heads(adjacent))


def adjacent_heads(heads: Sequence[int], group: int) -> Iterator[tuple[slice, slice]]:
    """Yield runs of adjacent heads that share a KV head, each with that head, as slices."""
    begin = 0
    for index, head in enumerate(heads):
        following = heads[index + 1] if index + 1 < len(heads) else None
        if following != head + 1 or following // group != head // group:
            kv_head = head // group
            yield slice(heads[begin], head + 1), slice(kv_head, kv_head + 1)
            begin = index + 1


def _with_dense_heads(
    selection: TokenSelection, heads: Sequence[int], problem: Problem
) -> TokenSelection:
    """Return the selection with all tokens listed for some heads."""
    if not heads:
        return selection
    want_indices = problem.aux.indices
    dense = dense_selection(problem.tokens, problem.num_heads, want_indices=want_indices)
    lengths = selection.lengths.clone()
    for head in heads:  # a list of heads as index would be copied to the device, and waited for
        lengths[:, head] = dense.lengths[:, head]
    if not want_indices:
        return selection._replace(lengths=lengths)
    room = dense.indices.shape[2] - selection.indices.shape[2]
    indices = torch.nn.functional.pad(selection.indices, (0, room), value=-1)
    for head in heads:
        indices[:, head] = dense.indices[:, head]
    return selection._replace(lengths=lengths, indices=indices)


def _with_reasons(selection: TokenSelection, problem: Problem, gate: Gate) -> TokenSelection:
    """Return the selection with the reason why each sequence ran dense, the gate's first."""
    if not problem.aux.indices:
        selection = selection.without_indices()
    if problem.tokens.padded:
        codes = gate.codes(*problem.lengths())
        if selection.reasons is not None:
            codes = torch.where(codes > 0, codes, selection.reasons)
    elif selection.reasons is not None:
        return selection
    else:
        reason = gate.reason(problem.query.shape[2], problem.kv_len)
        code = (reason or DenseReason.SCORES_NOT_FINITE).code
        codes = selection.lengths.new_full((len(problem.query),), code, dtype=torch.int32)
    return selection._replace(reasons=codes.to(torch.int32))
