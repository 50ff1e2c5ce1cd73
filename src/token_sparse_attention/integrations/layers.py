"""What the attention layers of one model do under `apply`: sparse where it applies, else dense."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.inputs import AuxRequest, Chunk
from token_sparse_attention.integrations.attention_mask import MaskLayout, read_mask
from token_sparse_attention.integrations.continuous_batching import (
    PackedCall,
    Request,
    RequestReader,
    attend_dense,
    consecutive,
    is_packed,
    read_call,
    shares_prefixes,
)
from token_sparse_attention.integrations.implementation import dense_function
from token_sparse_attention.integrations.obstacles import LayerCall, as_autocast, obstacle
from token_sparse_attention.integrations.past_probes import (
    CacheProbes,
    PagedProbes,
    Probes,
    Store,
    cache_among,
    store_of,
)
from token_sparse_attention.integrations.record import (
    LayerRecord,
    PrefillReport,
    SelectionRecord,
)
from token_sparse_attention.methods import method_of

# Calls that run dense for these reasons are parts of prompts that later calls may continue.
_TOO_SHORT = (DenseReason.SHORT_CHUNK, DenseReason.SHORT_CONTEXT, DenseReason.CROSSOVER_LENGTH)


class _Part(NamedTuple):
    """What is known of a part of a prompt beside its tensors.

    Attributes:
        layout: where its tokens lie.
        probes: where its probes are kept; None if they are not.
        ends_prompt: see `Chunk`.
        sequence: number of the sequence in a packed call.
    """

    layout: MaskLayout
    probes: Probes | None
    ends_prompt: bool
    sequence: int = 0


class _Pass(threading.local):
    """What a thread's forward pass is, which others' passes through the model must not change.

    Attributes:
        number: of the pass; None outside one, where layers are called without the model.
        last: outside a pass, the layer, the sequence and the pass of the last record.
        last_mask: the last mask as an object, the lengths it was read for, and its layout.
        last_positions: of how many last positions the caller wants the logits.
        store: what the cache keeps; None if it keeps no probes.
        cache: the cache that the model was given.
        recomputed: whether the backward pass runs the layers again, with gradients.
        ends_prompt: whether the calls' last queries are those of their prompts.
    """

    number: int | None = None
    last: tuple[int, int, int] = (0, 0, 0)
    last_mask: tuple[weakref.ref[Tensor], tuple[int, int], MaskLayout | None] | None = None
    last_positions: int = 0
    store: Store | None = None
    cache: object = None
    recomputed: bool = False
    ends_prompt: bool = True


class SparseLayers:
    """The layers of one model under `apply`.

    Args:
        configs: the settings of the sparse layers, by number.
        executions: how each of these runs.
        dense_name: the attention implementation that the model had before.
        record_tokens: whether the report lists the tokens that were chosen.

    Attributes:
        report: what every layer did in every prefill so far.
        called: numbers of the layers that called the attention interface.
        current: the forward pass of the thread that asks.
    """

    def __init__(
        self,
        configs: Mapping[int, SparseConfig],
        executions: Mapping[int, Execution],
        dense_name: str,
        *,
        record_tokens: bool = False,
    ) -> None:
        self._aux = AuxRequest(selection=True, indices=record_tokens)
        self.report = PrefillReport()
        self.called: set[int] = set()
        self._configs = configs
        self._executions = executions
        self._dense_name = dense_name
        self._gates: dict[tuple[int, torch.device], Gate] = {}
        self.current = _Pass()
        self._passes = itertools.count(1)
        self._requests = RequestReader()
        self._warned_of_sharing = False

    def begin_pass(
        self, logits_to_keep: object, cache: object, *, use_cache: bool, recomputed: bool
    ) -> None:
        """Prepare for a forward pass of the model.

        Its mask may be the last pass's tensor with other numbers.

        Args:
            logits_to_keep: of how many last positions the caller wants the logits. Generation
                asks for more than one only where it verifies draft tokens, which assisted and
                prompt lookup decoding append to what is to be read.
            cache: the pass's cache; None if there is none, or the model is to make it.
            use_cache: whether the model may make one.
            recomputed: whether the backward pass will run the layers again, with gradients.
        """
        now = self.current
        now.number = next(self._passes)
        now.last_mask = None
        now.last_positions = logits_to_keep if isinstance(logits_to_keep, int) else 0
        now.recomputed = recomputed
        now.store, now.cache = None, cache
        if any(isinstance(config, KVSamplingConfig) for config in self._configs.values()):
            now.store = store_of(cache) if cache is not None else {} if use_cache else None

    def end_pass(self, output: object) -> None:
        """Finish a forward pass; what is called without the model begins afresh.

        Args:
            output: the model's, with the cache that it made; None if the pass failed.
        """
        now = self.current
        kept, now.store, now.cache = now.store, None, None
        now.number, now.last_mask, now.last_positions, now.recomputed = None, None, 0, False
        store = store_of(cache_among(output)) if kept else None
        if kept and store is not None and store is not kept:
            store.update(kept)

    def _record(self, record: LayerRecord) -> None:
        """Add a record, with its forward pass."""
        now = self.current
        number = now.number
        if number is None:  # without the model, a pass begins where layers begin again
            position, number = (record.layer, record.sequence), now.last[2]
            if position <= now.last[:2]:
                number = next(self._passes)
            now.last = (*position, number)
        self.report.add(dataclasses.replace(record, forward_pass=number))

    def attend(self, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Attend one call: ``[B, S_q, H, D]``, and what weights the model's own function gives."""
        if is_packed(call.arguments):
            raise ValueError(
                "apply() must be called with continuous_batching=True for continuous batching, "
                "got one of its calls"
            )
        layer: int | None = getattr(call.module, "layer_idx", None)
        if layer is None:
            return call.run(dense_function(self._dense_name, call.module))
        self.called.add(layer)
        drafts = self._draft_len(call)
        lengths = (call.query_len - drafts, call.kv_len - drafts)
        reason, detail = self._dense_reason(layer, call, *lengths)
        probes, layout = None, None
        sampling, store = self._sampling(layer, reason), self.current.store
        if sampling is not None and store is not None:
            probes = CacheProbes(store, layer, sampling)
        if reason is None or probes is not None:
            layout = self._read_mask(call.mask, drafts, call.query_len, call.kv_len)
        if layout is not None:
            prompt = call._replace(query=call.query[:, :, : lengths[0]])
            part = _Part(layout, probes, self.current.ends_prompt)
            if reason is None:
                out = self._attend_sparse(layer, prompt, part).transpose(1, 2)
                if drafts:
                    out = torch.cat((out, self._attend_drafts(call, layout, drafts)), dim=1)
                return out.contiguous(), None
            _keep_probes(prompt, part)
        reason = reason or DenseReason.MASK
        if reason is DenseReason.GRADIENTS:
            warnings.warn(f"token sparse attention ran dense: {reason}", stacklevel=2)
        self._record(LayerRecord(layer, call.query_len, call.kv_len, reason, detail))
        return call.run(dense_function(self._dense_name, call.module))

    def _draft_len(self, call: LayerCall) -> int:
        """Return how many of the last queries are draft tokens, which are no part of a prompt.

        A pass that verifies n drafts wants the logits of n + 1 positions. Where these are all
        positions, and the cache is empty, they are those of a prompt.
        """
        wanted, query_len = self.current.last_positions, call.query_len
        if wanted < 2 or (wanted >= query_len and call.kv_len == query_len):
            return 0
        return min(wanted, query_len) - 1

    def attend_packed(self, call: LayerCall) -> tuple[Tensor, None]:
        """Attend one call of continuous batching; each request is decided for itself."""
        # From transformers 5.24 on only the model is given it.
        cache = call.arguments.get("cache", self.current.cache)
        selects = any(not isinstance(one, KVSamplingConfig) for one in self._configs.values())
        if selects and not self._warned_of_sharing and shares_prefixes(cache):
            self._warned_of_sharing = True
            warnings.warn(
                "requests share the cached prefixes of others, which hold what those requests' "
                "selections made of them; ContinuousBatchingConfig(allow_block_sharing=False) "
                "stops it",
                stacklevel=2,
            )
        packed = read_call(call, cache)
        query, value = packed.call.query, packed.call.value
        out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        dense = [range(len(packed.cu_seqlens_q) - 1)]
        layer: int | None = getattr(call.module, "layer_idx", None)
        if packed.max_seqlen_q == 1:
            self.report.decode_calls += len(dense[0])
        elif layer is not None:
            dense = consecutive(
                number
                for number, request in enumerate(self._requests(packed))
                if not self._attend_request(layer, packed, number, request, out)
            )
        if layer is not None:
            self.called.add(layer)
        function = dense_function(self._dense_name, call.module)
        for numbers in dense:
            attend_dense(packed, function, self._requests, numbers, out)
        return out, None

    def _attend_request(
        self, layer: int, packed: PackedCall, number: int, request: Request, out: Tensor
    ) -> bool:
        """Attend one request sparsely, where that applies; returns whether it did."""
        call = request.of(packed)
        lengths = (call.query_len, call.kv_len)
        reason, detail = self._dense_reason(layer, call, *lengths)
        probes, sampling = None, self._sampling(layer, reason)
        if sampling is not None and packed.slots is not None:
            slots = packed.slots[request.keys]
            probes = PagedProbes(packed.pages, layer, sampling, slots)
        ends_prompt = self.current.ends_prompt and request.ends_prompt
        part = _Part(MaskLayout(call.kv_len, None), probes, ends_prompt, number)
        if reason is not None:
            _keep_probes(call, part)
            self._record(LayerRecord(layer, *lengths, reason, detail, sequence=number))
            return False
        out[:, request.queries] = self._attend_sparse(layer, call, part).transpose(1, 2)
        return True

    def _sampling(self, layer: int, reason: DenseReason | None) -> KVSamplingConfig | None:
        """Return a layer's settings if it samples, and its call is a part of a prompt.

        Args:
            layer: its number.
            reason: why the call runs dense, None if it does not.
        """
        config = self._configs.get(layer)
        a_part = reason is None or reason in _TOO_SHORT
        return config if a_part and isinstance(config, KVSamplingConfig) else None

    def _dense_reason(
        self, layer: int, call: LayerCall, query_len: int, kv_len: int
    ) -> tuple[DenseReason | None, str]:
        """Return why a call runs dense before its mask is read, and what that was met on.

        Args:
            layer: its number.
            call: the call.
            query_len: its queries without drafts.
            kv_len: its keys without drafts, at least those of its longest sequence.
        """
        if call.query_len == 1:
            return DenseReason.DECODE, ""
        config = self._configs.get(layer)
        if config is None:
            return DenseReason.LAYER_NOT_SELECTED, ""
        if query_len <= 1:
            return DenseReason.DRAFTS, ""
        reason, detail = obstacle(call)
        if reason is None and self.current.recomputed:
            reason = DenseReason.GRADIENTS
        if reason is None:
            reason = self._gate(layer, config, call.query).reason(query_len, kv_len)
        return reason, detail

    def _gate(self, layer: int, config: SparseConfig, query: Tensor) -> Gate:
        """Return the layer's gate; it is made once per device."""
        known = (layer, query.device)
        if known not in self._gates:
            method = method_of(config)
            self._gates[known] = method.gate(query.device, query.shape[1], query.shape[3])
        return self._gates[known]

    def _attend_sparse(self, layer: int, call: LayerCall, part: _Part) -> Tensor:
        """Return the operator's output ``[B, H, S_q, D]`` for a part of prompts, and record it."""
        kv_len, padding_mask = part.layout
        query, key, value = as_autocast(
            (call.query, call.key[:, :, :kv_len], call.value[:, :, :kv_len])
        )
        past = None
        if part.probes is not None:
            past = part.probes.recall(query, call.key, part.layout)
        config = self._configs[layer]
        output, selection, _ = token_sparse_attention(
            query,
            key,
            value,
            config,
            padding_mask=padding_mask,
            scale=call.scale,
            execution=self._executions[layer],
            chunk=Chunk(past, part.ends_prompt),
            return_aux=self._aux,
        )
        _keep_probes(call, part)
        assert selection is not None
        record = SelectionRecord.of(selection, kv_len, padding_mask)
        lengths = (query.shape[2], kv_len)
        self._record(
            LayerRecord(layer, *lengths, selection=record, config=config, sequence=part.sequence)
        )
        return output

    def _attend_drafts(self, call: LayerCall, layout: MaskLayout, drafts: int) -> Tensor:
        """Return dense attention of the last queries ``[B, drafts, H, D]``."""
        last = call._replace(query=call.query[:, :, -drafts:])
        if call.mask is not None:
            last = last._replace(mask=call.mask[:, :, -drafts:])
            return last.run(dense_function(self._dense_name, call.module))[0]
        used = layout.kv_len + drafts
        query, key, value = as_autocast(
            (last.query, last.key[:, :, :used], last.value[:, :, :used])
        )
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        dense = resolve_backend("auto", query, key)
        return dense.attend(query, key, value, scale=scale).out.transpose(1, 2)

    def _read_mask(
        self, mask: Tensor | None, drafts: int, query_len: int, kv_len: int
    ) -> MaskLayout | None:
        """`read_mask` without the drafts' queries, done once for all layers of a forward pass."""
        prompt_len = query_len - drafts
        if mask is None:
            return read_mask(None, prompt_len, kv_len)
        lengths, last = (prompt_len, kv_len), self.current.last_mask
        if last is not None and last[0]() is mask and last[1] == lengths:
            return last[2]
        fits = mask.dim() == 4 and mask.shape[2] == query_len
        prompt = mask[:, :, :prompt_len] if drafts and fits else mask
        layout = read_mask(prompt, prompt_len, kv_len)
        self.current.last_mask = (weakref.ref(mask), lengths, layout)
        return layout


def _keep_probes(call: LayerCall, part: _Part) -> None:
    """Keep the probes of a call without drafts, where its cache keeps any."""
    if part.probes is not None:
        (query,) = as_autocast((call.query,))
        part.probes.keep(query, call.key, part.layout)
