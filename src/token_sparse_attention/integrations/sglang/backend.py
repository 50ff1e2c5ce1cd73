"""The attention backend: one of SGLang's, but for prompts in sparse layers.

For each batch of prompts the host decides which requests run sparse in which layers. In such a
layer each of them goes through `token_sparse_attention`, and the others go to a second backend
of the stock kind in one call, with metadata of their own. Everything else is the stock backend's.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.past_probes import PagedProbes, Pages
from token_sparse_attention.integrations.serving.attention import LayerAttention, as_batch
from token_sparse_attention.integrations.serving.counters import COUNTERS, log_layers
from token_sparse_attention.integrations.serving.layer import (
    Layer,
    check_layer,
    gates_of,
    own_part,
)
from token_sparse_attention.integrations.serving.plan import (
    Prefill,
    Split,
    StockPart,
    choose,
    list_prefills,
    reason_everywhere,
    to_device,
)
from token_sparse_attention.integrations.serving.probes import RequestProbes
from token_sparse_attention.integrations.serving.settings import selects_tokens
from token_sparse_attention.integrations.sglang.engine import (
    batch_obstacle,
    cuts_prompts,
    dense_backend,
    engine_settings,
    tensor_parallel_group,
    usable_layers,
)

_LOG = logging.getLogger("sglang.token_sparse_attention")
_STEP = "_token_sparse_attention"  # an attribute of SGLang's batches
_OF_REQUESTS = ("req_pool_indices", "seq_lens", "extend_seq_lens", "extend_prefix_lens")
_OF_REQUESTS_ON_HOST = ("seq_lens_cpu", "req_pool_indices_cpu", "orig_seq_lens")
_OF_TOKENS = ("input_ids", "positions", "out_cache_loc")


class Step(NamedTuple):
    """What the layers do in one batch.

    Attributes:
        splits: by the settings of a layer; None where all requests are the stock backend's.
        slots: where each sparse or leaving request's tokens lie in the KV pool, ``[kv_len]``
            int64, by the request's number.
        ends_prompt: whether a request of the batch may end its prompt.
    """

    splits: dict[SparseConfig, Split | None]
    slots: dict[int, Tensor]
    ends_prompt: bool


class SparsePrefills:
    """Attention to prompts, in place of a stock backend's.

    Args:
        runner: SGLang's model runner.
        stock: the stock backend's ``forward_extend``, for batches without sparse requests.
        rest: another stock backend, for the requests beside sparse ones.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is bad, or SGLang's configuration does not go with it.
    """

    def __init__(self, runner: Any, stock: Callable[..., Any], rest: Any) -> None:
        self._settings = settings = engine_settings(runner)
        self._stock = stock
        self._rest = rest
        self._pool = pool = runner.token_to_kv_pool
        self._req_to_token: Tensor = runner.req_to_token_pool.req_to_token
        self._pages = Pages(pool.page_size, (pool.size + pool.page_size,))
        tp_group, rank = tensor_parallel_group()
        self._execution = Execution(settings.impl, settings.attention_backend, tp_group=tp_group)
        self._counts = rank == 0
        self._configs, obstacles = usable_layers(settings, runner)
        self._unknown: set[str] = set()  # arguments of layers, logged once
        if self._counts:
            self._log(obstacles)
        device = self._req_to_token.device
        layers = [
            own_part(
                Layer(
                    config,
                    one.tp_q_head_num,
                    one.tp_k_head_num,
                    one.qk_head_dim,
                    pool.dtype,
                    one.scaling,
                ),
                tp_group,
            )
            for one, config in self._configs.items()
        ]
        self._gates = gates_of(self._configs.values(), layers, device)
        for layer in dict.fromkeys(layers):
            check_layer(layer, settings, device)
        nowhere = torch.zeros(0, dtype=torch.int64, device=device)
        for one, layer in zip(self._configs, layers):
            if isinstance(layer.config, KVSamplingConfig):  # now, not when memory is in use
                query, key = (
                    torch.empty(1, heads, 0, layer.head_dim, dtype=pool.dtype, device=device)
                    for heads in (layer.num_heads, layer.num_kv_heads)
                )
                probes = PagedProbes(self._pages, one.layer_id, layer.config, nowhere)
                probes.allocate(query, key)

    def _log(self, obstacles: dict[str, str]) -> None:
        if not self._configs:
            _LOG.warning("Token sparse attention is on, but no layer can run sparse")
        log_layers(_LOG, len(self._configs), obstacles)
        if selects_tokens(self._configs.values()) and cuts_prompts():
            _LOG.warning(
                "Token sparse attention: each chunk of a prompt selects for itself; with "
                "--chunked-prefill-size -1 prompts are not cut (see docs/sglang.md)"
            )

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> Any:
        """Attend to prompts and chunks of them; arguments and result as in SGLang."""
        split = self._split_of(layer, forward_batch, k, others)
        if split is None or not split.prefills:
            out = self._stock(q, k, v, layer, forward_batch, save_kv_cache, **others)
        else:
            out = self._attend(split, (q, k, v), layer, forward_batch, save_kv_cache)
        if split is not None:
            self._keep(split, q, layer, forward_batch)
        return out

    def _split_of(
        self, layer: Any, batch: Any, key: Tensor | None, others: dict[str, Any]
    ) -> Split | None:
        """Return what a layer does in a batch, None if all of it is the stock backend's.

        Args:
            layer: SGLang's.
            batch: SGLang's ForwardBatch.
            key: of the batch's tokens, None if the layer reads another one's cache.
            others: further arguments of the layer.
        """
        config = self._configs.get(layer)
        if config is None or batch.forward_mode.name not in ("EXTEND", "MIXED"):
            return None
        unknown = [name for name, value in others.items() if value is not None]
        if key is None or unknown:
            what = ", ".join(unknown) or "no keys of its own"
            if what not in self._unknown:
                self._unknown.add(what)
                reason = DenseReason.UNKNOWN_ARGUMENT
                _LOG.warning("Token sparse attention: layers stay dense: %s: %s", reason, what)
            return None
        step: Step | None = getattr(batch, _STEP, None)
        if step is None:
            step = self._plan(batch)
            setattr(batch, _STEP, step)
        return step.splits[config]

    def _plan(self, batch: Any) -> Step:
        if self._counts:
            COUNTERS.report(_LOG.info, self._settings.log_interval)
        lengths = list(map(int, batch.extend_seq_lens_cpu))
        starts = list(accumulate(lengths, initial=0))
        kv_lens = [int(n) + own for n, own in zip(batch.extend_prefix_lens_cpu, lengths)]
        prefills = list_prefills(starts, kv_lens, None, 1)
        obstacle = batch_obstacle(batch)
        splits: dict[SparseConfig, Split | None] = {}
        stock_parts: dict[tuple[int, ...], StockPart | None] = {}  # by the sparse requests
        slots: dict[int, Tensor] = {}
        choices = []
        for config in dict.fromkeys(self._configs.values()):
            choice = choose(prefills, [obstacle] * len(prefills), config, self._gates[config])
            choices.append(choice)
            leaving = [] if obstacle else choice.leaving
            for prefill in choice.sparse + leaving:
                if prefill.request not in slots:
                    slots[prefill.request] = self._slots(batch, prefill)
            stock = None
            if choice.sparse:
                sparse = tuple(prefill.request for prefill in choice.sparse)
                if sparse not in stock_parts:
                    stock_parts[sparse] = self._stock_part(batch, sparse, starts, kv_lens)
                stock = stock_parts[sparse]
            used = choice.sparse or leaving
            splits[config] = Split(config, choice.sparse, stock, leaving) if used else None
        if self._counts:
            for number in range(len(prefills)):
                COUNTERS.add_prefill(reason_everywhere(choices, number))
        return Step(splits, slots, batch.contains_last_prefill_chunk)

    def _slots(self, batch: Any, prefill: Prefill) -> Tensor:
        row = batch.req_pool_indices[prefill.request : prefill.request + 1]
        return self._req_to_token[:, : prefill.kv_len].index_select(0, row)[0].long()

    def _stock_part(
        self, batch: Any, sparse: tuple[int, ...], starts: list[int], kv_lens: list[int]
    ) -> StockPart | None:
        """Return the requests that are not `sparse`, with a batch of their own."""
        others = [
            request
            for request in range(len(kv_lens))
            if request not in sparse and starts[request + 1] > starts[request]
        ]
        if not others:
            return None
        device = batch.out_cache_loc.device
        spans = [torch.arange(*starts[request : request + 2]) for request in others]
        tokens, on_host = to_device(torch.cat(spans), device), torch.tensor(others)
        on_device = to_device(on_host, device)
        part = copy.copy(batch)
        for name in _OF_REQUESTS + _OF_REQUESTS_ON_HOST:
            value = getattr(batch, name)
            if value is not None:
                setattr(part, name, value[on_device if value.device == device else on_host])
        for name in _OF_TOKENS:
            value = getattr(batch, name)
            if value is not None:
                setattr(part, name, value[tokens])
        lengths = [len(span) for span in spans]
        part.batch_size = len(others)
        part.extend_num_tokens = len(tokens)
        part.seq_lens_sum = sum(kv_lens[request] for request in others)
        part.extend_seq_lens_cpu = lengths
        part.extend_prefix_lens_cpu = [
            kv_lens[request] - length for request, length in zip(others, lengths)
        ]
        part.extend_start_loc = to_device(
            torch.tensor(list(accumulate(lengths, initial=0))[:-1], dtype=torch.int32), device
        )
        self._rest.init_forward_metadata(part)
        return StockPart(tokens, (part, self._rest.forward_metadata))

    def _attend(
        self,
        split: Split,
        tensors: tuple[Tensor, Tensor, Tensor],
        layer: Any,
        batch: Any,
        saves: bool,
    ) -> Tensor:
        """Attend in a layer with sparse requests.

        Args:
            split: what the layer does.
            tensors: query, key and value of the batch's tokens, as SGLang gives them.
            layer: SGLang's.
            batch: SGLang's ForwardBatch.
            saves: whether keys and values are to be written to the KV pool; else they are there.

        Returns:
            ``[T, H * D]``.
        """
        if saves:
            self._write(layer, batch, tensors)
        query, key, value = tensors
        step: Step = getattr(batch, _STEP)
        heads = query.view(len(query), layer.tp_q_head_num, layer.qk_head_dim)
        output = torch.empty_like(heads)
        how = LayerAttention(split.config, layer.scaling, self._execution, self._counts)
        for prefill in split.prefills:
            part = slice(prefill.start, prefill.stop)
            slots = step.slots[prefill.request]
            if prefill.whole and saves:
                keys, values = (self._heads(one[part], layer) for one in (key, value))
            else:
                keys, values = (
                    as_batch(buffer(layer.layer_id)[slots])
                    for buffer in (self._pool.get_key_buffer, self._pool.get_value_buffer)
                )
            probes = self._probes(split.config, layer, prefill, slots)
            how.attend(heads[part], keys, values, output[part], probes, step.ends_prompt)
            if probes is not None:
                probes.keep(as_batch(heads[part]), keys[:, :, -prefill.query_len :])
        if split.stock is not None:
            tokens, (rest, metadata) = split.stock
            self._rest.forward_metadata = metadata
            given = (one[tokens] for one in tensors)
            out = self._rest.forward_extend(*given, layer, rest, save_kv_cache=False)
            output[tokens] = out.view(len(tokens), *output.shape[1:])
        return output.flatten(1)

    def _keep(self, split: Split, query: Tensor, layer: Any, batch: Any) -> None:
        """Keep the probes of requests that run dense; their keys are in the KV pool."""
        step: Step = getattr(batch, _STEP)
        heads = query.view(len(query), layer.tp_q_head_num, layer.qk_head_dim)
        for prefill in split.leaving:
            slots = step.slots[prefill.request]
            probes = self._probes(split.config, layer, prefill, slots)
            if probes is not None:
                own = self._pool.get_key_buffer(layer.layer_id)[slots[-prefill.query_len :]]
                probes.keep(as_batch(heads[prefill.start : prefill.stop]), as_batch(own))

    def _probes(
        self, config: SparseConfig, layer: Any, prefill: Prefill, slots: Tensor
    ) -> RequestProbes | None:
        if not isinstance(config, KVSamplingConfig):
            return None
        return RequestProbes(PagedProbes(self._pages, layer.layer_id, config, slots), prefill)

    def _write(self, layer: Any, batch: Any, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        location = KVWriteLoc(batch.out_cache_loc, None)
        self._pool.set_kv_buffer(layer, location, *tensors[1:])

    @staticmethod
    def _heads(tokens: Tensor, layer: Any) -> Tensor:
        """View ``[T, H_kv * D]`` or ``[T, H_kv, D]`` as ``[1, H_kv, T, D]``."""
        return as_batch(tokens.view(len(tokens), layer.tp_k_head_num, layer.qk_head_dim))


def create_backend(runner: Any) -> Any:
    """Return SGLang's own backend, with long prefills sparse where the settings say so.

    Args:
        runner: SGLang's model runner.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is bad, or SGLang's configuration does not go with it.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    create = ATTENTION_BACKENDS[dense_backend(runner)]
    backend = create(runner)
    sparse = SparsePrefills(runner, backend.forward_extend, create(runner))
    backend.forward_extend = sparse.forward_extend
    return backend
