"""Gather each head's tokens into packed tensors, and scatter the output back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.impls import load_kernels, resolve_impl
from token_sparse_attention.inputs import check_attention_inputs, unit_stride
from token_sparse_attention.results import Attended, PackedSequences, TokenSelection


def compress(
    query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection, *, impl: str = "auto"
) -> PackedSequences:
    """Gather Q, K and V rows at each head's selected tokens; K and V are never repeated.

    Args:
        query: ``[B, H, S_q, D]``, the slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        selection: the tokens; those before the first query contribute keys only.
        impl: which code runs: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        The packed tensors, exactly as long as the sequences where the reference ran, of
        capacity ``B * H * K`` where Triton did. Sorted indices make causal order in a packed
        sequence, aligned at its end, the causal order of the original.

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
    kv_len = key.shape[2]
    if selection.kv_len not in (None, kv_len):
        raise ValueError(
            f"selection must index key's {kv_len} slots, but was made for {selection.kv_len}"
        )
    if selection.kv_len is None and query.shape[2] != kv_len:
        raise ValueError(
            f"selection.kv_len must be given where key has more slots than query, {kv_len} and "
            f"{query.shape[2]}; got None"
        )
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    everything = range(query.shape[0] * query.shape[1])
    capacity = selection.indices.shape[2]
    impl = resolve_impl(impl, query)
    return compress_sequences((query, key, value), selection, everything, capacity, impl=impl)


def compress_sequences(
    tensors: tuple[Tensor, Tensor, Tensor],
    selection: TokenSelection,
    sequences: range,
    max_length: int,
    *,
    impl: str,
) -> PackedSequences:
    """`compress` on checked arguments, of the sequences ``b * H + h`` in a range.

    Args:
        tensors: query, key and value with unit stride over D, see `compress`.
        selection: see `compress`.
        sequences: which sequences; the reference takes all.
        max_length: no sequence keeps more tokens.
        impl: ``"triton"`` or ``"reference"``.
    """
    query, key, value = tensors
    query_len, head_dim = query.shape[2:]
    first_query = key.shape[2] - query_len
    capacity = selection.indices.shape[2]
    if impl == "triton":
        kernels = load_kernels("compression")
        max_length = min(max_length, capacity)
        indices = selection.indices.contiguous()
        max_queries = min(max_length, query_len)
        rows_q, rows_k = len(sequences) * max_queries, len(sequences) * max_length
        packed_q, packed_k, packed_v = (
            query.new_empty(rows, head_dim) for rows in (rows_q, rows_k, rows_k)
        )
        offsets = kernels.cumulative_lengths(
            indices, selection.lengths.contiguous(), first_query, sequences
        )
        packed = (packed_q, packed_k, packed_v)
        kernels.gather(query, key, value, indices, offsets, sequences, packed, max_length)
        return PackedSequences(*packed, offsets[0], offsets[1], max_queries, max_length)
    group = query.shape[1] // key.shape[1]
    batch, head, slot = _listed(selection, first_slot=0)
    query_batch, query_head, query_slot = _listed(selection, first_slot=first_query)
    kv_head = head // group
    query_lengths = (selection.indices >= first_query).sum(-1)
    return PackedSequences(
        query=query[query_batch, query_head, query_slot - first_query],
        key=key[batch, kv_head, slot],
        value=value[batch, kv_head, slot],
        cu_seqlens_q=_cumulative(query_lengths),
        cu_seqlens_k=_cumulative(selection.lengths),
        max_seqlen_q=min(capacity, query_len),
        max_seqlen_k=capacity,
    )


def decompress(
    out: Tensor,
    selection: TokenSelection,
    query_len: int,
    fallback: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Scatter packed output rows to their positions; the other rows get the fallback.

    Args:
        out: ``[T_q, D]``, in the order of `compress`.
        selection: the selection that `compress` was given.
        query_len: S_q, length of the full output.
        fallback: ``[B, H, S_q, D]`` rows for the tokens that were not selected; zeros if
            None. It is not changed.
        impl: which code runs: ``"auto"``, ``"triton"`` or ``"reference"``.

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
    if fallback is not None:
        _check_tensor("fallback", fallback, 4, "[B, H, S_q, D]")
        if fallback.shape != shape or fallback.dtype != out.dtype:
            raise ValueError(
                f"fallback must have shape {list(shape)} and out's dtype {out.dtype}, "
                f"got {list(fallback.shape)} and {fallback.dtype}"
            )
    if resolve_impl(impl, out) == "triton":
        first_query = _slots(selection, query_len) - query_len
        everything = range(shape[0] * shape[1])
        offsets = load_kernels("compression").cumulative_lengths(
            selection.indices.contiguous(), selection.lengths.contiguous(), first_query, everything
        )
        listed = selection._replace(ran_sparse=torch.ones_like(selection.ran_sparse))
        full = out.new_empty(shape) if fallback is None else unit_stride(fallback).clone()
        into = Attended(full, None)
        decompress_sequences(
            Attended(out, None), listed, offsets, everything, into,
            zeros=fallback is None, impl="triton",
        )  # fmt: skip
        return full
    full = out.new_zeros(shape) if fallback is None else fallback.clone()
    return _scatter(out, selection, full)


def decompress_sequences(
    packed: Attended,
    selection: TokenSelection,
    offsets: tuple[Tensor, Tensor],
    sequences: range,
    into: Attended,
    *,
    zeros: bool,
    impl: str,
) -> None:
    """Write packed rows, and their log-sum-exp if there is one, to their positions, in place.

    Args:
        packed: ``[T_q, D]`` of the sequences, and ``[T_q]``.
        selection: the selection; batch entries that ran dense are left alone.
        offsets: cumulative lengths of the queries and the keys.
        sequences: which sequences; the reference takes all.
        into: ``[B, H, S_q, D]`` and ``[B, H, S_q]``, written.
        zeros: whether the other rows become zero, which the reference's must be already.
        impl: ``"triton"`` or ``"reference"``.
    """
    if impl == "triton":
        load_kernels("compression").scatter(
            selection.indices.contiguous(),
            packed._replace(out=unit_stride(packed.out)),
            offsets,
            sequences,
            into,
            selection.ran_sparse,
            first_query=_slots(selection, into.out.shape[2]) - into.out.shape[2],
            zeros=zeros,
        )
        return
    _scatter(packed.out, selection, into.out)
    if packed.lse is not None and into.lse is not None:
        _scatter(packed.lse[:, None], selection, into.lse[..., None])


def _scatter(out: Tensor, selection: TokenSelection, full: Tensor) -> Tensor:
    first_query = _slots(selection, full.shape[2]) - full.shape[2]
    batch, head, slot = _listed(selection, first_slot=first_query)
    if len(slot) != len(out):
        raise ValueError(f"out must have one row per selected query, {len(slot)}; got {len(out)}")
    full[batch, head, slot - first_query] = out
    return full


def _slots(selection: TokenSelection, query_len: int) -> int:
    return query_len if selection.kv_len is None else selection.kv_len


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
    if indices.shape[2] == 0:
        raise ValueError(
            "selection.indices must list the tokens, got none: a selection of lengths alone "
            "cannot be gathered; ask for AuxRequest(indices=True)"
        )
    if selection.lengths.shape != indices.shape[:2]:
        raise ValueError(
            f"selection.lengths must have shape {list(indices.shape[:2])}, "
            f"got {list(selection.lengths.shape)}"
        )
    if indices.device != device:
        raise ValueError(f"selection must be on {device} like the rest, got {indices.device}")
    if selection.kv_len is not None and query_len > selection.kv_len:
        raise ValueError(
            f"query_len must not exceed the selection's {selection.kv_len} slots, got {query_len}"
        )
