"""Run sparse prefills while the engine starts, so that no user waits for kernels to compile.

Kernels are compiled per setting and per shape of a layer, not per length: a short prompt
compiles what a long one runs. Nothing here is counted, and no random numbers are drawn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
)
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.inputs import AuxRequest, Chunk, PastProbes
from token_sparse_attention.integrations.serving.layer import Layer
from token_sparse_attention.integrations.serving.plan import Prefill
from token_sparse_attention.integrations.serving.settings import Settings
from token_sparse_attention.integrations.vllm.paged import ReadCache
from token_sparse_attention.results import TokenSelection

_QUERIES = 512  # attention kernels may have variants of their own for a tile or two of queries
_MIN_TOKENS = 256  # a number at run time, so a smaller one compiles the same
_LIGHT = -100.0  # a key that no query attends to


# What ran in this process, and what stopped it if anything did.
_WARM: dict[tuple[Layer, str, str, torch.device], str | None] = {}


class WarmUp(NamedTuple):
    """What became of a warm-up.

    Attributes:
        seconds: how long it took, None if there was nothing to run.
        failed: layers whose kernels failed, and how.
    """

    seconds: float | None
    failed: dict[Layer, str]


def warm_up(
    layers: Iterable[Layer],
    longest: Prefill,
    settings: Settings,
    read_cache: ReadCache | None,
    block_size: int,
    device: torch.device,
) -> WarmUp:
    """Run each kind of layer that this process has not run yet; an error is returned.

    Ranks do not wait for each other here: an error on one would leave the others waiting.

    Args:
        layers: equal ones run once.
        longest: the most queries and keys that the engine gives a layer; one that runs dense
            even then is left out.
        settings: of the plugin.
        read_cache: see `backend.Step`; None where chunks run dense.
        block_size: tokens of a block of the cache.
        device: where to run.
    """
    began = time.perf_counter()
    ran, failed = False, {}
    for layer in dict.fromkeys(layers):
        known = (layer, settings.impl, settings.attention_backend, device)
        if longest.dense_reason(layer.gate(device)) is not None:
            continue
        if known not in _WARM:
            ran = True
            try:
                run_layer(layer, settings, read_cache, block_size, device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                _WARM[known] = None
            except Exception as error:  # whatever it is, the engine starts without
                _WARM[known] = f"{type(error).__name__}: {error}"
        why = _WARM[known]
        if why is not None:
            failed[layer] = why
    return WarmUp(time.perf_counter() - began if ran else None, failed)


def run_layer(
    layer: Layer,
    settings: Settings,
    read_cache: ReadCache | None,
    block_size: int,
    device: torch.device,
) -> list[TokenSelection]:
    """Run whole prompts and chunks of even and odd lengths; arguments as in `warm_up`."""
    layer = layer._replace(config=_eager(layer.config))
    query_len, kv_len = lengths(layer, device)
    selections = []
    for more in (0, 1):
        query, key, value = _fused(layer, kv_len + more, device)
        selections.append(_attend(layer, settings, query, key, value))
        if read_cache is not None:
            cache, table = _paged(layer, kv_len + more, block_size, device)
            key, value = read_cache(cache, table, kv_len + more)
            part = query[:, :, -(query_len + more) :]
            past = past_probes(layer, kv_len - query_len, device)
            selections.append(_attend(layer, settings, part, key, value, past))
    return selections


def past_probes(layer: Layer, first_query: int, device: torch.device) -> PastProbes | None:
    """Return what earlier chunks leave for one that begins at a position."""
    config = layer.config
    if not isinstance(config, KVSamplingConfig):
        return None
    number, stride = 2 * config.num_probes, config.probe_stride
    last = first_query // stride - 1
    entry = torch.arange(number, device=device)
    position = (last - (last - entry) % number + 1) * stride - 1
    shape = (1, layer.num_heads, number, layer.head_dim)
    return PastProbes(torch.ones(shape, dtype=layer.dtype, device=device), position[None])


def _eager(config: SparseConfig) -> SparseConfig:
    """Return settings that run short prompts sparse too, and compile the same."""
    config = dataclasses.replace(config, crossover="off")
    if isinstance(config, TokenSelectionConfig):
        return dataclasses.replace(config, min_tokens=min(config.min_tokens, _MIN_TOKENS))
    return config


def lengths(layer: Layer, device: torch.device) -> tuple[int, int]:
    """Return how many queries and keys a chunk needs to run all that long ones run.

    The keys hold all samples: how many there are at most is compiled into a kernel.

    Raises:
        ValueError: if no length runs sparse.
    """
    config, gate = layer.config, layer.gate(device)
    shortest = gate.shortest_prompt
    if shortest is None:
        raise ValueError(f"layer must run sparse at some length, got {gate.always}")
    query_len = max(gate.min_queries, config.dense_queries, _QUERIES)
    past = shortest
    if isinstance(config, TokenSelectionConfig):
        past += config.pool_size
    if isinstance(config, KVSamplingConfig):
        most = config.num_samples * (4 if config.budget == "per_head" else 1)  # of a head
        past = max(past, config.sink_size + most)
    return -(-query_len // 16) * 16, -(-(query_len + past + 64) // 16) * 16


def _fused(layer: Layer, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V as a model's fused projection lays them out; the first half is light."""
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    shape = (length, heads + 2 * kv_heads, layer.head_dim)
    tokens = torch.ones(shape, dtype=layer.dtype, device=device).transpose(0, 1)[None]
    query, both = tokens[:, :heads], tokens[:, heads:]
    key, value = both[:, :kv_heads], both[:, kv_heads:]
    key[:, :, : length // 2] = _LIGHT
    return query, key, value


def _paged(
    layer: Layer, length: int, block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A cache and its blocks; keys and values of the first half are light."""
    blocks = -(-length // block_size)
    cache = torch.ones(
        blocks, layer.num_kv_heads, block_size, 2 * layer.head_dim,
        dtype=layer.dtype, device=device,
    )  # fmt: skip
    cache[: length // 2 // block_size] = _LIGHT
    return cache, torch.arange(blocks, device=device)


def _attend(
    layer: Layer,
    settings: Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: PastProbes | None = None,
) -> TokenSelection:
    """Call the operator as a layer does, but for the other ranks."""
    execution = Execution(settings.impl, settings.attention_backend)
    aux = AuxRequest(selection=True, indices=False)
    _, selection, _ = token_sparse_attention(
        query,
        key,
        value,
        layer.config,
        scale=layer.scale,
        execution=execution,
        chunk=Chunk(past),
        return_aux=aux,
    )
    assert selection is not None
    return selection
