"""Score every key by the attention that the last queries give it."""

from __future__ import annotations

import torch
from torch import Tensor

from token_sparse_attention import reference
from token_sparse_attention.config import check_int
from token_sparse_attention.impls import load_kernels, resolve_impl
from token_sparse_attention.inputs import (
    RealTokens,
    check_attention_inputs,
    check_no_gradients,
    real_tokens,
    resolve_scale,
    unit_stride,
)


def score_tokens(
    query: Tensor,
    key: Tensor,
    num_probes: int,
    *,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Score every key before the probes by the attention that the probes give it.

    The probes are the last W real queries. The score of key j is the mean over them of
    ``softmax_j(scale * q_i . k_j)``, causal among the probes.

    Args:
        query: ``[B, H, S_q, D]``, any floating dtype, after position encoding; the queries
            occupy the slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv.
        num_probes: W.
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, one run per sequence.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        impl: which code runs: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, H, N]`` float32 with ``N = max(S_kv - W, 0)``, indexed by slot. Padding and the
        probes' own slots hold 0; a sequence with fewer than W real queries has no scores: NaN.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or the mask do not fit.

    Source:
        arXiv 2602.03216, token scoring; `reference.probe_scores` is the literal form.

    Example:
        >>> query, key = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 300, 32)
        >>> score_tokens(query, key, num_probes=128).shape
        torch.Size([1, 4, 172])
    """
    check_int("num_probes", num_probes, 1)
    check_attention_inputs(query, key, None)
    check_no_gradients(query=query, key=key)
    impl = resolve_impl(impl, query, query.shape[-1])
    scale = resolve_scale(scale, query.shape[-1])
    tokens = real_tokens(
        padding_mask, len(key), key.shape[2], key.device, on_device=impl == "triton"
    )
    query, key = unit_stride(query.detach()), unit_stride(key.detach())
    return score_keys(query, key, num_probes, tokens, scale, impl)


def score_keys(
    query: Tensor, key: Tensor, num_probes: int, tokens: RealTokens, scale: float, impl: str
) -> Tensor:
    """`score_tokens` on checked arguments."""
    kv_len = key.shape[2]
    if impl == "triton":
        scores: Tensor = load_kernels("scoring").score_tokens(
            query, key, tokens.bounds, num_probes, scale, padded=tokens.padded
        )
        return scores
    batch_size, num_heads, query_len, _ = query.shape
    first_query = kv_len - query_len
    num_scored = max(kv_len - num_probes, 0)
    scores = query.new_zeros(batch_size, num_heads, num_scored, dtype=torch.float32)
    for number, span in enumerate(tokens.host_spans()):
        queries = query[number, :, max(span.start - first_query, 0) : span.end - first_query]
        if span.end <= first_query or queries.shape[1] < num_probes:
            scores[number] = torch.nan
        elif span.end - span.start > num_probes:
            scores[number, :, span.start : span.end - num_probes] = reference.probe_scores(
                queries, key[number, :, span.start : span.end], num_probes, scale
            )
    return scores
