"""Which requests of one engine step run sparse, decided on the host from lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.crossover import BreakEven


class Prefill(NamedTuple):
    """A prompt, or a chunk of one, in one engine step.

    Attributes:
        row: the request's place in the step.
        start: its first query among the step's tokens.
        stop: behind its last query.
        kv_len: its tokens so far, the queries included; they are the last of them.
    """

    row: int
    start: int
    stop: int
    kv_len: int

    @property
    def query_len(self) -> int:
        """How many queries it has in this step."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether all its keys are this step's, so that the cache need not be read."""
        return self.query_len == self.kv_len

    def dense_reason(self, config: TokenSparseConfig, even: BreakEven) -> str | None:
        """Return why its lengths make it run dense, None if they do not."""
        reason = config.dense_reason(self.query_len, self.kv_len)
        reason = reason or even.dense_reason(self.query_len, self.kv_len)
        return None if reason is None else str(reason)


class Rest(NamedTuple):
    """The other requests of a step, for the stock backend in one call.

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
        prefills: the requests that run sparse; at least one.
        rest: the other requests, None if there are none.
    """

    config: TokenSparseConfig
    prefills: list[Prefill]
    rest: Rest | None


def workspace_bytes(
    config: TokenSparseConfig,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    query_len: int,
    kv_len: int,
) -> int:
    """Return what one sparse prefill allocates on a GPU at most, about.

    The chunk's keys and values out of the cache, its output (three times: FlashAttention-2 writes
    one of its own, which is copied with what was there), scores and their order or indices
    per head and token; then either the packed heads, of which half a GiB is held at once, or
    before them the probabilities of the draws, for as many heads at once as have eight million
    tokens. The fallback takes log-sum-exps, and the far tokens' keys and values.
    """
    copied = 2 * num_kv_heads * kv_len * head_dim * itemsize
    output = 3 * num_heads * query_len * head_dim * itemsize
    scored = num_heads * kv_len
    selection = scored * (2 * 4 + 4 + 8 if config.select_queries else 4 + 8)
    at_once = 2**29 if config.select_queries else 0
    fallback = 0
    if config.fallback == "window":
        most = 4 if config.budget == "per_head" else 1  # of samples, times the mean
        far = config.fallback_sinks + config.fallback_landmarks + most * config.fallback_samples
        fallback = num_heads * (3 * 4 * query_len + far * (2 * head_dim * itemsize + 5 * 8))
        if config.fallback_samples:
            at_once = max(at_once, 64 * min(scored, max(2**23, kv_len)))
    return copied + output + selection + fallback + at_once


def list_prefills(
    query_starts: Sequence[int],
    kv_lens: Sequence[int],
    is_prefilling: Sequence[bool] | None,
    most_decode_tokens: int,
) -> list[Prefill]:
    """Return the requests that process prompt tokens in a step; decode steps are left out.

    A request that was preempted goes through its generated tokens like a prompt.

    Args:
        query_starts: where each request's queries start, and behind the last one's.
        kv_lens: tokens of each request so far, this step's included.
        is_prefilling: whether each request's prompt is still being processed; None means
            every request with more than one query.
        most_decode_tokens: a request with more queries than these does not decode.
    """
    listed = []
    for row, kv_len in enumerate(kv_lens):
        start, stop = query_starts[row], query_starts[row + 1]
        prefilling = is_prefilling is None or is_prefilling[row] or stop - start == kv_len
        if stop - start > 1 and (prefilling or stop - start > most_decode_tokens):
            listed.append(Prefill(row, start, stop, kv_len))
    return listed
