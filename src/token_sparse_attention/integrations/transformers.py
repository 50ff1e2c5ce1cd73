"""Switch Token Sparse Attention on in a Hugging Face model, and fully off again.

`apply` registers one attention function and one mask function under a name of its own with
transformers' attention and mask interfaces, and points the model's config at that name. No
module is patched and no modeling code is copied; what the sparse path does not cover goes to
the attention implementation that the model had before, with the mask that it had before.
"""

from __future__ import annotations

import sys
import uuid
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from token_sparse_attention.attention.backends import check_backend
from token_sparse_attention.attention.dense import causal_attention
from token_sparse_attention.config import (
    DenseReason,
    LayerProfile,
    TokenSparseConfig,
    layer_configs,
)
from token_sparse_attention.crossover import NEVER_DENSE, break_even
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.inputs import check_kept
from token_sparse_attention.integrations.attention_mask import MaskLayout, read_mask
from token_sparse_attention.integrations.record import (
    LayerRecord,
    PrefillReport,
    SelectionRecord,
)
from token_sparse_attention.selection import check_impl

_NAME_PREFIX = "tsa_"  # must contain neither "flash" nor "sdpa", which transformers interprets
_DENSE_PREFIX = "dense_"  # of the names that `register_dense_attention` gives
_DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
# Arguments that change nothing about attention itself. Any other one that is set, and that
# `_dense_reason` does not read, sends the layer to the model's own implementation.
_NEUTRAL_ARGUMENTS = frozenset(
    {
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "softcap",
        "s_aux",
        "use_cache",
    }
)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def apply(
    model: PreTrainedModel,
    config: TokenSparseConfig | LayerProfile,
    *,
    impl: str = "auto",
    attention_backend: str = "auto",
    kept: float | None = None,
) -> AppliedSparsity:
    """Make a causal language model prefill sparsely, until removed.

    Generation, caches, padding and logits keep their meaning; only the attention of long
    prefills changes, in the chosen layers. Everything else runs on the model's own attention
    implementation, and the report says why.

    Args:
        model: a decoder-only transformers model that uses the attention interface, on the
            ``"eager"`` or ``"sdpa"`` implementation or one that `register_dense_attention`
            named. It may be compiled, dispatched over devices by accelerate, or use any cache.
        config: the settings for all layers, or for its ``sparse_layers``; or a profile.
        impl: which code scores and selects, see `token_sparse_attention`.
        attention_backend: which kernel attends, see `token_sparse_attention`.
        kept: keep this share of the tokens whatever the settings say, see
            `token_sparse_attention`; for benchmarks.

    Returns:
        A context manager whose value is the `PrefillReport`; or keep the object and call
        its ``remove()``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model cannot be served, already is, or a layer is out of range.
        RuntimeError: after the first forward pass, if no layer called the interface.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> model = AutoModelForCausalLM.from_config(
        ...     LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=99,
        ...                 num_attention_heads=4, num_key_value_heads=2)
        ... ).eval()
        >>> config = TokenSparseConfig(
        ...     drop_mass=0.2, window_size=16, min_tokens=32, crossover="off"
        ... )
        >>> with apply(model, config) as report, torch.no_grad():
        ...     _ = model(torch.arange(90)[None])
        >>> [record.paths for record in report]
        [['sparse'], ['sparse']]
    """
    check_backend(attention_backend)
    check_impl(impl)
    check_kept(kept)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    _check_model(model)
    text_config = model.config.get_text_config(decoder=True)
    configs = layer_configs(config, text_config.num_hidden_layers)
    return AppliedSparsity(model, configs, impl, attention_backend, kept)


def register_dense_attention(attention_backend: str = "auto") -> str:
    """Register dense attention by this library's kernels, for models to run on.

    Causal prefills without a mask run on `attention_backend`; whatever else a model asks for
    goes to transformers' ``"sdpa"``. With flash-attn-4 that makes dense layers of long
    prompts faster too; `apply` can be used on top.

    Args:
        attention_backend: which kernel attends, see `token_sparse_attention`.

    Returns:
        The implementation's name, for ``from_pretrained(..., attn_implementation=name)`` or
        ``model.set_attn_implementation(name)``.

    Raises:
        ValueError: if the backend's name is unknown.

    Example:
        >>> register_dense_attention("math")
        'dense_math'
    """
    check_backend(attention_backend)
    # transformers interprets "flash" in a name.
    name = _DENSE_PREFIX + attention_backend.replace("flash", "fa2")

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        config = TokenSparseConfig(min_tokens=0, window_size=1)
        reason, _ = _dense_reason(module, query, key, value, config, dropout, kwargs)
        if reason or attention_mask is not None or query.shape[2] != key.shape[2]:
            return _dense_function("sdpa", module)(
                module,
                query,
                key,
                value,
                attention_mask,
                scaling=scaling,
                dropout=dropout,
                **kwargs,
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = causal_attention(query, key, value, scale=scale, backend=attention_backend)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be decoder-only, but {kind} is an encoder-decoder model")
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise ValueError(
            f"model must use transformers' attention interface, which {kind} does not support"
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise ValueError(
            "model must not be split by tensor parallelism, whose ranks would select "
            f"different tokens; got tp_size {model._tp_size}"
        )
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation.startswith(_NAME_PREFIX):
        raise ValueError(
            "model already runs token sparse attention; remove() the first application before "
            "applying again (models built on one config object share it)"
        )
    if implementation not in _DENSE_IMPLEMENTATIONS and not implementation.startswith(
        _DENSE_PREFIX
    ):
        raise ValueError(
            f"model must run one of the attention implementations "
            f"{', '.join(_DENSE_IMPLEMENTATIONS)}, got {implementation!r}; call "
            "model.set_attn_implementation('sdpa') first"
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
        attention_backend: str,
        kept: float | None,
    ) -> None:
        self.report = PrefillReport()
        self.name = _NAME_PREFIX + uuid.uuid4().hex
        self._text_config = model.config.get_text_config(decoder=True)
        self._dense_name: str = self._text_config._attn_implementation
        self._modules = weakref.WeakSet(model.modules())
        self._configs = configs
        self._impl = impl
        self._attention_backend = attention_backend
        self._kept = kept
        self._last_mask: tuple[weakref.ref[Tensor], tuple[int, int], MaskLayout | None] | None
        self._last_mask = None
        self._interface_called = False
        self._removed = False

        attend = torch.compiler.disable(self._attend)  # type: ignore[no-untyped-call]
        AttentionInterface.register(self.name, attend)
        AttentionMaskInterface.register(self.name, ALL_MASK_ATTENTION_FUNCTIONS[self._dense_name])
        self._text_config._attn_implementation_internal = self.name
        self._hook = model.register_forward_hook(self._check_interface_called)

    def remove(self) -> None:
        """Give the model back as it was; doing it again changes nothing."""
        if self._removed:
            return
        self._removed = True
        self._hook.remove()
        if self._text_config._attn_implementation == self.name:  # else it was set anew meanwhile
            self._text_config._attn_implementation_internal = self._dense_name
        AttentionInterface._global_mapping.pop(self.name, None)
        AttentionMaskInterface._global_mapping.pop(self.name, None)

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

    def _check_interface_called(self, module: nn.Module, *_: Any) -> None:
        if not self._interface_called:
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
        layer = getattr(module, "layer_idx", None)
        if module in self._modules and layer is not None:
            self._interface_called = True
            config = self._configs.get(layer)
            reason, detail = _dense_reason(module, query, key, value, config, dropout, kwargs)
            if reason is None and config is not None and self._kept is None:
                lengths = (query.shape[2], key.shape[2])
                reason = config.dense_reason(*lengths)
                reason = reason or break_even(config, query).dense_reason(*lengths)
            if reason is None and config is not None:
                layout = self._read_mask(attention_mask, query.shape[2], key.shape[2])
                if layout is not None:
                    out = self._attend_sparse(layer, query, key, value, config, layout, scaling)
                    return out.transpose(1, 2).contiguous(), None
                reason = DenseReason.MASK
            if reason is DenseReason.GRADIENTS:
                warnings.warn(f"token sparse attention ran dense: {reason}", stacklevel=2)
            self.report.add(LayerRecord(layer, query.shape[2], key.shape[2], reason, detail))
        dense = _dense_function(self._dense_name, module)
        return dense(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    def _attend_sparse(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: TokenSparseConfig,
        layout: MaskLayout,
        scale: float | None,
    ) -> Tensor:
        kv_len, padding_mask = layout
        query_len = query.shape[2]
        output, selection = token_sparse_attention(
            query,
            key[:, :, :kv_len],
            value[:, :, :kv_len],
            config,
            padding_mask=padding_mask,
            scale=scale,
            impl=self._impl,
            attention_backend=self._attention_backend,
            kept=self._kept,
            return_selection=True,
        )
        if padding_mask is None:
            query_lens, kv_lens = (
                selection.lengths.new_full((len(query),), length) for length in (query_len, kv_len)
            )
        else:
            query_lens = padding_mask[:, kv_len - query_len :].sum(-1)
            kv_lens = padding_mask.sum(-1)
        budget = selection.lengths if selection.budget is None else selection.budget
        even = break_even(config, query) if self._kept is None else NEVER_DENSE
        selected = SelectionRecord(
            config, selection.lengths, selection.ran_sparse, query_lens, kv_lens, budget, even
        )
        self.report.add(LayerRecord(layer, query_len, kv_len, selection=selected))
        return output

    def _read_mask(self, mask: Tensor | None, query_len: int, kv_len: int) -> MaskLayout | None:
        """`read_mask`, done once for the mask that all layers of a forward pass share."""
        if mask is None:
            return read_mask(None, query_len, kv_len)
        lengths = (query_len, kv_len)
        if self._last_mask and self._last_mask[0]() is mask and self._last_mask[1] == lengths:
            return self._last_mask[2]
        layout = read_mask(mask, query_len, kv_len)
        self._last_mask = (weakref.ref(mask), lengths, layout)
        return layout


def _dense_reason(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[DenseReason | None, str]:
    """Return why this call cannot run sparse, and on what; (None, "") if it may."""
    if query.shape[2] == 1:
        return DenseReason.DECODE, ""
    if config is None:
        return DenseReason.LAYER_NOT_SELECTED, ""
    is_causal = kwargs.get("is_causal")
    window = kwargs.get("sliding_window")
    wants_weights = kwargs.get(
        "output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)
    )
    records_gradients = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value)
    )
    obstacles = {
        DenseReason.NOT_CAUSAL: not (
            getattr(module, "is_causal", True) if is_causal is None else is_causal
        ),
        DenseReason.SLIDING_WINDOW: window is not None and window < key.shape[2],
        DenseReason.SOFT_CAP: kwargs.get("softcap") is not None,
        DenseReason.ATTENTION_SINKS: kwargs.get("s_aux") is not None,
        DenseReason.DROPOUT: dropout > 0,
        DenseReason.GRADIENTS: records_gradients,
        DenseReason.ATTENTION_WEIGHTS: bool(wants_weights),
        DenseReason.HEAD_DIM: value.shape != key.shape,
    }
    for reason, stands in obstacles.items():
        if stands:
            return reason, ""
    for name, argument in kwargs.items():
        if name not in _NEUTRAL_ARGUMENTS and argument is not None and argument is not False:
            return DenseReason.UNKNOWN_ARGUMENT, name
    return None, ""


def _dense_function(name: str, module: nn.Module) -> AttentionFunction:
    """Return the function that `module` would call under implementation `name`."""
    if name != "eager":
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[name]
        return function
    for cls in type(module).__mro__:
        eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager  # type: ignore[no-any-return]
    raise RuntimeError(
        f"{type(module).__name__} has no eager attention function to run dense with; call "
        "model.set_attn_implementation('sdpa') before apply()"
    )
