"""The attention of a layer with sparse prefills: a mixin over vLLM's stock implementation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.past_probes import PagedProbes, Pages
from token_sparse_attention.integrations.serving.attention import LayerAttention, as_batch
from token_sparse_attention.integrations.serving.plan import Prefill, workspace_bytes
from token_sparse_attention.integrations.serving.probes import RequestProbes, probe_share
from token_sparse_attention.integrations.vllm.backend import Step
from token_sparse_attention.integrations.vllm.engine import (
    engine_settings,
    is_quantised,
    longest_prefill,
)
from token_sparse_attention.integrations.vllm.paged import (
    Quantised,
    fit_pages,
    quantised_cache,
)
from token_sparse_attention.methods import LayerShape, method_of


class _Call(NamedTuple):
    """A layer's call in a step that it has a split for.

    Attributes:
        layer: vLLM's, which has the scales of a quantised cache.
        step: what the builder decided.
        config: the layer's settings.
        tensors: the step's queries ``[T, H, D]``, keys and values ``[T, H_kv, D]``.
        kv_cache: of the layer.
        metadata: the stock backend's.
    """

    layer: Any
    step: Step
    config: SparseConfig
    tensors: tuple[Tensor, Tensor, Tensor]
    kv_cache: Tensor
    metadata: Any


class SparsePrefillImpl:
    """Mixin before a stock attention implementation.

    Attributes:
        obstacle: why this layer can never run sparse, None if it can.
        workspace: bytes that a sparse prefill allocates at most; 0 if the plugin is off.
    """

    obstacle: str | None
    workspace: int
    scale: float

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        from vllm.config import get_current_vllm_config
        from vllm.platforms import current_platform

        vllm_config = get_current_vllm_config()
        self.workspace = 0
        self._pages = Pages()
        settings = engine_settings(vllm_config)  # raises early what could never run
        self._quantised = quantised_cache(kv_cache_dtype, vllm_config.model_config.dtype)
        unread = is_quantised(kv_cache_dtype) and self._quantised is None
        if settings is not None:
            model = vllm_config.model_config
            longest = longest_prefill(vllm_config)
            itemsize = model.dtype.itemsize
            shape = LayerShape(
                num_heads, num_kv_heads, head_size, itemsize, longest.query_len, longest.kv_len
            )
            # Which layer this is cannot be known here.
            num_layers = model.get_total_num_hidden_layers()
            configs = settings.layer_configs(num_layers).values()
            device = torch.device(current_platform.device_type)
            page_size, eight_bits = (
                vllm_config.cache_config.block_size,
                self._quantised is not None,
            )
            needed, share = [0], 0.0
            for config in configs:
                gate = method_of(config).gate(device, num_heads, head_size)
                if longest.dense_reason(gate) is None:
                    needed.append(workspace_bytes(config, shape, quantised=eight_bits))
                    of_one = probe_share(config, shape, page_size, quantised=eight_bits)
                    share += of_one / num_layers
            self.workspace = max(needed) + _probe_bytes(share, vllm_config, device)
        super().__init__(
            num_heads,  # type: ignore[call-arg]
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **others,
        )
        sinks = others.pop("sinks", None)
        unknown = [name for name, value in others.items() if value not in (None, False)]
        obstacles = {
            str(DenseReason.NOT_CAUSAL): attn_type != "decoder",
            str(DenseReason.SLIDING_WINDOW): sliding_window is not None,
            str(DenseReason.SOFT_CAP): bool(logits_soft_cap),
            str(DenseReason.ATTENTION_SINKS): sinks is not None,
            str(DenseReason.ALIBI): alibi_slopes is not None,
            str(DenseReason.SHARED_CACHE): kv_sharing_target_layer_name is not None,
            str(DenseReason.QUANTISED_CACHE): unread,
            f"{DenseReason.UNKNOWN_ARGUMENT}: {', '.join(unknown)}": bool(unknown),
        }
        self.obstacle = next((text for text, stands in obstacles.items() if stands), None)
        if self.obstacle is not None:
            self.workspace = 0

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; arguments as in vLLM. The step's keys and values are in the cache already."""
        stock = super().forward  # type: ignore[misc]
        step: Step | None = getattr(attn_metadata, "token_sparse", None)
        split = None if step is None else step.splits.get(layer.layer_name)
        if step is None or split is None:
            if attn_metadata is None and self.workspace and query.is_cuda:
                # vLLM measures in such a run how much memory is left for the cache.
                torch.empty(self.workspace, dtype=torch.uint8, device=query.device)
            result: Tensor = stock(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
            return result
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("token sparse attention does not quantise its output")
        call = _Call(layer, step, split.config, (query, key, value), kv_cache, attn_metadata)
        for prefill in split.leaving:
            probes = self._probes(call, prefill)
            if probes is not None:
                if self._quantised is None:
                    keys = as_batch(key[prefill.start : prefill.stop])
                else:
                    keys = self._keys_values(call, prefill)[0]
                probes.keep(as_batch(self._queries(call, prefill, output.dtype)), keys)
        for prefill in split.prefills:
            part = slice(prefill.start, prefill.stop)
            own_query = self._queries(call, prefill, output.dtype)
            keys, values = self._keys_values(call, prefill)
            probes = self._probes(call, prefill)
            own = prefill.settings(split.config)
            how = LayerAttention(own, self.scale, step.execution, step.counts)
            how.attend(own_query, keys, values, output[part], probes)
            if probes is not None:
                probes.keep(as_batch(own_query), keys)
        if not split.prefills:
            stock(layer, query, key, value, kv_cache, attn_metadata, output)
        elif split.stock is not None:
            tokens, metadata = split.stock
            out = torch.empty_like(output[: len(tokens)])
            stock(layer, query[tokens], key[tokens], value[tokens], kv_cache, metadata, out)
            output[tokens] = out
        return output

    def _queries(self, call: _Call, prefill: Prefill, dtype: torch.dtype) -> Tensor:
        """Return a request's queries ``[T, H, D]`` of the step, in the model's dtype."""
        query = call.tensors[0][prefill.start : prefill.stop]
        if query.dtype == dtype:
            return query
        read = Quantised(query.dtype, dtype).read(as_batch(query), call.layer._q_scale)
        return read[0].transpose(0, 1)

    def _keys_values(self, call: _Call, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a request so far, ``[1, H_kv, kv_len, D]``.

        A quantised cache holds others than the step does, and every later token sees those. So a
        whole prompt reads them too, or it would depend on how prompts are cut.
        """
        if prefill.whole and self._quantised is None:
            part = slice(prefill.start, prefill.stop)
            return as_batch(call.tensors[1][part]), as_batch(call.tensors[2][part])
        table = call.metadata.block_table[prefill.request]
        if self._quantised is None:
            return call.step.read_cache(call.kv_cache, table, prefill.kv_len)
        codes = call.step.read_cache(call.kv_cache.view(torch.uint8), table, prefill.kv_len)
        layer = call.layer
        key, value = (
            self._quantised.read(side, scale)
            for side, scale in zip(codes, (layer._k_scale, layer._v_scale))
        )
        return key, value

    def _probes(self, call: _Call, prefill: Prefill) -> RequestProbes | None:
        """Return where a request's probes are kept, None if the layer's method has none."""
        if not isinstance(call.config, KVSamplingConfig):
            return None
        self._pages = fit_pages(self._pages, call.kv_cache)
        slots = call.step.slots.of(prefill, call.metadata.block_table, self._pages.block_size)
        return RequestProbes(PagedProbes(self._pages, 0, call.config, slots), prefill)


def _probe_bytes(share: float, vllm_config: Any, device: torch.device) -> int:
    """Return what all layers' probes take at most, a share of the paged cache that fits beside."""
    if device.type != "cuda" or not share:
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    usable = total * vllm_config.cache_config.gpu_memory_utilization
    return int(usable * share / (1 + share))
