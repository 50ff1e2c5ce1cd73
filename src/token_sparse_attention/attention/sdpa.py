"""Causal attention through PyTorch's SDPA: rectangular, windowed and packed.

K and V of a GQA group are never repeated: kernels that know GQA get the group, others one
member at a time. Packed lengths are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from token_sparse_attention.attention.backends import choose_backend

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_NO_KERNEL = ("No available kernel", "No viable backend")  # what SDPA says where none fits
_MASKED_ROWS = 256  # queries per block where a mask has to be written out


def causal_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str, window: int | None
) -> Tensor:
    """Causal attention ``[B, H, S_q, D]``, aligned at the end, optionally in a window."""
    query_len, kv_len = query.shape[2], key.shape[2]
    if window is not None and window < kv_len:
        return _blockwise_attention(query, key, value, scale, backend, window)
    if query_len in (1, kv_len):
        return _sdpa(query, key, value, None, query_len > 1, scale, backend)
    if query.device.type == "cuda" and backend == "flash":
        # FlashAttention aligns causal masks at the end by itself; the bias only names that.
        bias = causal_lower_right(query_len, kv_len)
        return _sdpa(query, key, value, bias, False, scale, "flash")
    return _blockwise_attention(query, key, value, scale, backend, kv_len)


def causal_lse(query: Tensor, key: Tensor, scale: float, window: int | None) -> Tensor:
    """Log-sum-exp of every query's logits ``[B, H, S_q]``, which SDPA does not return.

    In single precision, of float64 inputs in double.
    """
    group = query.shape[1] // key.shape[1]
    precision = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=precision)
    for queries, keys, band in _blocks(query.shape[2], key.shape[2], window, query.device):
        for member in range(group):
            block = query[:, member::group, queries].to(precision)
            logits = block @ key[:, :, keys].to(precision).transpose(2, 3) * scale
            logits.masked_fill_(~band, -torch.inf)
            lse[:, member::group, queries] = logits.logsumexp(-1)
    return lse


def packed_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lens: list[int],
    kv_lens: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    """Causal attention ``[T_q, D]`` of packed single-head sequences."""
    out = torch.empty_like(query)
    total_q, total_k = sum(query_lens), sum(kv_lens)
    query, used, key, value = query[:total_q], out[:total_q], key[:total_k], value[:total_k]
    if len(set(query_lens)) == len(set(kv_lens)) == 1 and query_lens[0] > 0:
        heads = len(query_lens)
        q, k, v = (x.view(1, heads, -1, x.shape[-1]) for x in (query, key, value))
        used.copy_(causal_sdpa(q, k, v, scale, backend, None).reshape(query.shape))
        return out
    parts = ((query, query_lens), (key, kv_lens), (value, kv_lens), (used, query_lens))
    for q, k, v, o in zip(*(torch.split(tensor, lengths) for tensor, lengths in parts)):
        if len(q) > 0:
            one = causal_sdpa(q[None, None], k[None, None], v[None, None], scale, backend, None)
            o.copy_(one[0, 0])
    return out


def _blocks(
    query_len: int, kv_len: int, window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of queries, the keys they can see, and the band of the mask."""
    window = window or kv_len
    first_query = kv_len - query_len
    for begin in range(0, query_len, _MASKED_ROWS):
        end = min(begin + _MASKED_ROWS, query_len)
        first_key = max(first_query + begin - window + 1, 0)
        last_key = first_query + end
        position = torch.arange(first_query + begin, last_key, device=device)[:, None]
        slot = torch.arange(first_key, last_key, device=device)
        band = (slot <= position) & (slot > position - window)
        yield slice(begin, end), slice(first_key, last_key), band


def _blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str, window: int
) -> Tensor:
    """Attention with a band mask, a block of queries at a time, over the keys it can see."""
    out = torch.empty_like(query)
    for queries, keys, band in _blocks(query.shape[2], key.shape[2], window, query.device):
        out[:, :, queries] = _sdpa(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], band, False, scale, backend
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
