"""Probe queries of earlier chunks, kept with the places of their keys in a paged cache.

So a chunk samples as the whole prompt would, and so does a prompt whose prefix another one left
in the cache, or that was preempted. A place that no longer holds the key that its probe came with
has no probe: see `past_probes`. Decode steps leave none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.inputs import PastProbes
from token_sparse_attention.integrations.attention_mask import MaskLayout
from token_sparse_attention.integrations.past_probes import PagedProbes
from token_sparse_attention.integrations.serving.plan import Prefill
from token_sparse_attention.methods import LayerShape


@dataclass
class Slots:
    """Where each token of a step's requests lies in the cache: once per step, not per layer."""

    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def of(self, prefill: Prefill, block_table: Tensor, block_size: int) -> Tensor:
        """Return the slots of a request's tokens so far, ``[kv_len]`` int64.

        Args:
            prefill: of the request.
            block_table: ``[requests, n]``, each request's blocks in order.
            block_size: tokens of a block.
        """
        key = (prefill.request, block_size)
        if key not in self._known:
            position = torch.arange(prefill.kv_len, device=block_table.device)
            blocks = block_table[prefill.request].long()[position // block_size]
            self._known[key] = blocks * block_size + position % block_size
        return self._known[key]


class RequestProbes(NamedTuple):
    """Where one layer keeps the probes of one request.

    Attributes:
        kept: the places.
        prefill: of the request.
    """

    kept: PagedProbes
    prefill: Prefill

    def recall(self, query: Tensor, keys: Tensor) -> PastProbes | None:
        """Return what earlier chunks left; arguments as the operator takes them."""
        return self.kept.recall(query, keys, MaskLayout(self.prefill.kv_len, None))

    def keep(self, query: Tensor, keys: Tensor) -> None:
        """Keep the request's own probes.

        Args:
            query: ``[1, H, S_q, D]``.
            keys: ``[1, H_kv, S, D]``, the last S_q those of the queries' own tokens.
        """
        own_keys = keys[:, :, keys.shape[2] - self.prefill.query_len :]
        self.kept.keep_own(query, own_keys, self.prefill.kv_len - self.prefill.query_len)


def probe_share(
    config: SparseConfig, shape: LayerShape, page_size: int, *, quantised: bool = False
) -> float:
    """Return how much memory a layer's probes take, as a share of its paged cache.

    Args:
        config: the layer's settings.
        shape: of its calls.
        page_size: tokens of a block of the cache, which has room for at least one probe.
        quantised: whether the cache holds 8-bit numbers; probes never do.
    """
    if not isinstance(config, KVSamplingConfig):
        return 0.0
    numbers = (shape.num_heads + 1) * shape.head_dim * shape.itemsize + 8
    cached = 2 * shape.num_kv_heads * shape.head_dim * (1 if quantised else shape.itemsize)
    places = -(-page_size // config.probe_stride)
    return numbers * places / page_size / cached
