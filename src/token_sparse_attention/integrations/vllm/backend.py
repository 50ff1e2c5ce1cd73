"""What the CPU and the GPU backend share: a mixin over vLLM's metadata builder.

The builder decides per step, on the host, which requests run sparse in which layers. In such
a layer each of them goes through `token_sparse_attention`, and the others go to the stock
backend in one call, with metadata of their own. Everything else is the stock backend's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.serving.counters import COUNTERS, log_layers
from token_sparse_attention.integrations.serving.layer import Layer, check_layer, gates_of
from token_sparse_attention.integrations.serving.plan import (
    Prefill,
    Split,
    StockPart,
    choose,
    list_prefills,
    reason_everywhere,
    to_device,
)
from token_sparse_attention.integrations.serving.probes import Slots
from token_sparse_attention.integrations.serving.settings import selects_tokens
from token_sparse_attention.integrations.vllm.engine import (
    engine_settings,
    layer_shapes,
    longest_prefill,
    most_decode_tokens,
    step_obstacle,
    tensor_parallel_group,
    usable_layers,
)
from token_sparse_attention.integrations.vllm.paged import ReadCache
from token_sparse_attention.integrations.vllm.prompts import prompt_lengths, watch_runner
from token_sparse_attention.integrations.vllm.warm_up import warm_up

_LOG = logging.getLogger("vllm.token_sparse_attention")  # below vLLM's own logger


@dataclass(frozen=True)
class Step:
    """What the builder tells the layers, as an attribute of the stock metadata.

    Attributes:
        splits: what the layers do that run a request of this step sparse, by name.
        execution: how the operator runs, on the ranks that hold the layers' other heads.
        read_cache: returns a request's keys and values ``[1, H_kv, kv_len, D]``, given the
            cache, its blocks and its length.
        counts: whether this process counts.
        slots: where the requests' tokens lie in the cache.
    """

    splits: dict[str, Split]
    execution: Execution
    read_cache: ReadCache
    counts: bool
    slots: Slots = field(default_factory=Slots)


class SparsePrefillBuilder:
    """Mixin before a stock metadata builder."""

    supports_update_block_table = False  # the split's metadata would keep the old one

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self._configs: dict[str, SparseConfig] = {}
        settings = engine_settings(vllm_config)
        if settings is None:
            return
        self._settings = settings
        watch_runner(vllm_config)
        self._read_cache = self.cache_reader()
        tp_group, rank = tensor_parallel_group()
        self._execution = Execution(settings.impl, settings.attention_backend, tp_group=tp_group)
        self._counts = rank == 0
        self._most_decode_tokens = most_decode_tokens(vllm_config)
        self._configs, obstacles = usable_layers(settings, vllm_config)
        if not self._configs and self._counts:
            _LOG.warning("Token sparse attention is on, but no layer can run sparse")
        first = next(iter(self._configs), None)
        self._counts_prefills = self._counts and first in layer_names
        self._configs = {
            name: self._configs[name] for name in self._configs if name in layer_names
        }
        if self._counts:
            mine = {name: obstacles[name] for name in obstacles if name in layer_names}
            self._log_layers(mine, vllm_config)
        layers = layer_shapes(self._configs, vllm_config, tp_group)
        self._gates = gates_of(self._configs.values(), layers, device)
        for layer in dict.fromkeys(layers):
            check_layer(layer, settings, device)
        if settings.warm_up and device.type == "cuda":  # a CPU has nothing to compile
            self._warm_up(layers, longest_prefill(vllm_config), kv_cache_spec.block_size, device)

    def _log_layers(self, obstacles: dict[str, str], vllm_config: Any) -> None:
        log_layers(_LOG, len(self._configs), obstacles)
        chunked = vllm_config.scheduler_config.enable_chunked_prefill
        if chunked and selects_tokens(self._configs.values()):
            _LOG.warning(
                "Token sparse attention: chunked prefill is on, and each chunk of a prompt "
                "selects for itself; with --no-enable-chunked-prefill a reply does not depend "
                "on what else the server is doing (see docs/serving.md)"
            )

    def _warm_up(
        self, layers: list[Layer], longest: Prefill, block_size: int, device: torch.device
    ) -> None:
        """Compile the kernels of the layers, and leave those dense whose kernels fail."""
        seconds, failed = warm_up(
            layers, longest, self._settings, self._read_cache, block_size, device
        )
        if seconds is not None and self._counts:
            _LOG.info("Token sparse attention: kernels warmed up in %.1f seconds", seconds)
        flags = torch.tensor([layer in failed for layer in layers], dtype=torch.int32)
        tp_group = self._execution.tp_group
        if tp_group is not None and layers:  # a rank's failure is the others' too
            flags = flags.to(device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=tp_group)
        broken = [name for name, flag in zip(self._configs, flags.tolist()) if flag]
        if broken:
            why = "; ".join(dict.fromkeys(failed.values())) or "on another rank"
            _LOG.warning(
                "Token sparse attention: %s stay dense: their kernels could not be warmed up: %s",
                ", ".join(broken),
                why,
            )
        self._configs = {
            name: config for name, config in self._configs.items() if name not in broken
        }

    def cache_reader(self) -> ReadCache | None:
        """Return what reads this device's cache, None if its layout is not understood."""
        raise NotImplementedError

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """Build the stock metadata, and add the step's splits if a request runs sparse."""
        stock = super().build  # type: ignore[misc]
        metadata = stock(common_prefix_len, common_attn_metadata, fast_build)
        if not self._configs:
            return metadata
        if self._counts:
            COUNTERS.report(_LOG.info, self._settings.log_interval)
        # Some draft models' steps are built fast; they are short, and not this model's.
        if common_attn_metadata.max_query_len > 1 and not fast_build:
            splits = self._split(common_attn_metadata)
            if splits:
                metadata.token_sparse = Step(
                    splits,
                    self._execution,
                    self._read_cache or _no_reader,
                    self._counts,
                )
        return metadata

    def _split(self, common: Any) -> dict[str, Split]:
        if common.seq_lens_cpu_upper_bound is None:  # in no step of a model's own
            return {}
        prefills = list_prefills(
            common.query_start_loc_cpu.tolist(),
            common.seq_lens_cpu_upper_bound.tolist()[: common.num_reqs],
            None if common.is_prefilling is None else common.is_prefilling.tolist(),
            self._most_decode_tokens,
            prompt_lengths(common.num_reqs),
        )
        obstacle = step_obstacle(common)
        obstacles = [obstacle or self._obstacle(prefill) for prefill in prefills]
        split_of: dict[SparseConfig, Split | None] = {}
        stock_parts: dict[tuple[int, ...], StockPart | None] = {}  # by the sparse requests
        choices = []
        for config in dict.fromkeys(self._configs.values()):
            choice = choose(prefills, obstacles, config, self._gates[config])
            choices.append(choice)
            leaving = choice.leaving if obstacle is None and self._read_cache is not None else []
            split_of[config] = Split(config, [], None, leaving) if leaving else None
            if choice.sparse:
                requests = tuple(prefill.request for prefill in choice.sparse)
                if requests not in stock_parts:
                    stock_parts[requests] = self._stock_part(common, requests)
                split_of[config] = Split(config, choice.sparse, stock_parts[requests], leaving)
        if self._counts_prefills:
            for number in range(len(prefills)):
                COUNTERS.add_prefill(reason_everywhere(choices, number))
        splits = {name: split_of[config] for name, config in self._configs.items()}
        return {name: split for name, split in splits.items() if split is not None}

    def _obstacle(self, prefill: Prefill) -> str | None:
        unread = self._read_cache is None and not prefill.whole
        return str(DenseReason.CACHE_LAYOUT) if unread else None

    def _stock_part(self, common: Any, sparse: tuple[int, ...]) -> StockPart | None:
        """Build the stock metadata of the requests that are not `sparse`."""
        starts = common.query_start_loc_cpu.tolist()
        others = [
            request
            for request in range(common.num_reqs)
            if request not in sparse and starts[request + 1] > starts[request]
        ]
        if not others:
            return None
        device = common.query_start_loc.device
        spans = [torch.arange(*starts[request : request + 2]) for request in others]
        tokens = to_device(torch.cat(spans), device)
        ends = torch.tensor([0] + [len(span) for span in spans]).cumsum(0).to(torch.int32)
        numbers = torch.tensor(others)
        on_device = to_device(numbers, device)

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[numbers.to(tensor.device)]

        part = common.replace(
            query_start_loc=to_device(ends, device),
            query_start_loc_cpu=ends,
            seq_lens=common.seq_lens[on_device],
            num_reqs=len(others),
            num_actual_tokens=len(tokens),
            max_query_len=max(len(span) for span in spans),
            block_table_tensor=common.block_table_tensor[on_device],
            slot_mapping=common.slot_mapping[tokens],
            positions=None if common.positions is None else common.positions[tokens],
            is_prefilling=pick(common.is_prefilling),
            seq_lens_cpu_upper_bound=pick(common.seq_lens_cpu_upper_bound),
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        # Fast: a schedule made ahead would overwrite the whole step's, which other layers use.
        return StockPart(tokens, super().build(0, part, True))  # type: ignore[misc]


def _no_reader(*_: object) -> tuple[Tensor, Tensor]:
    raise RuntimeError(str(DenseReason.CACHE_LAYOUT))
