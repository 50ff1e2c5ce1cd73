"""What the operations are given: checks that name argument, expectation, value; real tokens."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import SparseConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def unit_stride(rows: Tensor) -> Tensor:
    """Return rows whose numbers lie side by side, as kernels take them; a copy if need be."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the logits; ``1 / sqrt(head_dim)`` unless given."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return float(scale)


def check_config(config: SparseConfig, kind: type[SparseConfig] = SparseConfig) -> None:
    """Raise TypeError unless `config` is a config of some kind."""
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")


def check_dense_heads(config: SparseConfig, num_heads: int) -> None:
    """Raise ValueError unless a layer with `num_heads` query heads has the dense ones."""
    if config.dense_heads and config.dense_heads[-1] >= num_heads:
        raise ValueError(
            f"dense_heads must be below the layer's {num_heads} query heads, got "
            f"{config.dense_heads}"
        )


def check_no_gradients(**tensors: Tensor) -> None:
    """Raise ValueError if gradients are recorded and one of the named tensors requires one."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, which token sparse attention cannot "
                "give: it acts in prefill only; call it under torch.no_grad()"
            )


def check_attention_inputs(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the tensors form one attention problem."""
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got a nested or sparse one")
        if tensor.dim() != 4:
            heads = "H" if name == "query" else "H_kv"
            raise ValueError(
                f"{name} must have shape [B, {heads}, S, D], got {list(tensor.shape)}"
            )
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on query's device {query.device}, got {tensor.device}"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}")
    if value is not None and value.shape != key.shape:
        raise ValueError(f"value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key must have query's batch and head size, {query.shape[0]} and {query.shape[3]}; "
            f"got {key.shape[0]} and {key.shape[3]}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must have a multiple of key's {key.shape[1]} heads, got {query.shape[1]}"
        )
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query must not be longer than key's {key.shape[2]} tokens, got {query.shape[2]}"
        )


class Span(NamedTuple):
    """Slots ``[start, end)`` of one row's real tokens."""

    start: int
    end: int


@dataclass(frozen=True)
class RealTokens:
    """Where the real tokens of a batch lie.

    Attributes:
        kv_len: slots per sequence.
        padded: whether a sequence may have padding.
        valid: ``[B]`` bool, whether the mask was one run; None where that is known.
        spans: `bounds` on the host; None where reading them would wait for the device.
        device: where `bounds` are.
        padded_bounds: `bounds` where there is padding.
    """

    kv_len: int
    padded: bool
    valid: Tensor | None
    spans: list[Span] | None
    device: torch.device
    padded_bounds: Tensor | None = None

    @functools.cached_property
    def bounds(self) -> Tensor:
        """Each sequence's slots ``[start, end)``, ``[B, 2]`` int32."""
        if self.padded_bounds is not None:
            return self.padded_bounds
        end, batch_size = self.kv_len, len(self.spans or ())
        one = torch.arange(0, 2 * end, end, dtype=torch.int32, device=self.device).view(1, 2)
        return one if batch_size == 1 else one.repeat(batch_size, 1)

    def host_spans(self) -> list[Span]:
        """Return `spans`, reading them off the device if need be."""
        return self.spans or [Span(*pair) for pair in self.bounds.tolist()]

    def limits(self, dims: int) -> tuple[int | Tensor, int | Tensor]:
        """Return the rows' first slots and ends: two numbers where all slots are real.

        Else they are int64 tensors ``[B, 1, ...]``, with `dims` dimensions of 1.
        """
        if not self.padded:
            return 0, self.kv_len
        start, end = self.bounds.long().unbind(-1)
        shape = (-1,) + (1,) * dims
        return start.view(shape), end.view(shape)

    def mask(self) -> Tensor:
        """Return which slots hold a real token, ``[B, S_kv]`` bool, on the device."""
        slot = torch.arange(self.kv_len, device=self.bounds.device)
        return (slot >= self.bounds[:, :1]) & (slot < self.bounds[:, 1:])


def real_tokens(
    padding_mask: Tensor | None,
    batch_size: int,
    kv_len: int,
    device: torch.device,
    *,
    on_device: bool = False,
) -> RealTokens:
    """Return each sequence's run of real tokens; without a mask, all slots are real.

    Args:
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, or None.
        batch_size: B.
        kv_len: S_kv.
        device: where the bounds are to be.
        on_device: do not wait for the device: rows that are not one run of True are then
            told by `RealTokens.valid`, not by an error.

    Raises:
        TypeError: if the mask is no bool tensor.
        ValueError: if its shape is wrong, or a row is not exactly one run of True.
    """
    if padding_mask is None:
        return RealTokens(kv_len, False, None, [Span(0, kv_len)] * batch_size, device)
    if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
        given = getattr(padding_mask, "dtype", type(padding_mask).__name__)
        raise TypeError(f"padding_mask must be a bool tensor, True for real tokens; got {given}")
    if padding_mask.shape != (batch_size, kv_len):
        raise ValueError(
            f"padding_mask must have shape [B, S_kv] = {[batch_size, kv_len]}, "
            f"got {list(padding_mask.shape)}"
        )
    slot = torch.arange(kv_len, device=padding_mask.device)
    start = torch.where(padding_mask, slot, kv_len).amin(-1)
    end = torch.where(padding_mask, slot + 1, 0).amax(-1)
    count = padding_mask.sum(-1)
    valid = (count > 0) & (end - start == count)
    if on_device:
        start = torch.where(valid, start, 0)
        end = torch.where(valid, end, kv_len)
        bounds = torch.stack((start, end), -1).to(device, torch.int32)
        return RealTokens(kv_len, True, valid.to(device), None, device, bounds)
    spans = []
    for row, (first, last, real) in enumerate(torch.stack((start, end, count), -1).tolist()):
        if real == 0 or last - first != real:
            raise ValueError(
                "padding_mask must mark one contiguous run of real tokens in every row; "
                f"row {row} has {real} between slots {first} and {last}"
            )
        spans.append(Span(first, last))
    bounds = torch.stack((start, end), -1).to(device, torch.int32)
    return RealTokens(kv_len, True, None, spans, device, bounds)


class AuxRequest(NamedTuple):
    """What `token_sparse_attention` returns with its output.

    Attributes:
        selection: the `TokenSelection`.
        indices: which tokens are chosen, and not only how many: 8 bytes per head and token.
        lse: the log-sum-exp.
    """

    selection: bool = False
    indices: bool = True
    lse: bool = False

    @property
    def wants_indices(self) -> bool:
        """Whether the selection is to list its tokens."""
        return self.selection and self.indices


class PastProbes(NamedTuple):
    """Queries of earlier calls of the same prompts, which score keys for KV sampling.

    With W probes in a block of C queries, every query at a position ``(t + 1) * C / W - 1`` is a
    probe; probe t is kept at the entry ``t % R``. A block needs those of the block before, so
    ``R = 2 * W`` is enough to continue a prompt.

    Attributes:
        query: ``[B, H, R, D]``.
        position: ``[B, R]`` int64, the position of the query that an entry holds, -1 for none.
    """

    query: Tensor
    position: Tensor


class Chunk(NamedTuple):
    """What part of its prompts a call holds.

    Attributes:
        past_probes: queries of earlier calls; without them the first block of a call that
            continues a prompt, whose keys nobody has scored, runs dense.
        ends_prompt: whether the last queries are those of the prompts. Then the last
            ``dense_queries`` attend to every key.
    """

    past_probes: PastProbes | None = None
    ends_prompt: bool = True


def check_chunk(chunk: Chunk, query: Tensor) -> None:
    """Raise TypeError or ValueError unless past probes fit the query ``[B, H, S_q, D]``."""
    if not isinstance(chunk, Chunk):
        raise TypeError(f"chunk must be a Chunk, got {type(chunk).__name__}")
    past = chunk.past_probes
    if past is None:
        return
    if not isinstance(past, PastProbes):
        raise TypeError(f"past_probes must be a PastProbes or None, got {type(past).__name__}")
    batch_size, num_heads, _, head_dim = query.shape
    number = past.position.shape[-1]
    if past.position.dtype != torch.int64 or past.position.shape != (batch_size, number):
        raise ValueError(
            f"past_probes.position must be int64 of shape [B, R] = [{batch_size}, R], got "
            f"{past.position.dtype} and {list(past.position.shape)}"
        )
    shape = (batch_size, num_heads, number, head_dim)
    if past.query.dtype != query.dtype or past.query.shape != shape or not number:
        raise ValueError(
            f"past_probes.query must be {query.dtype} of shape [B, H, R, D] = {list(shape)}, R at "
            f"least 1, got {past.query.dtype} and {list(past.query.shape)}"
        )


class Problem(NamedTuple):
    """One call's attention problem, checked.

    Attributes:
        query: ``[B, H, S_q, D]``, unit stride over D as all three; the slots
            ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        tokens: where the real tokens lie.
        scale: factor of the logits.
        impl: ``"triton"`` or ``"reference"``.
        head_chunk: heads that token selection compresses at once; None for as many as fit.
        tp_group: the ranks that hold the layer's other query heads; None without them.
        aux: what is wanted with the output.
        chunk: what part of its prompts the call holds.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: RealTokens
    scale: float
    impl: str
    head_chunk: int | None
    tp_group: ProcessGroup | None
    aux: AuxRequest
    chunk: Chunk

    @property
    def num_heads(self) -> int:
        """H."""
        return self.query.shape[1]

    @property
    def kv_len(self) -> int:
        """S_kv."""
        return self.key.shape[2]

    @property
    def first_query(self) -> int:
        """The slot of the first query."""
        return self.key.shape[2] - self.query.shape[2]

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Return each sequence's real queries and keys, at least 1, ``[B]`` int32 each."""
        start, end = self.tokens.bounds.unbind(-1)
        queries = (end - start.clamp(min=self.first_query)).clamp(min=0)
        return queries, (end - start).clamp(min=1)

    def of_heads(self, heads: slice, kv_heads: slice) -> Problem:
        """Return the problem of some query heads and the KV heads that they share."""
        query, key, value = self.query[:, heads], self.key[:, kv_heads], self.value[:, kv_heads]
        return self._replace(query=query, key=key, value=value)

    def until(self, slot: int) -> Problem:
        """Return the problem without the slots from a later one on; for sequences unpadded."""
        spans, tokens = [Span(0, slot)] * len(self.query), self.tokens
        return self._replace(
            query=self.query[:, :, : slot - self.first_query],
            key=self.key[:, :, :slot],
            value=self.value[:, :, :slot],
            tokens=RealTokens(slot, False, None, spans, tokens.device),
        )

    def since(self, slot: int) -> Problem:
        """Return the problem without the queries before a slot."""
        return self._replace(query=self.query[:, :, slot - self.first_query :])
