"""Probe queries that stay with a cache, so that KV sampling can continue its prompts.

A block's keys are scored by queries of the block before. Where a prompt comes in several calls,
these may have stood in an earlier one. So each call of several tokens leaves its probes on the
cache object, in an attribute: a deep copy or a pickle of the cache carries them along, and they
are freed with it. Decode steps leave none.

A probe counts later only if the cache holds, at its slot, bit for bit the key that it held when
the probe was left. A cache that was cropped, reordered, selected from, reset or filled by others
may hold other tokens there, whose probes are then not known; the operator runs such a block
dense. The check stays on the device.

The probes take ``2 * num_probes * D * (H + 1)`` numbers per layer and sequence: 0.27 MB in 16
bits for 32 heads of size 128 and 16 probes. A paged cache has room for those of all its slots,
which is ``H / H_kv * num_probes / block_size / 2`` of its size: 1.6% with heads in groups of 4
and the default settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.inputs import PastProbes
from token_sparse_attention.integrations.attention_mask import MaskLayout

# Of each layer: queries, their positions, and the keys at their slots. Plain tuples, so that
# pickled caches can be read without this library.
Store = dict[int, tuple[Tensor, Tensor, Tensor]]

_ATTRIBUTE = "_token_sparse_past_probes"


def store_of(cache: object) -> Store | None:
    """Return what a cache keeps, made if need be; None if it takes no attribute."""
    store: Store | None = getattr(cache, _ATTRIBUTE, None)
    if store is None and cache is not None:
        store = {}
        try:
            setattr(cache, _ATTRIBUTE, store)
        except (AttributeError, TypeError):  # a tuple, as caches were once
            return None
    return store


def cache_among(given: object) -> object:
    """Return the cache in a model's output or arguments, None if there is none.

    Up to transformers 5.23 both have it as ``past_key_values``, later ones as ``cache``.
    """
    if isinstance(given, tuple):
        return next((one for one in given if isinstance(one, Cache)), None)
    if not isinstance(given, Mapping):
        return None
    named = (one for name, one in given.items() if name in ("cache", "past_key_values"))
    return next((one for one in named if one is not None), None)


class Probes(ABC):
    """Where one layer's probes are kept for a call's sequences.

    Args:
        store: of the cache.
        layer: the layer's number.
        config: its settings.
    """

    def __init__(self, store: Store, layer: int, config: KVSamplingConfig) -> None:
        self._store = store
        self._layer = layer
        self._number = 2 * config.num_probes  # R
        self._stride = config.probe_stride

    @abstractmethod
    def recall(self, query: Tensor, key: Tensor, layout: MaskLayout) -> PastProbes | None:
        """Return the probes of earlier calls, None if there are none that fit.

        Args:
            query: ``[B, H, S_q, D]``, as the operator is given it.
            key: ``[B, H_kv, S, D]``, S at least the layout's ``kv_len``.
            layout: how the queries lie among the keys.
        """

    @abstractmethod
    def keep(self, query: Tensor, key: Tensor, layout: MaskLayout) -> None:
        """Keep the call's own probes; the arguments are those of `recall`."""

    def _positions(self, end: int | Tensor, device: torch.device) -> Tensor:
        """Return the last R probes' positions before `end`, probe t at t % R; some negative."""
        entry = torch.arange(self._number, device=device)
        last = end // self._stride - 1
        probe = last - (last - entry) % self._number
        return (probe + 1) * self._stride - 1


class _Rows(NamedTuple):
    """Slots of each sequence's real tokens: numbers, or ``[B, 1]`` int64 where there is padding.

    Attributes:
        start: the first.
        end: the one after the last.
    """

    start: int | Tensor
    end: int | Tensor

    @classmethod
    def of(cls, layout: MaskLayout) -> _Rows:
        if layout.padding_mask is None:
            return cls(0, layout.kv_len)
        start = layout.padding_mask.view(torch.uint8).argmax(-1, keepdim=True)
        return cls(start, start + layout.padding_mask.sum(-1, keepdim=True))


class CacheProbes(Probes):
    """Probes of a batch, with the cache that the batch has to itself: rings of R entries."""

    def recall(self, query: Tensor, key: Tensor, layout: MaskLayout) -> PastProbes | None:
        """See `Probes.recall`."""
        first_query = layout.kv_len - query.shape[2]
        kept = self._kept(query, key)
        if kept is None or not first_query:
            return None
        past, position, past_key = kept
        slot = position + _Rows.of(layout).start
        at = slot.clamp(0, first_query - 1)[..., None]
        same = (torch.take_along_dim(key[:, 0], at, 1) == past_key).all(-1)
        known = (position >= 0) & (slot < first_query) & same
        return PastProbes(past, position.where(known, -1))

    def keep(self, query: Tensor, key: Tensor, layout: MaskLayout) -> None:
        """See `Probes.keep`."""
        first_query, (start, end) = layout.kv_len - query.shape[2], _Rows.of(layout)
        if layout.padding_mask is None and layout.kv_len // self._stride == (
            first_query // self._stride
        ):
            return  # no probe stands in the call
        position = self._positions(end - start, query.device).expand(len(query), -1)
        slot = position + start
        inside = (position >= 0) & (slot >= first_query)
        at = (slot - first_query).clamp(min=0)[:, None, :, None]
        found = torch.take_along_dim(query.detach(), at, 2)
        found_key = torch.take_along_dim(key[:, 0].detach(), slot.clamp(min=0)[..., None], 1)
        past, past_position, past_key = self._kept(query, key) or (found, -1, found_key)
        self._store[self._layer] = (
            found.where(inside[:, None, :, None], past),
            position.where(inside, past_position),
            found_key.where(inside[..., None], past_key),
        )

    def _kept(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what the store holds of this layer if it is for such tensors, else None."""
        kept = self._store.get(self._layer)
        if kept is None:
            return None
        batch_size, num_heads, _, head_dim = query.shape
        fits = kept[0].shape == (batch_size, num_heads, self._number, head_dim)
        return kept if fits and _alike(kept, query, key) else None


@dataclass(eq=False)
class Pages:
    """One layer's paged cache, as `PagedProbes` wants it; the probes are an attribute of it.

    Attributes:
        block_size: tokens of a page.
        cache_shape: how many tokens the pages hold.
    """

    block_size: int = 0
    cache_shape: tuple[int] = (0,)


class PagedProbes(Probes):
    """Probes of one request, with a paged cache: one place for each that the cache may hold.

    Requests that share pages share their probes.

    Args:
        cache: its `Pages`, or what has their attributes.
        layer: the layer's number.
        config: its settings.
        slots: ``[S_kv]``, where in the cache each of the request's keys lies.
    """

    def __init__(self, cache: Any, layer: int, config: KVSamplingConfig, slots: Tensor) -> None:
        store = store_of(cache)
        super().__init__({} if store is None else store, layer, config)
        self._page: int = cache.block_size
        self._per_page = -(-self._page // self._stride)
        self._places = cache.cache_shape[0] // self._page * self._per_page
        self._slots = slots

    def recall(self, query: Tensor, key: Tensor, layout: MaskLayout) -> PastProbes | None:
        """See `Probes.recall`."""
        first_query = layout.kv_len - query.shape[2]
        kept = self._store.get(self._layer)
        if kept is None or not first_query or not self._fits(kept, query, key):
            return None
        position = self._positions(first_query, query.device)
        slot = position.clamp(min=0)
        past, past_position, past_key = (x[self._place(slot)] for x in kept)
        known = (past_position == position) & (past_key == key[0, 0, slot]).all(-1)
        return PastProbes(past.transpose(0, 1)[None], position.where(known, -1)[None])

    def keep(self, query: Tensor, key: Tensor, layout: MaskLayout) -> None:
        """See `Probes.keep`."""
        first_query = layout.kv_len - query.shape[2]
        self.keep_own(query, key[:, :, first_query : layout.kv_len], first_query)

    def keep_own(self, query: Tensor, key: Tensor, first_query: int) -> None:
        """Keep the call's own probes.

        Args:
            query: ``[1, H, S_q, D]``.
            key: ``[1, H_kv, S_q, D]``, of the queries' own tokens.
            first_query: the position of the first.
        """
        end = first_query + query.shape[2]
        first = -(-(first_query + 1) // self._stride) * self._stride - 1
        if first >= end:
            return
        position = torch.arange(first, end, self._stride, device=query.device)
        kept = self.allocate(query, key)
        index = position - first_query
        own = query[0, :, index].transpose(0, 1), position, key[0, 0, index]
        for past, present in zip(kept, own):
            past[self._place(position)] = present.detach()

    def allocate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places; they are allocated unless they are there for such tensors.

        Args:
            query: ``[1, H, S_q, D]``, S_q may be 0.
            key: ``[1, H_kv, S_q, D]``.
        """
        kept = self._store.get(self._layer)
        if kept is None or not self._fits(kept, query, key):
            _, num_heads, _, head_dim = query.shape
            kept = (
                query.new_zeros(self._places, num_heads, head_dim),
                self._slots.new_full((self._places,), -1),
                key.new_zeros(self._places, head_dim),
            )
            self._store[self._layer] = kept
        return kept

    def _place(self, position: Tensor) -> Tensor:
        """Return where the probes at some positions are kept."""
        slot = self._slots[position]
        place: Tensor = slot // self._page * self._per_page + slot % self._page // self._stride
        return place

    def _fits(self, kept: tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor) -> bool:
        shape = (self._places, query.shape[1], query.shape[3])
        return kept[0].shape == shape and _alike(kept, query, key)


def _alike(kept: tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor) -> bool:
    """Return whether what is kept has the dtypes and the device of a call's tensors."""
    return all(
        past.dtype == now.dtype and past.device == now.device and past.shape[-1] == now.shape[-1]
        for past, now in ((kept[0], query), (kept[2], key))
    )
