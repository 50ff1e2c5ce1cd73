"""Dense causal attention by the chosen backend: whole rows, some rows, packed sequences.

Causal always means aligned at the end: the last query sees every key. GQA is native.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention import flash, sdpa
from token_sparse_attention.attention.backends import (
    check_flash,
    choose_backend,
    takes_packed,
)
from token_sparse_attention.device import multiprocessors, on_its_device
from token_sparse_attention.inputs import RealTokens

_TILE = 128  # queries of a head that flash-attn-4 gives to one multiprocessor
_SPLITTING_GAIN = 3  # so much of the GPU must lie idle: FlashAttention-2 is slower on a full one


class Attended(NamedTuple):
    """Rows of attention output, and their log-sum-exp if it was asked for."""

    out: Tensor
    lse: Tensor | None


def new_output(query: Tensor, want_lse: bool) -> Attended:
    """Return unset output in query's memory layout, which kernels and models go on with."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if want_lse else None
    return Attended(torch.empty_like(query), lse)


def zero_rows(into: Attended, rows: Tensor | slice) -> None:
    """Set rows of the batch to what attention to no keys gives."""
    into.out[rows] = 0
    if into.lse is not None:
        into.lse[rows] = -torch.inf


def mark_invalid_rows(into: Attended, tokens: RealTokens) -> None:
    """Set rows to NaN whose mask was not one run, where no error could say so."""
    if tokens.valid is not None:
        invalid = ~tokens.valid[:, None, None]
        into.out.masked_fill_(invalid[..., None], torch.nan)
        if into.lse is not None:
            into.lse.masked_fill_(invalid, torch.nan)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    backend: str = "auto",
    window: int | None = None,
) -> Tensor:
    """Causal attention, aligned at the end, optionally within a sliding window.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``, ``S_kv >= S_q``.
        value: ``[B, H_kv, S_kv, D]``.
        scale: factor of the logits.
        backend: one of `BACKENDS`; an explicit one never falls back.
        window: each query sees this many keys up to and including itself; None for all.

    Returns:
        ``[B, H, S_q, D]``.

    Raises:
        ValueError: if an explicit backend cannot run these inputs.
    """
    return attend(query, key, value, scale=scale, backend=backend, window=window).out


@on_its_device
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    backend: str = "auto",
    window: int | None = None,
    want_lse: bool = False,
) -> Attended:
    """`causal_attention` with the log-sum-exp ``[B, H, S_q]`` float32 if it is wanted.

    flash-attn-4 and FlashAttention-2 give it along the way; for the others the logits are
    computed once more.
    """
    if window is not None and window >= key.shape[2]:
        window = None
    backend = resolve_kernel(backend, query, key)
    if takes_packed(backend, query):
        out, lse = flash.rows_attention(
            backend,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=scale,
            window=window,
            want_lse=want_lse,
        )
        return Attended(out.transpose(1, 2), lse if want_lse else None)
    out = sdpa.causal_sdpa(query, key, value, scale, backend, window)
    return Attended(out, sdpa.causal_lse(query, key, scale, window) if want_lse else None)


def resolve_kernel(backend: str, query: Tensor, key: Tensor) -> str:
    """Return the dense backend to run; the name of a flash kernel only where it can run.

    Raises:
        ValueError: if flash-attn-4 or FlashAttention-2 was asked for and cannot run.
    """
    backend = choose_backend(backend, query, key).name
    if backend in ("fa4", "flash"):
        check_flash(backend, query)
    return backend


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    tokens: RealTokens,
    into: Attended,
    *,
    scale: float,
    backend: str,
    window: int | None = None,
) -> None:
    """Causal attention of each row's last queries, written in place; the others stay.

    Kernels that take lengths from the device are launched for every row, also where none of its
    queries attends; for the others the host reads where they begin.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        begins: ``[B]`` int32, the slot of the first query that attends, if it is there: the
            row's start for all of its queries, its end for none.
        tokens: where the real tokens are.
        into: output ``[B, H, S_q, D]`` and log-sum-exp to write.
        scale: factor of the logits.
        backend: one of `BACKENDS`.
        window: keys each query sees, itself included; None for all.
    """
    backend = resolve_kernel(backend, query, key)
    if not takes_packed(backend, query):

        def run(*row: Tensor) -> Attended:
            return attend(
                *row,
                scale=scale,
                backend=backend,
                window=window,
                want_lse=into.lse is not None,
            )

        attend_each_row(query, key, value, begins, tokens, into, run)
        return
    if tokens.padded and backend == "fa4":  # which multiplies values beyond a row's end by zero
        value = value.masked_fill(~tokens.mask()[:, None, :, None], 0.0)
    first_query = key.shape[2] - query.shape[2]
    query, key, value, out = (x.transpose(1, 2) for x in (query, key, value, into.out))
    cu_seqlens_q = torch.stack((begins, tokens.bounds[:, 1]), -1)
    if first_query:
        cu_seqlens_q = (cu_seqlens_q - first_query).clamp(min=0)
    for row in range(len(query)):
        _, lse = flash.varlen_attention(
            backend,
            query[row],
            key[row],
            value[row],
            cu_seqlens_q[row],
            tokens.bounds[row],
            max_seqlen_q=query.shape[1],
            max_seqlen_k=key.shape[1],
            scale=scale,
            window=window,
            out=out[row],
            want_lse=into.lse is not None,
        )
        if into.lse is not None and lse is not None:
            slot = torch.arange(query.shape[1], device=query.device)
            inside = (slot >= cu_seqlens_q[row, 0]) & (slot < cu_seqlens_q[row, 1])
            into.lse[row] = torch.where(inside, lse, into.lse[row])


def leaves_gpu_idle(backend: str, query: Tensor, key: Tensor, count: int) -> bool:
    """Return whether a few queries of each head give flash-attn-4 too little to do.

    On Hopper it gives all keys of a tile of queries to one multiprocessor, however long they are;
    FlashAttention-2 splits them.

    Args:
        backend: one of `BACKENDS`.
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        count: how many queries of each head attend.
    """
    if not 0 < count < query.shape[2] or not query.is_cuda:
        return False
    if choose_backend(backend, query, key).name != "fa4":
        return False
    tiles = query.shape[0] * query.shape[1] * math.ceil(count / _TILE)
    return _SPLITTING_GAIN * tiles <= multiprocessors(query.device)


def attend_last(
    query: Tensor, key: Tensor, value: Tensor, count: int, into: Attended, *, scale: float
) -> None:
    """Causal attention of each row's last queries, written in place, by FlashAttention-2.

    Args:
        query: ``[B, H, S_q, D]``, rows without padding.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        count: how many queries.
        into: output ``[B, H, S_q, D]`` and log-sum-exp to write.
        scale: factor of the logits.
    """
    last = slice(-count, None)
    want_lse = into.lse is not None
    one = attend(query[:, :, last], key, value, scale=scale, backend="flash", want_lse=want_lse)
    into.out[:, :, last] = one.out
    if into.lse is not None and one.lse is not None:
        into.lse[:, :, last] = one.lse


def attend_each_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    tokens: RealTokens,
    into: Attended,
    run: Callable[..., Attended],
) -> None:
    """`attend_rows`, one row after the other, its real tokens cut out by lengths on the host.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        begins: ``[B]`` int32, as for `attend_rows`.
        tokens: where the real tokens are.
        into: what to write.
        run: attends, given query, key and value of one row with a batch dimension.
    """
    first_query = key.shape[2] - query.shape[2]
    for row, (begin, span) in enumerate(zip(begins.tolist(), tokens.host_spans())):
        begin = max(begin, first_query)
        if begin >= span.end:
            continue
        queries = slice(begin - first_query, span.end - first_query)
        keys = slice(span.start, span.end)
        one = run(
            query[row : row + 1, :, queries],
            key[row : row + 1, :, keys],
            value[row : row + 1, :, keys],
        )
        into.out[row, :, queries] = one.out[0]
        if into.lse is not None and one.lse is not None:
            into.lse[row, :, queries] = one.lse[0]


def varlen_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    backend: str = "auto",
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Causal attention of many packed single-head sequences, each aligned at its end.

    Args:
        query: ``[T_q, D]``.
        key: ``[T_k, D]``.
        value: ``[T_k, D]``.
        cu_seqlens_q: ``[sequences + 1]`` int32; T_q may be larger than its last entry, and
            what stands beyond it means nothing.
        cu_seqlens_k: ``[sequences + 1]`` int32.
        scale: factor of the logits.
        backend: one of `BACKENDS`.
        max_seqlen_q: no sequence has more queries; T_q if None.
        max_seqlen_k: no sequence has more keys; T_k if None.

    Returns:
        ``[T_q, D]``.
    """
    return attend_packed(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q or len(query),
        max_seqlen_k or len(key),
        scale=scale,
        backend=backend,
    ).out


@on_its_device
def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    backend: str,
    want_lse: bool = False,
) -> Attended:
    """`varlen_causal_attention` with the log-sum-exp ``[T_q]`` float32 if it is wanted."""
    backend = resolve_kernel(backend, query[None, None], key[None, None])
    if takes_packed(backend, query):
        out, lse = flash.varlen_attention(
            backend,
            query[:, None],
            key[:, None],
            value[:, None],
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            scale=scale,
            want_lse=want_lse,
        )
        return Attended(out[:, 0], lse[0] if want_lse and lse is not None else None)
    query_lens = cu_seqlens_q.diff().tolist()
    kv_lens = cu_seqlens_k.diff().tolist()
    out = sdpa.packed_sdpa(query, key, value, query_lens, kv_lens, scale, backend)
    if not want_lse:
        return Attended(out, None)
    lse = query.new_empty(len(query), dtype=torch.float32)
    begin_q = begin_k = 0
    for query_len, kv_len in zip(query_lens, kv_lens):
        q, k = query[None, None, begin_q:][:, :, :query_len], key[None, None, begin_k:]
        lse[begin_q : begin_q + query_len] = sdpa.causal_lse(q, k[:, :, :kv_len], scale, None)
        begin_q += query_len
        begin_k += kv_len
    return Attended(out, lse)
