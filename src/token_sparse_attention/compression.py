"""Gather each head's tokens into packed tensors, and scatter the output back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.inputs import check_attention_inputs
from token_sparse_attention.selection import TokenSelection


class Compressed(NamedTuple):
    """Packed attention inputs: one sequence per batch entry and head, in that order.

    Attributes:
        query: ``[T_q, D]``, the selected queries.
        key: ``[T_k, D]``, the selected keys.
        value: ``[T_k, D]``, the selected values.
        cu_seqlens_q: ``[B * H + 1]`` int32, where each sequence's queries start.
        cu_seqlens_k: ``[B * H + 1]`` int32, where each sequence's keys start.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def compress(query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection) -> Compressed:
    """Gather Q, K and V rows at each head's selected tokens; K and V are never repeated.

    Args:
        query: ``[B, H, S_q, D]``, the slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        selection: the tokens; those before the first query contribute keys only.

    Returns:
        The packed tensors. Sorted indices make causal order in a packed sequence, aligned at
        its end, the causal order of the original.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if the selection does not fit the tensors, or they do not fit each other.

    Source:
        arXiv 2602.03216, compression of Q, K and V per head.

    Example:
        >>> x = torch.randn(1, 2, 10, 8)
        >>> indices = torch.tensor([[[0, 4, 9], [1, 9, -1]]])
        >>> selection = TokenSelection(indices, torch.tensor([[3, 2]]), torch.tensor([True]))
        >>> compress(x, x, x, selection).cu_seqlens_k
        tensor([0, 3, 5], dtype=torch.int32)
    """
    check_attention_inputs(query, key, value)
    _check_selection(selection, query.shape[0], query.shape[1], query.shape[2], query.device)
    kv_len, query_len = key.shape[2], query.shape[2]
    if selection.kv_len not in (None, kv_len):
        raise ValueError(
            f"selection must index key's {kv_len} slots, but was made for {selection.kv_len}"
        )
    group = query.shape[1] // key.shape[1]
    first_query = kv_len - query_len
    batch, head, slot = _listed(selection, first_slot=0)
    query_batch, query_head, query_slot = _listed(selection, first_slot=first_query)
    kv_head = head // group
    query_lengths = (selection.indices >= first_query).sum(-1)
    return Compressed(
        query=query[query_batch, query_head, query_slot - first_query],
        key=key[batch, kv_head, slot],
        value=value[batch, kv_head, slot],
        cu_seqlens_q=_cumulative(query_lengths),
        cu_seqlens_k=_cumulative(selection.lengths),
        max_seqlen_q=min(selection.indices.shape[2], query_len),
        max_seqlen_k=selection.indices.shape[2],
    )


def decompress(
    out: Tensor, selection: TokenSelection, query_len: int, fallback: Tensor | None = None
) -> Tensor:
    """Scatter packed output rows to their positions; the other rows get the fallback.

    Args:
        out: ``[T_q, D]``, in the order of `compress`.
        selection: the selection that `compress` was given.
        query_len: S_q, length of the full output.
        fallback: ``[B, H, S_q, D]`` rows for the tokens that were not selected; zeros if
            None. It is not changed.

    Returns:
        ``[B, H, S_q, D]``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes, dtypes or devices do not fit.

    Source:
        arXiv 2602.03216, decompression of the attention output.

    Example:
        >>> selection = TokenSelection(
        ...     torch.tensor([[[0, 2]]]), torch.tensor([[2]]), torch.tensor([True])
        ... )
        >>> decompress(torch.ones(2, 1), selection, query_len=3).flatten()
        tensor([1., 0., 1.])
    """
    _check_tensor("out", out, 2, "[T_q, D]")
    _check_selection(selection, None, None, query_len, out.device)
    shape = (*selection.indices.shape[:2], query_len, out.shape[-1])
    if fallback is None:
        return scatter_rows(out, selection, out.new_zeros(shape))
    _check_tensor("fallback", fallback, 4, "[B, H, S_q, D]")
    if fallback.shape != shape or fallback.dtype != out.dtype:
        raise ValueError(
            f"fallback must have shape {list(shape)} and out's dtype {out.dtype}, "
            f"got {list(fallback.shape)} and {fallback.dtype}"
        )
    return scatter_rows(out, selection, fallback.clone())


def scatter_rows(out: Tensor, selection: TokenSelection, full: Tensor) -> Tensor:
    """Write the packed rows into `full [B, H, S_q, D]` in place, and return it."""
    query_len = full.shape[2]
    first_query = (query_len if selection.kv_len is None else selection.kv_len) - query_len
    batch, head, slot = _listed(selection, first_slot=first_query)
    if len(slot) != len(out):
        raise ValueError(f"out must have one row per selected query, {len(slot)}; got {len(out)}")
    full[batch, head, slot - first_query] = out
    return full


def _listed(selection: TokenSelection, first_slot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch, head and slot of every listed token from `first_slot` on, in order."""
    batch, head, entry = (selection.indices >= first_slot).nonzero(as_tuple=True)
    return batch, head, selection.indices[batch, head, entry]


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.flatten().cumsum(0), (1, 0)).to(torch.int32)


def _check_tensor(name: str, tensor: Tensor, dim: int, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")


def _check_selection(
    selection: TokenSelection,
    batch_size: int | None,
    num_heads: int | None,
    query_len: int,
    device: torch.device,
) -> None:
    if not isinstance(selection, TokenSelection):
        raise TypeError(f"selection must be a TokenSelection, got {type(selection).__name__}")
    indices = selection.indices
    _check_tensor("selection.indices", indices, 3, "[B, H, K]")
    if batch_size is not None and indices.shape[:2] != (batch_size, num_heads):
        raise ValueError(
            f"selection.indices must have shape [{batch_size}, {num_heads}, K], "
            f"got {list(indices.shape)}"
        )
    if indices.device != device:
        raise ValueError(f"selection must be on {device} like the rest, got {indices.device}")
    if selection.kv_len is not None and query_len > selection.kv_len:
        raise ValueError(
            f"query_len must not exceed the selection's {selection.kv_len} slots, got {query_len}"
        )
