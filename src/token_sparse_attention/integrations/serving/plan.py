"""Which requests of one engine step run sparse, decided on the host from lengths alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.gate import Gate
from token_sparse_attention.methods import LayerShape, method_of


class Prefill(NamedTuple):
    """A prompt, or a chunk of one, in one engine step.

    Attributes:
        request: the request's number in the step.
        start: its first query among the step's tokens.
        stop: the token after its last query.
        kv_len: its tokens so far, the queries included; they are the last of them.
        prompt_len: tokens of its prompt, which may end before this chunk, within or behind it;
            None if that is not known.
    """

    request: int
    start: int
    stop: int
    kv_len: int
    prompt_len: int | None = None

    @property
    def query_len(self) -> int:
        """How many queries it has in this step."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether all its keys are this step's, so that the cache need not be read."""
        return self.query_len == self.kv_len

    def dense_reason(self, gate: Gate) -> str | None:
        """Return why its lengths make it run dense, None if they do not."""
        reason = gate.reason(self.query_len, self.kv_len)
        return None if reason is None else str(reason)

    def settings(self, config: SparseConfig) -> SparseConfig:
        """Return a layer's settings for this part of a prompt.

        With KV sampling the last ``dense_queries`` of the prompt attend to every key, and so does
        the reply that a resumed request goes through again: so did the steps that wrote it. No
        other query of a chunk does. Without the prompt's length, the chunk's last queries do.

        Example:
            >>> config = KVSamplingConfig(dense_queries=128)
            >>> ends = [1024, 1500, 1800, 2000, 2010]  # of chunks, the prompt's end is 2000
            >>> [Prefill(0, 0, 512, end, 2000).settings(config).dense_queries for end in ends]
            [0, 0, 0, 128, 138]
        """
        if self.prompt_len is None or not isinstance(config, KVSamplingConfig):
            return config
        first = max(self.prompt_len - config.dense_queries, 0)
        return _with_dense_queries(config, min(max(self.kv_len - first, 0), self.query_len))


@functools.lru_cache(maxsize=256)
def _with_dense_queries(config: KVSamplingConfig, count: int) -> KVSamplingConfig:
    return config if config.dense_queries == count else replace(config, dense_queries=count)


class StockPart(NamedTuple):
    """The requests of a step that the stock backend attends, in one call.

    Attributes:
        tokens: ``[T]``, their tokens among the step's.
        metadata: the stock backend's metadata for these alone.
    """

    tokens: Tensor
    metadata: Any


class Split(NamedTuple):
    """What a sparse layer does in one step.

    Attributes:
        config: the layer's settings.
        prefills: the requests that run sparse.
        stock: the other requests, None if there are none; without sparse ones not used.
        leaving: requests that run dense, and leave probes for later chunks.
    """

    config: SparseConfig
    prefills: list[Prefill]
    stock: StockPart | None
    leaving: list[Prefill]


def workspace_bytes(config: SparseConfig, shape: LayerShape, *, quantised: bool = False) -> int:
    """Return what one sparse prefill allocates on a GPU at most, about.

    The plugin copies the chunk's keys and values out of the cache. The output is there three
    times: FlashAttention-2 writes one of its own, which is copied with what was there. The
    rest is the method's.

    Args:
        config: the layer's settings.
        shape: of its longest call.
        quantised: whether the cache holds 8-bit numbers, which are copied first.
    """
    per_token = shape.head_dim * shape.itemsize
    cached = 2 * shape.num_kv_heads * shape.kv_len * shape.head_dim
    copied = cached * (shape.itemsize + quantised)
    output = 3 * shape.num_heads * shape.query_len * per_token
    return copied + output + method_of(config).workspace(shape)


def list_prefills(
    query_starts: Sequence[int],
    kv_lens: Sequence[int],
    is_prefilling: Sequence[bool] | None,
    most_decode_tokens: int,
    prompt_lens: Sequence[int] | None = None,
) -> list[Prefill]:
    """Return the requests that process prompt tokens in a step; decode steps are left out.

    A request that was preempted goes through its generated tokens like a prompt.

    Args:
        query_starts: where each request's queries start, and where the last one's end.
        kv_lens: tokens of each request so far, this step's included.
        is_prefilling: whether each request's prompt is still being processed; None means
            every request with more than one query.
        most_decode_tokens: a request with more queries than these does not decode.
        prompt_lens: tokens of each request's prompt; None if they are not known.
    """
    listed = []
    for request, kv_len in enumerate(kv_lens):
        start, stop = query_starts[request], query_starts[request + 1]
        prefilling = is_prefilling is None or is_prefilling[request] or stop - start == kv_len
        if stop - start > 1 and (prefilling or stop - start > most_decode_tokens):
            prompt_len = None if prompt_lens is None else prompt_lens[request]
            listed.append(Prefill(request, start, stop, kv_len, prompt_len))
    return listed


class Choice(NamedTuple):
    """Which requests of a step run sparse under a config.

    Attributes:
        sparse: those that do.
        leaving: those that run dense, and leave probes for later chunks.
        reasons: of every request, why it runs dense, None if it does not.
    """

    sparse: list[Prefill]
    leaving: list[Prefill]
    reasons: list[str | None]


def choose(
    prefills: Sequence[Prefill],
    obstacles: Sequence[str | None],
    config: SparseConfig,
    gate: Gate,
) -> Choice:
    """Decide by lengths which requests run sparse.

    Args:
        prefills: of one step.
        obstacles: why each cannot run sparse whatever its lengths, None if it can.
        config: the settings of a layer.
        gate: of the same.
    """
    reasons = [
        obstacle or prefill.dense_reason(gate) for prefill, obstacle in zip(prefills, obstacles)
    ]
    sparse: list[Prefill] = []
    dense: list[Prefill] = []
    for prefill, reason in zip(prefills, reasons):
        (sparse if reason is None else dense).append(prefill)
    return Choice(sparse, [one for one in dense if leaves_probes(config, one)], reasons)


def reason_everywhere(choices: Sequence[Choice], number: int) -> str | None:
    """Return why a step's request runs dense under all configs, None if one runs it sparse.

    Args:
        choices: of the configs.
        number: of the request, in the order of the reasons.
    """
    reasons = [choice.reasons[number] for choice in choices]
    return None if None in reasons else max(reasons, key=reasons.count)


def leaves_probes(config: SparseConfig, prefill: Prefill) -> bool:
    """Return whether a request has queries in a step that are probes for later ones."""
    if not isinstance(config, KVSamplingConfig):
        return False
    stride = config.probe_stride
    return prefill.kv_len // stride > (prefill.kv_len - prefill.query_len) // stride


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting for the device."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
