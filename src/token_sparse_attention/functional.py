"""The method, one stage after the other. Read this first.

    score -> select -> compress Q, K, V -> attend -> decompress

Every head attends causally over its own selected tokens only; a query that a head did not
select gets the fallback there. Nothing is evicted: each call chooses again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from token_sparse_attention.attention.backends import takes_packed
from token_sparse_attention.attention.causal import (
    attend,
    attend_packed,
    attend_rows,
    dense_backend,
    parse_backend,
    resolve_backend,
)
from token_sparse_attention.attention.dense import (
    Attended,
    attend_last,
    leaves_gpu_idle,
    mark_invalid_rows,
    new_output,
    zero_rows,
)
from token_sparse_attention.attention.far_tokens import (
    FarTokens,
    far_tokens,
    list_far_tokens,
    rows_run_sparse,
)
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.windows import attend_windows
from token_sparse_attention.call import Call as Call
from token_sparse_attention.call import SparseOutput as SparseOutput
from token_sparse_attention.call import call_operator
from token_sparse_attention.compression import compress_sequences, decompress_sequences
from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.crossover import NEVER_DENSE, BreakEven, break_even_of
from token_sparse_attention.inputs import (
    RealTokens,
    Span,
    check_attention_inputs,
    check_config,
    check_dense_heads,
    check_head_chunk,
    check_kept,
    check_no_gradients,
    real_tokens,
    resolve_scale,
    single_precision,
    unit_stride,
)
from token_sparse_attention.limits import forces_dense, head_groups, most_tokens
from token_sparse_attention.selection import (
    TokenSelection,
    check_impl,
    check_return_selection,
    dense_selection,
    resolve_impl,
    score_rows,
    select_rows,
)
from token_sparse_attention.tensor_parallel import local_heads, resolve_tp_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, *,
    padding_mask: Tensor | None = ..., scale: float | None = ..., impl: str = ...,
    attention_backend: str | PatternConfig = ..., head_chunk: int | None = ...,
    kept: float | None = ..., tp_group: ProcessGroup | None = ...,
    return_selection: Literal[False] = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, *,
    padding_mask: Tensor | None = ..., scale: float | None = ..., impl: str = ...,
    attention_backend: str | PatternConfig = ..., head_chunk: int | None = ...,
    kept: float | None = ..., tp_group: ProcessGroup | None = ...,
    return_selection: Literal[True, "lengths"], return_lse: Literal[False] = ...,
) -> tuple[Tensor, TokenSelection]: ...  # fmt: skip


@overload
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, *,
    padding_mask: Tensor | None = ..., scale: float | None = ..., impl: str = ...,
    attention_backend: str | PatternConfig = ..., head_chunk: int | None = ...,
    kept: float | None = ..., tp_group: ProcessGroup | None = ...,
    return_selection: Literal[False] = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, *,
    padding_mask: Tensor | None = ..., scale: float | None = ..., impl: str = ...,
    attention_backend: str | PatternConfig = ..., head_chunk: int | None = ...,
    kept: float | None = ..., tp_group: ProcessGroup | None = ...,
    return_selection: Literal[True, "lengths"], return_lse: Literal[True],
) -> SparseOutput: ...  # fmt: skip


def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    attention_backend: str | PatternConfig = "auto",
    head_chunk: int | None = None,
    kept: float | None = None,
    tp_group: ProcessGroup | None = None,
    return_selection: bool | Literal["lengths"] = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, TokenSelection] | tuple[Tensor, Tensor] | SparseOutput:
    r"""Causal attention in which every head attends only over the tokens it needs.

    With I the head's selected positions,
    ``out[I] = softmax(scale * query[I] key[I]^T + causal) value[I]``, and the fallback
    elsewhere. For prefill; the result has no gradient.

    On CUDA nothing here waits for the device, unless the attention backend is one that
    reads lengths on the host (cudnn, efficient, math, patterns), or the code is plain PyTorch
    (``impl="reference"``, float64, head sizes above 256); so the call can be captured
    in a CUDA graph. It can be compiled as one operator.

    Args:
        query: ``[B, H, S_q, D]``, floating, after position encoding. Queries occupy the
            slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv (GQA).
        value: ``[B, H_kv, S_kv, D]``.
        config: the settings; its ``sparse_layers`` is not read here.
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, one contiguous run per row.
            Every length and window counts real tokens; a row of a batch gives what it gives
            alone. Padded query rows give zeros. Where checking would wait for the device, a
            row that is not one run gives NaN, else an error.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        impl: which code scores, selects and moves tokens: ``"auto"``, ``"triton"`` or
            ``"reference"``.
        attention_backend: which kernel attends: ``"auto"``, ``"fa4"`` (flash-attn-4, and
            FlashAttention-2 for the last queries of few heads), ``"flash"``
            (FlashAttention-2), ``"cudnn"``, ``"efficient"`` or ``"math"``. An
            explicit choice never falls back. Or a block-sparse pattern, which then runs in
            place of dense causal attention, in rows that run dense as well, and where the
            config selects no queries only in these: ``"flexprefill"``,
            ``"minference"``, ``"xattention"``, ``"streaming"``, or settings such as
            ``FlexPrefillConfig(gamma=0.9)``; see `parse_backend`.
        head_chunk: how many heads of the batch to compress and attend at once, which bounds
            memory; as many as fit half a GiB if None. The reference takes all, and without
            selected queries there is nothing to compress.
        kept: keep this share of a row's real tokens, in ``(0, 1]``, in place of the budget,
            which is still computed. For benchmarks and ablations: the crossover and the
            rules for short contexts do not apply then.
        tp_group: the ranks that hold the other query heads of the same layer, where tensor
            parallelism splits them; every rank has equally many and calls with the same
            shapes, mask and settings. The ranks then keep as many tokens, and run the same
            rows dense, as one process with all heads would. A compiler does not look into
            such a call.
        return_selection: also return the selection; ``"lengths"`` for how many tokens each head
            keeps but not which: ``indices`` is ``[B, H, 0]`` then, which saves memory and work.
        return_lse: also return the log-sum-exp.

    Returns:
        The output ``[B, H, S_q, D]`` in query's dtype and, unless all rows run dense, in its
        memory layout; with one of the
        flags a pair with `TokenSelection` or the log-sum-exp ``[B, H, S_q]`` float32; with
        both a `SparseOutput`.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices, names or the mask do not fit, if an input requires a
            gradient while gradients are recorded, or if the backend cannot run the input.

    Source:
        arXiv 2602.03216; ``S_q < S_kv``, the windowed fallback and the crossover are
        extensions.

    Example:
        >>> query = torch.randn(1, 8, 500, 32)
        >>> key, value = torch.randn(2, 1, 2, 500, 32)
        >>> config = TokenSparseConfig.published(drop_mass=0.3, window_size=32, min_tokens=64)
        >>> out, selection = token_sparse_attention(
        ...     query, key, value, config, return_selection=True
        ... )
        >>> out.shape, bool(selection.ran_sparse)
        (torch.Size([1, 8, 500, 32]), True)
    """
    check_config(config)
    check_attention_inputs(query, key, value)
    check_no_gradients(query=query, key=key, value=value)
    backend = parse_backend(attention_backend)
    check_impl(impl)
    check_head_chunk(head_chunk)
    check_kept(kept, config)
    check_return_selection(return_selection)
    tp_group = resolve_tp_group(tp_group)
    ranks = 1 if tp_group is None else tp_group.size()
    check_dense_heads(config, ranks * query.shape[1])
    scale = resolve_scale(scale, query.shape[-1])
    wants = (return_selection is not False, return_selection is True, return_lse)
    call = Call(scale, impl, backend, head_chunk, kept, *wants)
    if torch.compiler.is_compiling() and tp_group is None:
        result = call_operator(query, key, value, padding_mask, config, call)
    else:
        run_now = run if tp_group is None else _run_untraced
        with torch.no_grad():
            result = run_now(query, key, value, padding_mask, config, call, tp_group)
    if return_selection and return_lse:
        return result
    if result.selection is not None:
        return result.output, result.selection
    if result.lse is not None:
        return result.output, result.lse
    return result.output


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    config: TokenSparseConfig,
    call: Call,
    tp_group: ProcessGroup | None = None,
) -> SparseOutput:
    """`token_sparse_attention` on checked arguments."""
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    call = call._replace(kept=single_precision(call.kept))
    impl = resolve_impl(call.impl, query, query.shape[-1])
    query_len, kv_len = query.shape[2], key.shape[2]
    even = NEVER_DENSE if call.kept is not None else break_even_of(config, query)
    longest = Span(0, kv_len)
    if padding_mask is None and forces_dense(config, even, longest, query_len, kv_len, call.kept):
        return _all_dense(query, key, value, None, call)
    tokens = real_tokens(
        padding_mask, len(query), kv_len, query.device, on_device=impl == "triton"
    )
    # Where only the device knows the rows, the longest row there could be decides.
    if all(
        forces_dense(config, even, span, query_len, kv_len, call.kept)
        for span in tokens.spans or [longest]
    ):
        return _all_dense(query, key, value, tokens, call)

    scores = score_rows(query, key, config, tokens, call.scale, impl)
    far = far_tokens(scores, config, tokens, impl, tp_group)
    selection = None
    if config.select_queries:
        selection = select_rows(
            scores, config, tokens, impl,
            query_len=query_len, kept=call.kept, even=even, tp_group=tp_group,
        )  # fmt: skip
        ran_sparse = selection.ran_sparse
    else:
        ran_sparse = rows_run_sparse(scores, config, tokens, query_len, even, tp_group)
    del scores
    attended = attend_selected(
        query, key, value, config, ran_sparse, selection, far, tokens, even, impl, call
    )
    dense_heads = local_heads(config.dense_heads, query.shape[1], tp_group)
    _attend_dense_heads(query, key, value, dense_heads, ran_sparse, tokens, call, attended)
    mark_invalid_rows(attended, tokens)
    if not call.want_selection:
        return SparseOutput(attended.out, None, attended.lse)
    selection = selection or list_far_tokens(
        far, ran_sparse, tokens, query.shape[1], dense_heads, want_indices=call.want_indices
    )
    if not call.want_indices:
        selection = selection.without_indices()
    return SparseOutput(attended.out, selection.to_int64(), attended.lse)


_run_untraced = torch.compiler.disable(run)  # type: ignore[no-untyped-call]


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    ran_sparse: Tensor,
    selection: TokenSelection | None,
    far: FarTokens | None,
    tokens: RealTokens,
    even: BreakEven,
    impl: str,
    call: Call,
) -> Attended:
    """Attend the sparse rows' fallback and selected tokens, and what runs dense.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        config: the settings.
        ran_sparse: ``[B]`` bool, which rows run sparse.
        selection: the selected tokens; None where queries are not selected.
        far: what the fallback's queries see beyond their window; None for nothing.
        tokens: where the real tokens are.
        even: the crossover, which bounds the memory of shared budgets.
        impl: ``"triton"`` or ``"reference"``.
        call: the other arguments.
    """
    into = new_output(query, call.want_lse)
    backend = resolve_backend(call.attention_backend, query, key)
    if tokens.padded:
        zero_rows(into, slice(None))
    if config.fallback == "window":
        attend_windows(
            query, key, value, far, ran_sparse, tokens, into,
            window=config.fallback_window, scale=call.scale, impl=impl,
            backend=dense_backend(backend),
        )  # fmt: skip
    if selection is not None:
        zeros = config.fallback == "zero" and not tokens.padded
        _attend_compressed(
            query, key, value, config, selection, even, impl, backend, call, into, zeros=zeros
        )
    _attend_dense(query, key, value, config, ran_sparse, tokens, backend, call, into)
    return into


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    ran_sparse: Tensor,
    tokens: RealTokens,
    backend: str,
    call: Call,
    into: Attended,
) -> None:
    """Attend all queries of the rows that run dense, and the others' last ``dense_queries``."""
    start, end = tokens.bounds.unbind(-1)
    count, for_last = config.dense_queries, dense_backend(backend)
    if not tokens.padded and leaves_gpu_idle(for_last, query, key, count):
        attend_last(query, key, value, count, into, scale=call.scale)
        count = 0
    last = (end - count).maximum(start)
    if for_last == backend:  # one launch for both
        launches = {backend: torch.where(ran_sparse, last, start)}
    else:
        launches = {backend: torch.where(ran_sparse, end, start)}
        if count:
            launches[for_last] = torch.where(ran_sparse, last, end)
    for by, begins in launches.items():
        attend_rows(query, key, value, begins, tokens, into, scale=call.scale, backend=by)


def _attend_dense_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Sequence[int],
    ran_sparse: Tensor,
    tokens: RealTokens,
    call: Call,
    into: Attended,
) -> None:
    """Attend all queries of some heads in the rows that run sparse, over what was there."""
    if not heads:
        return
    start, end = tokens.bounds.unbind(-1)
    begins = torch.where(ran_sparse, start, end)
    backend = dense_backend(resolve_backend(call.attention_backend, query, key))
    for run_of_heads, kv_head in _runs_of_heads(heads, query.shape[1] // key.shape[1]):
        lse = None if into.lse is None else into.lse[:, run_of_heads]
        attend_rows(
            query[:, run_of_heads], key[:, kv_head], value[:, kv_head],
            begins, tokens, Attended(into.out[:, run_of_heads], lse),
            scale=call.scale, backend=backend,
        )  # fmt: skip


def _runs_of_heads(heads: Sequence[int], group: int) -> Iterator[tuple[slice, slice]]:
    """Yield heads that follow each other and share a KV head, and that head: views, no copies."""
    begin = 0
    for place, head in enumerate(heads):
        following = heads[place + 1] if place + 1 < len(heads) else None
        if following != head + 1 or following // group != head // group:
            kv_head = head // group
            yield slice(heads[begin], head + 1), slice(kv_head, kv_head + 1)
            begin = place + 1


def _attend_compressed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    selection: TokenSelection,
    even: BreakEven,
    impl: str,
    backend: str,
    call: Call,
    into: Attended,
    *,
    zeros: bool,
) -> None:
    """Compress, attend, decompress: the selected tokens; `zeros` also clears the others."""
    if impl == "reference":
        if zeros:
            zero_rows(into, selection.ran_sparse)
        if not selection.ran_sparse.any():
            return
        selection = selection.sparse_rows_only()
    elif not takes_packed(backend, query) and not selection.ran_sparse.any():
        return
    sparse = selection._replace(lengths=selection.lengths * selection.ran_sparse[:, None])
    max_length = most_tokens(config, even, query.shape[2], key.shape[2], call.kept)
    for sequences in head_groups(query, max_length, impl, call.head_chunk):
        packed = compress_sequences(
            query, key, value, sparse, sequences, impl=impl, max_length=max_length
        )
        heads = [number % query.shape[1] for number in sequences]
        attended = attend_packed(
            *packed, scale=call.scale, backend=backend,
            heads=heads, num_heads=query.shape[1], want_lse=call.want_lse,
        )  # fmt: skip
        offsets = (packed.cu_seqlens_q, packed.cu_seqlens_k)
        del packed
        decompress_sequences(
            attended.out, sparse, offsets, sequences, into.out,
            zeros=zeros, impl=impl, lse=_both(attended.lse, into.lse),
        )  # fmt: skip
        del attended


def _both(packed: Tensor | None, full: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if packed is None or full is None else (packed, full)


def _all_dense(
    query: Tensor, key: Tensor, value: Tensor, tokens: RealTokens | None, call: Call
) -> SparseOutput:
    """Dense attention of every row; without `tokens`, all slots are real."""
    backend = call.attention_backend
    if tokens is None or not tokens.padded:
        into = attend(query, key, value, scale=call.scale, backend=backend, want_lse=call.want_lse)
        into = into._replace(lse=None if into.lse is None else into.lse.float())
    else:
        into = new_output(query, call.want_lse)
        zero_rows(into, slice(None))
        begins = tokens.bounds[:, 0]
        attend_rows(query, key, value, begins, tokens, into, scale=call.scale, backend=backend)
        mark_invalid_rows(into, tokens)
    if not call.want_selection:
        return SparseOutput(into.out, None, into.lse)
    if tokens is None:
        tokens = real_tokens(None, len(query), key.shape[2], query.device)
    selection = dense_selection(tokens, query.shape[1], want_indices=call.want_indices)
    return SparseOutput(into.out, selection, into.lse)


importlib.import_module("token_sparse_attention.library")  # registers PyTorch's operator
