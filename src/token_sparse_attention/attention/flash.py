"""flash-attn-4, and PyTorch's FlashAttention-2 on packed sequences: lengths stay on the device.

Tensors are in these kernels' layout, ``[T, heads, D]`` packed or ``[B, S, heads, D]``; GQA
is native and causal masks are aligned at the end of each sequence.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _fa4_forward() -> Any:
    # It warns at each compilation of an argument of its own that it knows to be constant.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    return importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd


def rows_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of whole rows.

    Args:
        backend: ``"fa4"`` or ``"flash"``.
        query: ``[B, S_q, H, D]``.
        key: ``[B, S_kv, H_kv, D]``.
        value: likewise.
        scale: factor of the logits.
        window: keys each query sees, itself included; None for all.
        want_lse: whether the log-sum-exp is wanted.

    Returns:
        The output ``[B, S_q, H, D]``, and ``[B, H, S_q]`` float32 or None.
    """
    left = None if window is None else window - 1
    if backend == "fa4":
        result, lse = _fa4_forward()(
            query,
            key,
            value,
            softmax_scale=scale,
            causal=True,
            window_size_left=left,
            return_lse=want_lse,
        )[:2]
        return result, lse
    result, lse = _flash_2(
        query, key, value, None, None, query.shape[1], key.shape[1], scale=scale, window=window
    )
    return result, lse


def varlen_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of packed sequences; rows outside all of them are left as they are.

    flash-attn-4 multiplies values up to a tile beyond a sequence's end by zero: they must not
    be NaN or infinite.

    Args:
        backend: ``"fa4"`` or ``"flash"``.
        query: ``[T_q, H, D]``.
        key: ``[T_k, H_kv, D]``.
        value: likewise.
        cu_seqlens_q: ``[sequences + 1]`` int32.
        cu_seqlens_k: ``[sequences + 1]`` int32.
        max_seqlen_q: no sequence has more queries; may be loose.
        max_seqlen_k: no sequence has more keys; may be loose.
        scale: factor of the logits.
        window: keys each query sees, itself included; None for all.
        out: ``[T_q, H, D]``, written if given.
        want_lse: whether the log-sum-exp is wanted.

    Returns:
        The output ``[T_q, H, D]``, and ``[H, T_q]`` float32 or None.
    """
    left = None if window is None else window - 1
    if backend == "fa4":
        result, lse = _fa4_forward()(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            window_size_left=left,
            pack_gqa=False,  # faster here: the tiles of a packed group balance worse
            out=out,
            return_lse=want_lse,
        )[:2]
        return result, lse
    result, lse = _flash_2(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        window=window,
    )
    if out is None:
        return result, lse
    # It allocates its own output: take over the rows that belong to a sequence.
    row = torch.arange(len(out), device=out.device)
    inside = (row >= cu_seqlens_q[0]) & (row < cu_seqlens_q[-1])
    out.copy_(torch.where(inside[:, None, None], result, out))
    return out, lse


def _flash_2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention-2, which its public functions give no window in every version."""
    result: tuple[Tensor, Tensor] = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[:2]
    return result
