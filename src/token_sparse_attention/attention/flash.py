"""flash-attn-4, and PyTorch's FlashAttention-2 on packed sequences: lengths stay on the device.

Inside, tensors are in these kernels' layout, ``[T, heads, D]`` packed or ``[B, S, heads, D]``;
GQA is native and causal masks are aligned at the end of each sequence.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention.attention.backend import (
    Backend,
    PackedHeads,
    Tensors,
    single_head,
)
from token_sparse_attention.device import multiprocessors, on_its_device
from token_sparse_attention.inputs import Problem
from token_sparse_attention.results import Attended, PackedSequences

_TILE = 128  # queries of a head that flash-attn-4 gives to one multiprocessor
_SPLITTING_GAIN = 3  # so much of the GPU must lie idle: FlashAttention-2 is slower on a full one


@functools.cache
def fa4_installed() -> bool:
    """Return whether flash-attn-4 is installed."""
    try:
        return importlib.util.find_spec("flash_attn.cute.interface") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _fa4_forward() -> Any:
    # It warns at each compilation of an argument of its own that it knows to be constant.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    return importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd


@dataclass(frozen=True)
class FlashBackend(Backend):
    """flash-attn-4 (``"fa4"``) or, on CUDA, FlashAttention-2 (``"flash"``)."""

    device_lengths: bool = True
    returns_lse: bool = True

    def _attend(
        self, tensors: Tensors, scale: float, window: int | None, want_lse: bool
    ) -> Attended:
        query, key, value = (x.transpose(1, 2) for x in tensors)
        out, lse = _attend_whole(query, key, value, self.name, scale, window, None, want_lse)
        return Attended(out.transpose(1, 2), lse if want_lse else None)

    def attend_packed(
        self, packed: PackedSequences, of: PackedHeads, *, scale: float, want_lse: bool = False
    ) -> Attended:
        """See `Backend.attend_packed`."""
        del of
        out, lse = self.attend_varlen(single_head(packed), scale=scale, want_lse=want_lse)
        return Attended(out[:, 0], lse[0] if want_lse and lse is not None else None)

    def attend_varlen(
        self,
        packed: PackedSequences,
        *,
        scale: float,
        window: int | None = None,
        out: Tensor | None = None,
        want_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention of packed sequences; rows outside all of them stay as they are.

        flash-attn-4 multiplies values up to a tile beyond a sequence's end by zero: they must
        not be NaN or infinite.

        Args:
            packed: ``[T_q, H, D]`` and ``[T_k, H_kv, D]``; maximum lengths may be loose.
            scale: factor of the logits.
            window: keys each query sees, itself included; None for all.
            out: ``[T_q, H, D]``, written if given.
            want_lse: whether the log-sum-exp is wanted.

        Returns:
            The output ``[T_q, H, D]``, and ``[H, T_q]`` float32 or None.
        """
        return _attend_varlen(packed.query, packed, self.name, scale, window, out, want_lse)

    def attend_sequences(
        self,
        problem: Problem,
        begins: Tensor,
        into: Attended,
        *,
        window: int | None = None,
        ends: Tensor | None = None,
    ) -> None:
        """See `Backend.attend_sequences`; nothing is read on the host."""
        limits = torch.stack((begins, problem.tokens.bounds[:, 1] if ends is None else ends), -1)
        for number, begin_end, lse in self._each(problem, limits, into, window, into.lse is None):
            if into.lse is not None and lse is not None:
                slot = torch.arange(lse.shape[1], device=lse.device)
                inside = (slot >= begin_end[0]) & (slot < begin_end[1])
                into.lse[number] = torch.where(inside, lse, into.lse[number])

    def attend_windows(
        self, problem: Problem, begins: Tensor | None, into: Attended, window: int
    ) -> Tensor:
        """See `Backend.attend_windows`; the kernel's own log-sum-exp where that will do."""
        if begins is None:
            lse = self._attend_into(problem, into, window, want_lse=True)
            assert lse is not None
            return lse if into.lse is None else into.lse.copy_(lse)
        if into.lse is not None:
            return super().attend_windows(problem, begins, into, window)
        limits = torch.stack((begins, problem.tokens.bounds[:, 1]), -1)
        each = self._each(problem, limits, into, window, False)
        found = [lse[None] for _, _, lse in each if lse is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def attend_all(self, problem: Problem, into: Attended) -> None:
        """See `Backend.attend_all`."""
        lse = self._attend_into(problem, into, None, want_lse=into.lse is not None)
        if into.lse is not None and lse is not None:
            into.lse.copy_(lse)

    def _attend_into(
        self, problem: Problem, into: Attended, window: int | None, *, want_lse: bool
    ) -> Tensor | None:
        """Attend sequences without padding, in place; returns the log-sum-exp."""
        tensors = (problem.query, problem.key, problem.value)
        query, key, value, out = (x.transpose(1, 2) for x in (*tensors, into.out))
        written = out if self.name == "fa4" else None
        result, lse = _attend_whole(
            query, key, value, self.name, problem.scale, window, written, want_lse
        )
        if written is None:
            out.copy_(result)
        return lse

    def _each(
        self,
        problem: Problem,
        limits: Tensor,
        into: Attended,
        window: int | None,
        out_only: bool,
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Attend sequence by sequence; yields its number, first and last query, and lse.

        Args:
            limits: ``[B, 2]`` int32, the slots of each sequence's first query and behind its last.
        """
        tokens, value = problem.tokens, problem.value
        if tokens.padded and self.name == "fa4":  # see `attend_varlen`
            value = value.masked_fill(~tokens.mask()[:, None, :, None], 0.0)
        query, key, value, out = (
            x.transpose(1, 2) for x in (problem.query, problem.key, value, into.out)
        )
        cu_seqlens_q = limits
        if problem.first_query:
            cu_seqlens_q = (limits - problem.first_query).clamp(min=0)
        cu_seqlens_k = torch.stack((tokens.bounds[:, 0], limits[:, 1]), -1)
        for number in range(len(query)):
            packed = PackedSequences(
                query[number],
                key[number],
                value[number],
                cu_seqlens_q[number],
                cu_seqlens_k[number],
                query.shape[1],
                key.shape[1],
            )
            _, lse = self.attend_varlen(
                packed, scale=problem.scale, window=window, out=out[number], want_lse=not out_only
            )
            yield number, cu_seqlens_q[number], lse

    def attend_last(self, problem: Problem, count: int, into: Attended) -> bool:
        """See `Backend.attend_last`; FlashAttention-2 attends.

        On Hopper flash-attn-4 gives all keys of a tile of queries to one multiprocessor, however
        long they are.
        """
        query = problem.query
        if self.name != "fa4" or problem.tokens.padded or not 0 < count < query.shape[2]:
            return False
        tiles = query.shape[0] * query.shape[1] * math.ceil(count / _TILE)
        if _SPLITTING_GAIN * tiles > multiprocessors(query.device):
            return False
        last, want_lse = slice(-count, None), into.lse is not None
        one = _SPLITTING.attend(
            query[:, :, last], problem.key, problem.value, scale=problem.scale, want_lse=want_lse
        )
        into.out[:, :, last] = one.out
        if into.lse is not None and one.lse is not None:
            into.lse[:, :, last] = one.lse
        return True


_SPLITTING = FlashBackend("flash", "it splits the keys of few queries")


@on_its_device
def _attend_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    name: str,
    scale: float,
    window: int | None,
    out: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of ``[B, S, heads, D]`` in a window; flash-attn-4 writes into `out`."""
    if window is not None and window >= key.shape[1]:
        window = None
    if name == "fa4":
        left = None if window is None else window - 1
        given = {"causal": True, "window_size_left": left, "return_lse": want_lse, "out": out}
        result, lse = _fa4_forward()(query, key, value, softmax_scale=scale, **given)[:2]
        return result, lse
    lengths = (None, None, query.shape[1], key.shape[1])
    return _flash_2((query, key, value, *lengths), scale, window)


@on_its_device
def _attend_varlen(
    query: Tensor,
    packed: PackedSequences,
    name: str,
    scale: float,
    window: int | None,
    out: Tensor | None,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if name == "fa4":
        result, lse = _fa4_forward()(
            query,
            packed.key,
            packed.value,
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_k,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_k=packed.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            window_size_left=None if window is None else window - 1,
            pack_gqa=False,  # faster here: the tiles of a packed group balance worse
            out=out,
            return_lse=want_lse,
        )[:2]
        return result, lse
    result, lse = _flash_2(packed, scale, window)
    if out is None:
        return result, lse
    # It allocates its own output: take over the rows that belong to a sequence.
    row = torch.arange(len(out), device=out.device)
    inside = (row >= packed.cu_seqlens_q[0]) & (row < packed.cu_seqlens_q[-1])
    out.copy_(torch.where(inside[:, None, None], result, out))
    return out, lse


def _flash_2(inputs: tuple[Any, ...], scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention-2, which its public functions give no window in every version.

    Args:
        inputs: the fields of `PackedSequences`; whole batches have no cumulative lengths.
        scale: factor of the logits.
        window: keys each query sees, itself included; None for all.
    """
    result: tuple[Tensor, Tensor] = torch.ops.aten._flash_attention_forward(
        *inputs,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[:2]
    return result
