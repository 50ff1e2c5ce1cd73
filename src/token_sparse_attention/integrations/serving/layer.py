"""What the kernels of a layer are compiled for, and which of its calls run sparse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch

from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.gate import Gate
from token_sparse_attention.impls import resolve_impl
from token_sparse_attention.inputs import check_dense_heads
from token_sparse_attention.integrations.serving.settings import Settings
from token_sparse_attention.methods import method_of
from token_sparse_attention.tensor_parallel import local_heads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Layer(NamedTuple):
    """What the kernels of a layer are compiled for.

    Attributes:
        config: its settings, its dense heads by this rank's numbers.
        num_heads: query heads on this rank.
        num_kv_heads: KV heads on this rank.
        head_dim: D.
        dtype: of queries, keys and values.
        scale: factor of the logits.
    """

    config: SparseConfig
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float

    def gate(self, device: torch.device) -> Gate:
        """Return from which lengths on it runs sparse."""
        return method_of(self.config).gate(device, self.num_heads, self.head_dim)


def own_part(layer: Layer, tp_group: ProcessGroup | None) -> Layer:
    """Return a layer with its dense heads by this rank's numbers.

    Args:
        layer: its config has all ranks' dense heads, by their numbers in the layer.
        tp_group: the ranks that hold the layer's other heads, None without them.

    Raises:
        ValueError: if the layer has no such dense heads.
    """
    ranks = 1 if tp_group is None else tp_group.size()
    check_dense_heads(layer.config, layer.num_heads * ranks)
    own = local_heads(layer.config.dense_heads, layer.num_heads, tp_group)
    return layer._replace(config=replace(layer.config, dense_heads=own))


def gates_of(
    configs: Iterable[SparseConfig], layers: Iterable[Layer], device: torch.device
) -> dict[SparseConfig, Gate]:
    """Return one gate for all layers of a config: that of the last to begin.

    Args:
        configs: of the layers, as the settings have them.
        layers: in the same order.
        device: where they run.
    """
    gates: dict[SparseConfig, Gate] = {}
    for config, layer in zip(configs, layers):
        gate = layer.gate(device)
        gates[config] = max(gate, gates.get(config, gate), key=attrgetter("break_even"))
    return gates


def check_layer(layer: Layer, settings: Settings, device: torch.device) -> None:
    """Check that code which was asked for can run a layer.

    Raises:
        ValueError: if it cannot.
    """
    query, key = (
        torch.empty(1, heads, 1, layer.head_dim, dtype=layer.dtype, device=device)
        for heads in (layer.num_heads, layer.num_kv_heads)
    )
    resolve_impl(settings.impl, query, layer.head_dim)
    resolve_backend(settings.attention_backend, query, key)
