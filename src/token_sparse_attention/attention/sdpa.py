"""Causal attention through PyTorch's SDPA: rectangular, windowed and packed.

K and V of a GQA group are never repeated: kernels that know GQA get the group, others one
member at a time. Packed lengths are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from token_sparse_attention.attention.backend import (
    Backend,
    PackedHeads,
    Tensors,
    split_lengths,
)
from token_sparse_attention.device import on_its_device
from token_sparse_attention.results import Attended, PackedSequences

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_NO_KERNEL = ("No available kernel", "No viable backend")  # in SDPA's error where none fits
_MASKED_ROWS = 256  # queries per block where a mask has to be written out


@dataclass(frozen=True)
class SDPABackend(Backend):
    """One of the kernels behind PyTorch's ``scaled_dot_product_attention``."""

    def _attend(
        self, tensors: Tensors, scale: float, window: int | None, want_lse: bool
    ) -> Attended:
        """On a CPU `flash` returns the log-sum-exp; others need all logits computed once more."""
        query, key, value = tensors
        if want_lse and self.name == "flash" and query.device.type == "cpu":
            return _attend_on_cpu(query, key, value, scale, window)
        out = _causal(query, key, value, self.name, scale, window)
        return Attended(out, causal_lse(query, key, scale, window) if want_lse else None)

    def attend_packed(
        self, packed: PackedSequences, of: PackedHeads, *, scale: float, want_lse: bool = False
    ) -> Attended:
        """See `Backend.attend_packed`; sequences of one length run as the heads of one call."""
        del of
        query, key, value = packed[:3]
        query_lens, kv_lens = split_lengths(packed)
        out = torch.empty_like(query)
        lse = query.new_empty(len(query), dtype=torch.float32) if want_lse else None
        if len(set(query_lens)) == len(set(kv_lens)) == 1 and query_lens[0] > 0:
            heads, total_q, total_k = len(query_lens), sum(query_lens), sum(kv_lens)
            q = query[:total_q].view(1, heads, -1, query.shape[-1])
            k, v = (x[:total_k].view(1, heads, -1, x.shape[-1]) for x in (key, value))
            one = self.attend(q, k, v, scale=scale, want_lse=want_lse)
            out[:total_q] = one.out.reshape(total_q, -1)
            if lse is not None and one.lse is not None:
                lse[:total_q] = one.lse.flatten()
            return Attended(out, lse)
        begin_q = begin_k = 0
        for query_len, kv_len in zip(query_lens, kv_lens):
            queries, keys = (
                slice(begin_q, begin_q + query_len),
                slice(begin_k, begin_k + kv_len),
            )
            begin_q, begin_k = queries.stop, keys.stop
            if not query_len:
                continue
            q, k, v = query[None, None, queries], key[None, None, keys], value[None, None, keys]
            one = self.attend(q, k, v, scale=scale, want_lse=want_lse)
            out[queries] = one.out[0, 0]
            if lse is not None and one.lse is not None:
                lse[queries] = one.lse[0, 0]
        return Attended(out, lse)


@on_its_device
def _causal(
    query: Tensor, key: Tensor, value: Tensor, name: str, scale: float, window: int | None
) -> Tensor:
    query_len, kv_len = query.shape[2], key.shape[2]
    if window is not None and window < kv_len:
        return _blockwise_attention(query, key, value, scale, name, window)
    if query_len in (1, kv_len):
        return _sdpa(query, key, value, None, query_len > 1, scale, name)
    if query.device.type == "cuda" and name == "flash":
        # FlashAttention aligns causal masks at the end by itself; the bias only names that.
        bias = causal_lower_right(query_len, kv_len)
        return _sdpa(query, key, value, bias, False, scale, "flash")
    return _blockwise_attention(query, key, value, scale, name, kv_len)


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> Attended:
    """Attention with a bias on the logits, and its log-sum-exp.

    Args:
        query: ``[H, S_q, D]``.
        key: ``[H, S_kv, D]``.
        value: ``[H, S_kv, D]``.
        bias: broadcasts to ``[H, S_q, S_kv]``, of `query`'s dtype, on the logits after `scale`.
        scale: factor of the logits.

    Returns:
        A query whose bias is -inf everywhere gives anything. The log-sum-exp ``[H, S_q]`` is
        float32, of float64 inputs float64.
    """
    attend = masked_on_cpu if query.device.type == "cpu" else masked_in_steps
    one = attend((query[None], key[None], value[None]), bias[None], scale)
    return Attended(*(x[0] for x in one))


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Attended:
    """Causal attention and its log-sum-exp in one pass."""
    query_len, kv_len = query.shape[2], key.shape[2]
    if query_len == kv_len and (window is None or window >= kv_len):
        return Attended(*_FLASH_ON_CPU(query, key, value, 0.0, True, scale=scale))
    out = torch.empty_like(query)
    precision = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=precision)
    for queries, keys, band in _blocks(query_len, kv_len, window, query.device):
        bias = query.new_zeros(()).where(band, -torch.inf)
        tensors = (query[:, :, queries], key[:, :, keys], value[:, :, keys])
        out[:, :, queries], lse[:, :, queries] = masked_on_cpu(tensors, bias, scale)
    return Attended(out, lse)


def masked_on_cpu(tensors: Tensors, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the kernel that SDPA calls, which drops the second."""
    both: tuple[Tensor, Tensor] = _FLASH_ON_CPU(*tensors, 0.0, False, attn_mask=bias, scale=scale)
    return both


def masked_in_steps(tensors: Tensors, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp where no kernel gives both."""
    query, key, value = tensors
    logits = query @ key.transpose(2, 3) * scale + bias
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ value, lse


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
    group = query.shape[1] // key.shape[1]
    knows_gqa = backend == "flash" or (backend == "cudnn" and mask is None)
    try:
        with sdpa_kernel(_SDPA[backend]):
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
            f"attention_backend {backend!r} cannot run {query.dtype} with head size "
            f"{query.shape[-1]} {'and a mask ' if mask is not None else ''}on "
            f"{query.device.type}; choose another or 'auto'"
        ) from error
