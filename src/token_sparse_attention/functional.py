"""The method, one stage after the other. Read this first.

    score -> select -> compress Q, K, V -> attend -> decompress

Every head attends causally over its own selected tokens only; a query that a head did not
select gets the fallback there. Nothing is evicted: each call chooses again.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from token_sparse_attention.attention.dense import (
    causal_attention,
    check_backend,
    varlen_causal_attention,
)
from token_sparse_attention.compression import compress, scatter_rows
from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.inputs import (
    Span,
    check_attention_inputs,
    check_config,
    check_no_gradients,
    real_spans,
    resolve_scale,
)
from token_sparse_attention.selection import (
    TokenSelection,
    dense_selection,
    score_spans,
    select_spans,
)

IMPLS = ("auto", "reference")


@overload
def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = ...,
    scale: float | None = ...,
    impl: str = ...,
    attention_backend: str = ...,
    return_selection: Literal[False] = ...,
) -> Tensor: ...


@overload
def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = ...,
    scale: float | None = ...,
    impl: str = ...,
    attention_backend: str = ...,
    return_selection: Literal[True],
) -> tuple[Tensor, TokenSelection]: ...


def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    attention_backend: str = "auto",
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, TokenSelection]:
    r"""Causal attention in which every head attends only over the tokens it needs.

    With I the head's selected positions,
    ``out[I] = softmax(scale * query[I] key[I]^T + causal) value[I]``, and the fallback
    elsewhere. For prefill; the result has no gradient.

    Args:
        query: ``[B, H, S_q, D]``, floating, after position encoding. Queries occupy the
            slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv (GQA).
        value: ``[B, H_kv, S_kv, D]``.
        config: the settings; its ``sparse_layers`` is not read here.
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, one contiguous run per row.
            Every length and window counts real tokens; a row of a batch gives what it gives
            alone. Padded query rows give zeros.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        impl: which code scores and selects: ``"auto"`` or ``"reference"``.
        attention_backend: which kernel attends: ``"auto"``, ``"flash"``, ``"cudnn"``,
            ``"efficient"`` or ``"math"``. An explicit choice never falls back.
        return_selection: also return the selection.

    Returns:
        The output ``[B, H, S_q, D]`` in query's dtype, or ``(output, TokenSelection)``.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices, names or the mask do not fit, if an input requires a
            gradient while gradients are recorded, or if the backend cannot run the input.

    Source:
        arXiv 2602.03216; ``S_q < S_kv`` and the windowed fallback are
        extensions.

    Example:
        >>> query = torch.randn(1, 8, 500, 32)
        >>> key, value = torch.randn(2, 1, 2, 500, 32)
        >>> config = TokenSparseConfig(drop_mass=0.3, window_size=32, min_tokens=64)
        >>> out, selection = token_sparse_attention(
        ...     query, key, value, config, return_selection=True
        ... )
        >>> out.shape, bool(selection.ran_sparse)
        (torch.Size([1, 8, 500, 32]), True)
    """
    check_config(config)
    check_attention_inputs(query, key, value)
    check_no_gradients(query=query, key=key, value=value)
    check_backend(attention_backend)
    check_impl(impl)
    scale = resolve_scale(scale, query.shape[-1])
    spans = real_spans(padding_mask, key.shape[0], key.shape[2])
    query, key, value = query.detach(), key.detach(), value.detach()

    if all(_lengths_force_dense(config, span, query, key) for span in spans):
        selection = dense_selection(spans, query.shape[1], key.shape[2], query.device)
    else:
        scores = score_spans(query, key, config, spans, scale)
        selection = select_spans(scores, config, spans, key.shape[2])
    output = _unselected_rows(
        query, key, value, config, selection, spans, scale, attention_backend
    )
    if selection.ran_sparse.any():
        sparse = selection.sparse_rows_only()
        packed = compress(query, key, value, sparse)
        attended = varlen_causal_attention(
            packed.query,
            packed.key,
            packed.value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_k,
            scale=scale,
            backend=attention_backend,
        )
        scatter_rows(attended, sparse, output)
    return (output, selection) if return_selection else output


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is a known name."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def _lengths_force_dense(
    config: TokenSparseConfig, span: Span, query: Tensor, key: Tensor
) -> bool:
    first_query = key.shape[2] - query.shape[2]
    query_len = max(span.end - max(span.start, first_query), 0)
    return config.dense_reason(query_len, span.end - span.start) is not None


def _unselected_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    selection: TokenSelection,
    spans: list[Span],
    scale: float,
    backend: str,
) -> Tensor:
    """Return ``[B, H, S_q, D]``: dense sequences attended, others with their fallback rows."""
    first_query = key.shape[2] - query.shape[2]
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for row, (span, is_sparse) in enumerate(zip(spans, selection.ran_sparse.tolist())):
        begin = max(span.start, first_query)
        if begin >= span.end or (is_sparse and config.fallback == "zero"):
            continue
        queries = slice(begin - first_query, span.end - first_query)
        keys = slice(span.start, span.end)
        output[row, :, queries] = causal_attention(
            query[row : row + 1, :, queries],
            key[row : row + 1, :, keys],
            value[row : row + 1, :, keys],
            scale=scale,
            backend=backend,
            window=config.fallback_window if is_sparse else None,
        )[0]
    return output
