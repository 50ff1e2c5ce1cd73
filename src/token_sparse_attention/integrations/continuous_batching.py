"""Continuous batching of transformers: the new tokens of many requests in one attention call.

The requests lie one after the other in ``query [1, H, T, D]``; the paged cache hands out their
keys in the same order. Each request is a causal sequence of its own, aligned at its end: a
prompt, a piece of one, or a decode step. There is no mask, so whoever attends applies causality.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from token_sparse_attention.attention.flash import FlashBackend
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.integrations.obstacles import (
    AttentionFunction,
    LayerCall,
    obstacle,
)
from token_sparse_attention.integrations.past_probes import Pages
from token_sparse_attention.results import PackedSequences

_ARGUMENTS = frozenset(
    {
        "block_table",
        "cache",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
        "max_seqlen_k",
        "max_seqlen_q",
        "read_index",
        "write_index",
    }
)
_BLOCK_QUERIES = 1024  # queries per call where a mask must be written out


class PackedCall(NamedTuple):
    """One layer's attention call.

    Attributes:
        call: query ``[1, H, T, D]``; key and value ``[1, H_kv, T_kv, D]``, of the earlier tokens
            as well; the layer's arguments that are not of continuous batching.
        cu_seqlens_q: ``[requests + 1]`` int32, where each request's queries begin.
        cu_seqlens_k: ``[requests + 1]`` int32, where each request's keys begin.
        max_seqlen_q: no request has more queries.
        max_seqlen_k: no request has more keys.
        window: keys each query sees, itself included; None for all.
        pages: the paged cache as `PagedProbes` wants it; None if that is not known.
        slots: ``[T_kv]``, where in the pages each key lies; None without them.
        wanted: the queries whose logits are wanted, the last ones of what is complete, perhaps
            with old numbers behind them; None if that is not known.
    """

    call: LayerCall
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window: int | None
    pages: Any = None
    slots: Tensor | None = None
    wanted: Tensor | None = None


_PAGES: weakref.WeakKeyDictionary[Any, Pages] = weakref.WeakKeyDictionary()  # by allocator


class Request(NamedTuple):
    """Where one request's queries and keys lie.

    Attributes:
        queries: of the call.
        keys: of the call.
        ends_prompt: False if the rest of the request's prompt comes later.
    """

    queries: slice
    keys: slice
    ends_prompt: bool = True

    def of(self, packed: PackedCall) -> LayerCall:
        """Return the request's own call."""
        call = packed.call
        return call._replace(
            query=call.query[:, :, self.queries],
            key=call.key[:, :, self.keys],
            value=call.value[:, :, self.keys],
        )


def batched_name(name: str) -> str:
    """Return an implementation's name as continuous batching accepts it and makes no mask for it.

    transformers 5.17 and 5.18 take names with a prefix, later ones take whatever says that it is
    some flash attention. A digit after that word would ask for features of FlashAttention 2 or 3.
    """
    return f"paged|{name}" if _takes_prefix() else f"{name}_flash"


def _takes_prefix() -> bool:
    return "paged|sdpa" in ALL_ATTENTION_FUNCTIONS


def is_packed(arguments: dict[str, Any]) -> bool:
    """Return whether continuous batching made a layer's call with these arguments."""
    return arguments.get("write_index") is not None


def shares_prefixes(cache: object) -> bool:
    """Return whether requests read prefixes out of a paged cache that others computed."""
    return bool(getattr(cache, "use_prefix_sharing", False))


def read_call(call: LayerCall, cache: Any) -> PackedCall:
    """Put the new keys and values into the cache, and return what to attend over.

    Args:
        call: the layer's.
        cache: the paged cache; None if it is not known.

    Raises:
        ValueError: if the call is not one of continuous batching.
    """
    if not is_packed(call.arguments):
        raise ValueError(
            "model must be run by continuous batching under apply(continuous_batching=True), "
            "got another call; for other calls, leave that argument out"
        )
    arguments = dict(call.arguments)  # an update writes into them
    keys, values = call.key, call.value
    if arguments.get("cache") is not None:  # from 5.24 on the layer has updated it before
        layer: int = call.module.layer_idx  # type: ignore[assignment]
        update = partial(_update, cache) if _takes_prefix() else cache.update
        keys, values = update(
            key_states=keys, value_states=values, layer_idx=layer, kwargs=arguments
        )
    others = {name: argument for name, argument in arguments.items() if name not in _ARGUMENTS}
    pages, slots = _places(cache, arguments, call.module)
    return PackedCall(
        call._replace(key=keys, value=values, arguments=others),
        arguments["cu_seq_lens_q"],
        arguments["cu_seq_lens_k"],
        arguments["max_length_q"],
        arguments["max_length_k"],
        arguments.get("sliding_window"),
        pages,
        slots,
        arguments.get("logits_indices"),
    )


def _places(
    cache: Any, arguments: dict[str, Any], module: nn.Module
) -> tuple[Any, Tensor] | tuple[None, None]:
    """Return a layer's pages, and each key's slot in them; None and None if that is not known."""
    if arguments.get("sliding_window") is not None:
        return None, None
    layer: int = module.layer_idx  # type: ignore[assignment]
    if hasattr(cache, "layer_index_to_group_indices"):  # 5.17
        group, pages, stride = cache.layer_index_to_group_indices[layer][0], cache, None
    elif hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        group, pages = allocator.index, _PAGES.get(allocator)
        if pages is None:
            blocks = allocator.num_blocks + 2 * allocator.blocks_per_sector  # two are for padding
            page = allocator.tokens_per_page
            pages = _PAGES[allocator] = Pages(page, (blocks * page,))
        stride = allocator.block_physical_stride  # a block has a page for each layer
    else:
        return None, None
    read: Tensor = arguments["read_index"][group]
    written: Tensor = arguments["write_index"][group]
    slots = read if read.numel() else written  # nothing to read: all keys are the call's own
    if stride is not None:
        slots = slots // stride * pages.block_size + slots % stride
    return pages, slots


def _update(
    cache: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Do with a cache of transformers 5.17 or 5.18 what later versions' `update` does."""
    keys, values = cache.update(
        key_states=key_states,
        value_states=value_states,
        layer_idx=layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    for end in "qk":
        if f"max_seqlen_{end}" in kwargs:
            kwargs[f"max_length_{end}"] = kwargs[f"max_seqlen_{end}"]
    if isinstance(kwargs["cu_seq_lens_k"], dict):  # a model with layers of both kinds
        windowed = kwargs.get("sliding_window") is not None
        kind = "sliding_attention" if windowed else "full_attention"
        for name in ("cu_seq_lens_k", "max_length_k"):
            kwargs[name] = kwargs[name][kind]
    return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]


class RequestReader:
    """Reads lengths off the device once per forward pass, not once per layer."""

    def __init__(self) -> None:
        self._seen: dict[bool, tuple[weakref.ref[Tensor], list[Request]]] = {}

    def __call__(self, packed: PackedCall) -> list[Request]:
        """Return where each request lies; those of padding, without queries, are left out.

        Raises:
            RuntimeError: while a CUDA graph is captured, which cannot read lengths.
        """
        windowed = packed.window is not None
        seen = self._seen.get(windowed)  # another thread may change it
        if seen is not None and seen[0]() is packed.cu_seqlens_k:
            return seen[1]
        if packed.call.query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "token sparse attention reads each request's length, which a CUDA graph cannot; "
                "pass ContinuousBatchingConfig(use_cuda_graph=False)"
            )
        ends = torch.stack((packed.cu_seqlens_q, packed.cu_seqlens_k)).tolist()
        wanted = None if packed.wanted is None else set(packed.wanted.tolist())
        requests = [
            Request(slice(*queries), slice(*keys), wanted is None or queries[1] - 1 in wanted)
            for queries, keys in zip(*(pairwise(starts) for starts in ends))
            if queries[0] < queries[1]
        ]
        self._seen[windowed] = (weakref.ref(packed.cu_seqlens_k), requests)
        return requests


def consecutive(numbers: Iterable[int]) -> list[range]:
    """Return ascending numbers as ranges, as few as there can be.

    Example:
        >>> consecutive([0, 1, 4])
        [range(0, 2), range(4, 5)]
    """
    ranges: list[range] = []
    for number in numbers:
        if ranges and ranges[-1].stop == number:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            ranges.append(range(number, number + 1))
    return ranges


def attend_dense(
    packed: PackedCall,
    function: AttentionFunction,
    read: RequestReader,
    numbers: range,
    out: Tensor,
) -> None:
    """Attend some requests densely, as the layer wants it.

    Args:
        packed: the call.
        function: the layer's own attention function, for what this library's kernels cannot do.
        read: tells where the requests lie.
        numbers: which requests.
        out: ``[1, T, H, D]``, written in their queries' places.
    """
    call = packed.call
    plain = call._replace(arguments=call.arguments | {"sliding_window": None})
    if obstacle(plain)[0] is not None:
        for request in read(packed)[numbers.start : numbers.stop]:
            out[:, request.queries] = _with_written_mask(packed, function, request)
        return
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    backend = resolve_backend("auto", call.query, call.key)
    if isinstance(backend, FlashBackend):
        cu_seqlens_q, cu_seqlens_k = (
            # Cloned where they start elsewhere: a kernel may want them aligned.
            starts[numbers.start : numbers.stop + 1].clone()
            if numbers.start
            else starts[: numbers.stop + 1]
            for starts in (packed.cu_seqlens_q, packed.cu_seqlens_k)
        )
        sequences = PackedSequences(
            call.query[0].transpose(0, 1).contiguous(),
            call.key[0].transpose(0, 1),
            call.value[0].transpose(0, 1),
            cu_seqlens_q,
            cu_seqlens_k,
            packed.max_seqlen_q,
            packed.max_seqlen_k,
        )
        backend.attend_varlen(sequences, scale=scale, window=packed.window, out=out[0])
        return
    for request in read(packed)[numbers.start : numbers.stop]:
        query, key, value = request.of(packed)[1:4]
        attended = backend.attend(query, key, value, scale=scale, window=packed.window).out
        out[:, request.queries] = attended.transpose(1, 2)


def _with_written_mask(
    packed: PackedCall, function: AttentionFunction, request: Request
) -> Tensor:
    """One request by the model's own function ``[1, S_q, H, D]``, in blocks of queries."""
    call, window = request.of(packed), packed.window
    device, lowest = call.query.device, torch.finfo(call.query.dtype).min
    first_query = call.kv_len - call.query_len
    blocks = []
    for start in range(0, call.query_len, _BLOCK_QUERIES):
        number = torch.arange(start, min(start + _BLOCK_QUERIES, call.query_len), device=device)
        position = first_query + number[:, None]
        end = first_query + start + len(number)
        first_key = 0 if window is None else max(first_query + start - window + 1, 0)
        slot = torch.arange(first_key, end, device=device)
        hidden = slot > position
        if window is not None:
            hidden |= slot <= position - window
        mask = torch.zeros(hidden.shape, dtype=call.query.dtype, device=device)
        mask.masked_fill_(hidden, lowest)
        block = call._replace(
            query=call.query[:, :, start : start + len(number)],
            key=call.key[:, :, first_key:end],
            value=call.value[:, :, first_key:end],
            mask=mask[None, None],
        )
        blocks.append(block.run(function)[0])
    return torch.cat(blocks, 1)
