"""Dense causal attention through PyTorch's SDPA: rectangular, windowed and packed.

Causal always means aligned at the end: the last query sees every key. K and V of a GQA
group are never repeated: kernels that know GQA get the group, others one member at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

BACKENDS = ("auto", "flash", "cudnn", "efficient", "math")
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CUDA_CHECKS = {
    "cudnn": can_use_cudnn_attention,
    "flash": can_use_flash_attention,
    "efficient": can_use_efficient_attention,
}
_NO_KERNEL = ("No available kernel", "No viable backend")  # what SDPA says where none fits
_MASKED_ROWS = 256  # queries per block where a mask has to be written out


class BackendChoice(NamedTuple):
    """An attention backend and why it was chosen."""

    name: str
    reason: str


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name."""
    if backend not in BACKENDS:
        raise ValueError(
            f"attention_backend must be one of {', '.join(BACKENDS)}; got {backend!r}"
        )


def choose_backend(
    backend: str, query: Tensor, key: Tensor, *, masked: bool = False
) -> BackendChoice:
    """Return the backend to run: the given one, or for ``"auto"`` the fastest available.

    Order on CUDA: cudnn, flash, efficient, math, the first that takes the dtype and head
    size; elsewhere flash, PyTorch's own fused CPU kernel.

    Args:
        backend: one of `BACKENDS`.
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        masked: whether the call needs a mask that is not plain causal.
    """
    check_backend(backend)
    if backend != "auto":
        return BackendChoice(backend, "asked for")
    if query.device.type != "cuda":
        return BackendChoice("flash", f"PyTorch's fused kernel for {query.device.type}")
    passed_over: list[str] = []
    mask = query.new_empty(1, 1, 8, 8, dtype=torch.bool) if masked else None
    probe = query[:, :: query.shape[1] // key.shape[1], :8]
    params = SDPAParams(probe, key[:, :, :8], key[:, :, :8], mask, 0.0, not masked, False)
    for name, can_use in _CUDA_CHECKS.items():
        if can_use(params, False):
            order = f"not usable: {', '.join(passed_over)}" if passed_over else "first choice"
            return BackendChoice(name, f"{order} on {torch.cuda.get_device_name(query.device)}")
        passed_over.append(name)
    return BackendChoice("math", "no fused kernel takes this dtype and head size")


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
    query_len, kv_len = query.shape[2], key.shape[2]
    if window is not None and window < kv_len:
        return _blockwise_attention(query, key, value, scale, backend, window)
    if query_len in (1, kv_len):
        causal = query_len > 1
        return _sdpa(query, key, value, None, causal, scale, backend)
    if query.device.type == "cuda" and choose_backend(backend, query, key).name == "flash":
        # FlashAttention aligns causal masks at the end by itself; the bias only names that.
        bias = causal_lower_right(query_len, kv_len)
        return _sdpa(query, key, value, bias, False, scale, "flash")
    return _blockwise_attention(query, key, value, scale, backend, kv_len)


def _blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str, window: int
) -> Tensor:
    """Attention with a band mask, a block of queries at a time, over the keys it can see."""
    query_len, kv_len = query.shape[2], key.shape[2]
    first_query = kv_len - query_len
    out = torch.empty_like(query)
    for begin in range(0, query_len, _MASKED_ROWS):
        end = min(begin + _MASKED_ROWS, query_len)
        first_key = max(first_query + begin - window + 1, 0)
        last_key = first_query + end
        position = torch.arange(first_query + begin, last_key, device=query.device)[:, None]
        slot = torch.arange(first_key, last_key, device=query.device)
        band = (slot <= position) & (slot > position - window)
        keys = slice(first_key, last_key)
        out[:, :, begin:end] = _sdpa(
            query[:, :, begin:end], key[:, :, keys], value[:, :, keys], band, False, scale, backend
        )
    return out


def varlen_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of many packed single-head sequences, each aligned at its end.

    Args:
        query: ``[T_q, D]``.
        key: ``[T_k, D]``.
        value: ``[T_k, D]``.
        cu_seqlens_q: ``[sequences + 1]`` int32.
        cu_seqlens_k: ``[sequences + 1]`` int32.
        scale: factor of the logits.
        backend: one of `BACKENDS`.

    Returns:
        ``[T_q, D]``.
    """
    query_lens = cu_seqlens_q.diff().tolist()
    kv_lens = cu_seqlens_k.diff().tolist()
    if len(set(query_lens)) == len(set(kv_lens)) == 1 and query_lens[0] > 0:
        heads = len(query_lens)
        q, k, v = (x.view(1, heads, -1, x.shape[-1]) for x in (query, key, value))
        return causal_attention(q, k, v, scale=scale, backend=backend).reshape(query.shape)
    out = torch.empty_like(query)
    parts = ((query, query_lens), (key, kv_lens), (value, kv_lens), (out, query_lens))
    sequences = zip(*(torch.split(tensor, lengths) for tensor, lengths in parts))
    for q, k, v, o in sequences:
        if len(q) > 0:
            o.copy_(
                causal_attention(
                    q[None, None], k[None, None], v[None, None], scale=scale, backend=backend
                )[0, 0]
            )
    return out


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    chosen = choose_backend(backend, query, key, masked=mask is not None).name
    group = query.shape[1] // key.shape[1]
    knows_gqa = chosen == "flash" or (chosen == "cudnn" and mask is None)
    try:
        with sdpa_kernel(_SDPA[chosen]):
            if group == 1 or knows_gqa:
                return F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    is_causal=is_causal,
                    scale=scale,
                    enable_gqa=group > 1,
                )
            out = torch.empty_like(query)
            for member in range(group):
                out[:, member::group] = F.scaled_dot_product_attention(
                    query[:, member::group],
                    key,
                    value,
                    attn_mask=mask,
                    is_causal=is_causal,
                    scale=scale,
                )
            return out
    except RuntimeError as error:
        if not any(known in str(error) for known in _NO_KERNEL):
            raise
        raise ValueError(
            f"attention_backend {chosen!r} cannot run {query.dtype} with head size "
            f"{query.shape[-1]} {'and a mask ' if mask is not None else ''}on "
            f"{query.device.type}; choose another or 'auto'"
        ) from error
