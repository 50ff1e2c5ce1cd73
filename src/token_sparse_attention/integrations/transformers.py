"""Switch Token Sparse Attention on in a Hugging Face model, and fully off again.

`apply` registers one attention function and one mask function under a name of its own with
transformers' attention and mask interfaces, and points the model's config at that name. No
module is patched and no modeling code is copied; what the sparse path does not cover goes to
the attention implementation that the model had before, with the mask that it had before. For
continuous batching the name has no mask function.
"""

from __future__ import annotations

import uuid
import warnings
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from token_sparse_attention.attention.causal import backends_of_layers, parse_backend
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import (
    DenseReason,
    LayerProfile,
    TokenSparseConfig,
    layer_configs,
)
from token_sparse_attention.crossover import NEVER_DENSE, break_even_of
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.inputs import check_dense_heads, check_kept
from token_sparse_attention.integrations.attention_mask import MaskLayout, read_mask
from token_sparse_attention.integrations.continuous_batching import (
    PackedCall,
    Request,
    RequestReader,
    attend_dense,
    batched_name,
    consecutive,
    is_packed,
    read_call,
    shares_prefixes,
)
from token_sparse_attention.integrations.implementation import (
    SPARSE_PREFIX,
    AttentionFunction,
    as_autocast,
    attention_of_every_layer,
    check_model,
    dense_function,
    dense_reason,
    register_dense_attention,
)
from token_sparse_attention.integrations.record import (
    LayerRecord,
    PrefillReport,
    SelectionRecord,
)
from token_sparse_attention.integrations.tensor_parallel import tensor_parallel_group
from token_sparse_attention.selection import check_impl

__all__ = ["AppliedSparsity", "apply", "attention_of_every_layer", "register_dense_attention"]


def apply(
    model: PreTrainedModel,
    config: TokenSparseConfig | LayerProfile,
    *,
    impl: str = "auto",
    attention_backend: str | PatternConfig = "auto",
    kept: float | None = None,
    continuous_batching: bool = False,
) -> AppliedSparsity:
    """Make a causal language model prefill sparsely, until removed.

    Generation, caches, padding and logits keep their meaning; only the attention of long
    prefills changes, in the chosen layers. Everything else runs on the model's own attention
    implementation, and the report says why.

    Args:
        model: a decoder-only transformers model that uses the attention interface, on the
            ``"eager"`` or ``"sdpa"`` implementation or one that `register_dense_attention`
            named. It may be compiled, dispatched over devices by accelerate, split by tensor
            parallelism (then every rank calls `apply`), or use any cache.
        config: the settings for all layers, or for its ``sparse_layers``; or a profile.
        impl: which code scores and selects, see `token_sparse_attention`.
        attention_backend: which kernel or pattern attends in the sparse layers, see
            `token_sparse_attention`. The other layers stay on the model's own implementation;
            give the model one by `register_dense_attention` to run a pattern there too.
        kept: keep this share of the tokens whatever the settings say, see
            `token_sparse_attention`; for benchmarks.
        continuous_batching: serve transformers' continuous batching, and only that: the model
            must be on ``"eager"`` or ``"sdpa"``, and other calls raise.

    Returns:
        A context manager whose value is the `PrefillReport`; or keep the object and call
        its ``remove()``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model cannot be served, already is, a layer is out of range, or
            the backend's settings are for another number of layers or heads.
        RuntimeError: after the first forward pass, if no layer called the interface.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> model = AutoModelForCausalLM.from_config(
        ...     LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=99,
        ...                 num_attention_heads=4, num_key_value_heads=2)
        ... ).eval()
        >>> config = TokenSparseConfig.published(drop_mass=0.2, window_size=16, min_tokens=32)
        >>> with apply(model, config) as report, torch.no_grad():
        ...     _ = model(torch.arange(90)[None])
        >>> [record.paths for record in report]
        [['sparse'], ['sparse']]
    """
    backend = parse_backend(attention_backend)
    check_impl(impl)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    check_model(model, continuous_batching=continuous_batching)
    text_config = model.config.get_text_config(decoder=True)
    configs = layer_configs(config, text_config.num_hidden_layers)
    for layer_config in configs.values():
        check_kept(kept, layer_config)
        check_dense_heads(layer_config, text_config.num_attention_heads)
    backends = backends_of_layers(
        backend, text_config.num_hidden_layers, text_config.num_attention_heads
    )
    return AppliedSparsity(
        model, configs, impl, backends, kept, continuous_batching=continuous_batching
    )


class AppliedSparsity:
    """Token sparse attention switched on in one model.

    Attributes:
        report: what every layer did in every prefill so far.
        name: the implementation name the model's config carries meanwhile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        configs: dict[int, TokenSparseConfig],
        impl: str,
        attention_backends: tuple[str, ...],
        kept: float | None,
        *,
        continuous_batching: bool,
    ) -> None:
        self.report = PrefillReport()
        self.name = SPARSE_PREFIX + uuid.uuid4().hex
        self._text_config = model.config.get_text_config(decoder=True)
        self._dense_name: str = self._text_config._attn_implementation
        self._modules = weakref.WeakSet(model.modules())
        self._configs = configs
        self._impl = impl
        self._attention_backends = attention_backends  # by layer
        self._kept = kept
        self._tp_group = tensor_parallel_group(model)
        self._last_mask: tuple[weakref.ref[Tensor], tuple[int, int], MaskLayout | None] | None
        self._last_mask = None
        self._requests = RequestReader()
        self._interface_called = False
        self._bypassed = False
        self._warned_of_sharing = False
        self._removed = False

        if continuous_batching:  # without a mask function: no mask
            self.name = batched_name(self.name)
        else:
            mask_function = ALL_MASK_ATTENTION_FUNCTIONS[self._dense_name]
            AttentionMaskInterface.register(self.name, mask_function)
        attend = _weakly(self._attend_paged if continuous_batching else self._attend)
        attend = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
        AttentionInterface.register(self.name, attend)
        self._text_config._attn_implementation_internal = self.name
        # The hooks keep this object as long as the model; the registry outlives both.
        self._hooks = (
            model.register_forward_pre_hook(self._forget_mask),
            model.register_forward_hook(self._check_interface_called),
        )
        self._withdraw = weakref.finalize(
            model, _withdraw, self._text_config, self.name, self._dense_name
        )

    def remove(self) -> None:
        """Give the model back as it was; doing it again changes nothing."""
        if self._removed:
            return
        self._removed = True
        for hook in self._hooks:
            hook.remove()
        self._withdraw()

    def __enter__(self) -> PrefillReport:
        if self._removed:
            raise RuntimeError("this application was removed; call apply() again")
        return self.report

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _forget_mask(self, *_: Any) -> None:
        """Before a forward pass: its mask may be the last one's tensor, with other numbers."""
        self._last_mask = None

    def _check_interface_called(self, module: nn.Module, *_: Any) -> None:
        implementation = self._text_config._attn_implementation
        if implementation != self.name:
            if not self._bypassed:
                self._bypassed = True
                warnings.warn(
                    f"the model was switched to {implementation!r}, so token sparse attention "
                    "has no effect; where continuous batching did that, call apply() with "
                    "continuous_batching=True",
                    stacklevel=2,
                )
        elif not self._interface_called:
            self.remove()
            raise RuntimeError(
                f"no layer of {type(module).__name__} called transformers' attention interface "
                "in a forward pass, so nothing ran sparse; token sparse attention was removed"
            )

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function: sparse where it applies, else the model's own."""
        if is_packed(kwargs):
            raise ValueError(
                "apply() must be called with continuous_batching=True for continuous batching, "
                "got one of its calls"
            )
        layer = getattr(module, "layer_idx", None)
        if module in self._modules and layer is not None:
            self._interface_called = True
            config = self._configs.get(layer)
            reason, detail = self._dense_reason(module, query, key, value, config, dropout, kwargs)
            if reason is None and config is not None:
                layout = self._read_mask(attention_mask, query.shape[2], key.shape[2])
                if layout is not None:
                    out = self._attend_sparse(layer, query, key, value, config, layout, scaling)
                    return out.transpose(1, 2).contiguous(), None
                reason = DenseReason.MASK
            if reason is DenseReason.GRADIENTS:
                warnings.warn(f"token sparse attention ran dense: {reason}", stacklevel=2)
            self.report.add(LayerRecord(layer, query.shape[2], key.shape[2], reason, detail))
        dense = dense_function(self._dense_name, module)
        return dense(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    def _attend_paged(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,  # noqa: ARG002  there is none
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention function of continuous batching: each request is decided for itself."""
        if not self._warned_of_sharing and shares_prefixes(kwargs):
            self._warned_of_sharing = True
            warnings.warn(
                "requests share the cached prefixes of others, which hold what those requests' "
                "selections made of them; ContinuousBatchingConfig(allow_block_sharing=False) "
                "stops it",
                stacklevel=2,
            )
        call = read_call(module, query, key, value, kwargs)
        self._interface_called = True
        out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        dense = [range(len(call.cu_seqlens_q) - 1)]
        if call.max_seqlen_q == 1:
            self.report.decode_calls += len(dense[0])
        elif module in self._modules:
            dense = consecutive(
                number
                for number, request in enumerate(self._requests(call))
                if not self._attend_request(module, call, number, request, out, scaling, dropout)
            )
        function = dense_function(self._dense_name, module)
        for numbers in dense:
            attend_dense(
                module, function, call, self._requests, numbers, out,
                scale=scaling, dropout=dropout,
            )  # fmt: skip
        return out, None

    def _attend_request(
        self,
        module: nn.Module,
        call: PackedCall,
        number: int,
        request: Request,
        out: Tensor,
        scale: float | None,
        dropout: float,
    ) -> bool:
        """Attend one request sparsely, where that applies; returns whether it did."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        config = self._configs.get(layer)
        query, key, value = request.of(call)
        lengths = (query.shape[2], key.shape[2])
        reason, detail = self._dense_reason(
            module, query, key, value, config, dropout, call.arguments
        )
        if reason is not None or config is None:
            self.report.add(LayerRecord(layer, *lengths, reason, detail, sequence=number))
            return False
        layout = MaskLayout(lengths[1], None)
        sparse = self._attend_sparse(layer, query, key, value, config, layout, scale, number)
        out[:, request.queries] = sparse.transpose(1, 2)
        return True

    def _dense_reason(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: TokenSparseConfig | None,
        dropout: float,
        kwargs: dict[str, Any],
    ) -> tuple[DenseReason | None, str]:
        """`dense_reason`, and what lengths alone decide before the mask is read."""
        reason, detail = dense_reason(module, query, key, value, config, dropout, kwargs)
        if reason is None and config is not None and self._kept is None:
            lengths = (query.shape[2], key.shape[2])
            reason = config.dense_reason(*lengths)
            reason = reason or break_even_of(config, query).dense_reason(*lengths)
        return reason, detail

    def _attend_sparse(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: TokenSparseConfig,
        layout: MaskLayout,
        scale: float | None,
        sequence: int = 0,
    ) -> Tensor:
        kv_len, padding_mask = layout
        query_len = query.shape[2]
        query, key, value = as_autocast((query, key[:, :, :kv_len], value[:, :, :kv_len]))
        output, selection = token_sparse_attention(
            query,
            key,
            value,
            config,
            padding_mask=padding_mask,
            scale=scale,
            impl=self._impl,
            attention_backend=self._attention_backends[layer],
            kept=self._kept,
            tp_group=self._tp_group,
            return_selection="lengths",
        )
        even = break_even_of(config, query) if self._kept is None else NEVER_DENSE
        selected = SelectionRecord.of(selection, config, even, query_len, kv_len, padding_mask)
        self.report.add(
            LayerRecord(layer, query_len, kv_len, selection=selected, sequence=sequence)
        )
        return output

    def _read_mask(self, mask: Tensor | None, query_len: int, kv_len: int) -> MaskLayout | None:
        """`read_mask`, done once for the mask that all layers of a forward pass share."""
        if mask is None:
            return read_mask(None, query_len, kv_len)
        lengths, last = (query_len, kv_len), self._last_mask  # another thread may change it
        if last is not None and last[0]() is mask and last[1] == lengths:
            return last[2]
        layout = read_mask(mask, query_len, kv_len)
        self._last_mask = (weakref.ref(mask), lengths, layout)
        return layout


def _weakly(method: AttentionFunction) -> AttentionFunction:
    """Return a bound method as a function that does not keep its object."""
    reference = weakref.WeakMethod(method)

    def attend(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        bound = reference()
        if bound is None:
            raise RuntimeError("the model of this application of token sparse attention is gone")
        return bound(*arguments, **named)

    return attend


def _withdraw(config: PreTrainedConfig, name: str, dense_name: str) -> None:
    """Take a name out of the config, which other models may share, and of the registries."""
    if config._attn_implementation == name:  # else it was set anew meanwhile
        config._attn_implementation_internal = dense_name
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
