"""Switch Token Sparse Attention on in a Hugging Face model, and fully off again.

`apply` registers one attention function and one mask function with transformers' attention
and mask interfaces, and points the model's config at their name. The function finds what it
is to do by the module that calls it, so all applications on the same dense implementation
share it and its name, and a compiled model is not compiled again for another one. No module
is patched and no modeling code is copied; what the sparse path does not cover goes to the
attention implementation that the model had before, with the mask that it had before. For
continuous batching the name has no mask function.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from token_sparse_attention.attention.names import backends_of_layers, parse_backend
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.impls import check_impl
from token_sparse_attention.inputs import check_dense_heads
from token_sparse_attention.integrations.continuous_batching import batched_name
from token_sparse_attention.integrations.implementation import (
    attention_of_every_layer,
    register_dense_attention,
)
from token_sparse_attention.integrations.layers import SparseLayers
from token_sparse_attention.integrations.obstacles import (
    SPARSE_PREFIX,
    AttentionFunction,
    check_model,
    layer_call,
    unwrapped,
)
from token_sparse_attention.integrations.past_probes import cache_among
from token_sparse_attention.integrations.record import PrefillReport
from token_sparse_attention.integrations.tensor_parallel import tensor_parallel_group
from token_sparse_attention.profile import LayerProfile, layer_configs

__all__ = ["AppliedSparsity", "apply", "attention_of_every_layer", "register_dense_attention"]


def apply(
    model: nn.Module,
    config: SparseConfig | LayerProfile,
    *,
    impl: str = "auto",
    attention_backend: str | PatternConfig = "auto",
    continuous_batching: bool = False,
    record_tokens: bool = False,
) -> AppliedSparsity:
    """Make a causal language model prefill sparsely, until removed.

    Generation, caches, padding and logits keep their meaning; only the attention of long
    prefills changes, in the chosen layers. Everything else runs on the model's own attention
    implementation, and the report says why. Where the caller wants the logits of n > 1 last
    positions (``logits_to_keep``), as assisted and prompt lookup decoding do, the last n - 1
    tokens count as decoded: they attend densely, and what precedes them is the prompt.

    A deep copy of the model is what the model was before.

    Args:
        model: a decoder-only transformers model that uses the attention interface, on the
            ``"eager"`` or ``"sdpa"`` implementation or one that `register_dense_attention`
            named. It may be compiled, wrapped by PEFT, dispatched over devices by accelerate,
            split by tensor parallelism (then every rank calls `apply`), or use any cache.
        config: the settings for all layers, or for its ``sparse_layers``; or a profile.
        impl: which code scores and chooses, see `Execution`.
        attention_backend: which kernel or pattern attends in the sparse layers, see
            `Execution`. The other layers stay on the model's own implementation;
            give the model one by `register_dense_attention` to run a pattern there too.
        continuous_batching: serve transformers' continuous batching, and only that: the model
            must be on ``"eager"`` or ``"sdpa"``, and other calls raise.
        record_tokens: record which tokens were chosen for each head, and not only how many: 8
            bytes per layer, head and token.

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
        >>> config = KVSamplingConfig(
        ...     block_size=32, num_probes=8, sliding_window=32, num_samples=8, crossover="off"
        ... )
        >>> with apply(model, config) as report, torch.no_grad():
        ...     _ = model(torch.arange(90)[None])
        >>> [record.paths for record in report]
        [['sparse'], ['sparse']]
    """
    backend = parse_backend(attention_backend)
    check_impl(impl)
    model, around = unwrapped(model)
    check_model(model, continuous_batching=continuous_batching)
    text_config = model.config.get_text_config(decoder=True)
    num_layers, num_heads = text_config.num_hidden_layers, text_config.num_attention_heads
    configs = layer_configs(config, num_layers)
    for layer_config in configs.values():
        check_dense_heads(layer_config, num_heads)
    backends = backends_of_layers(backend, num_layers, num_heads)
    tp_group = tensor_parallel_group(model)
    executions = {layer: Execution(impl, backends[layer], tp_group=tp_group) for layer in configs}
    dense_name: str = text_config._attn_implementation
    layers = SparseLayers(configs, executions, dense_name, record_tokens=record_tokens)
    named = isinstance(config, LayerProfile) or config.sparse_layers is not None
    named_layers = set(configs) if named else set()
    return AppliedSparsity(
        model, around, layers, named_layers, continuous_batching=continuous_batching
    )


class AppliedSparsity:
    """Token sparse attention switched on in one model.

    Attributes:
        report: what every layer did in every prefill so far.
        name: the implementation name the model's config carries meanwhile.
        layers: what the model's layers do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        around: Sequence[nn.Module],
        layers: SparseLayers,
        named_layers: set[int],
        *,
        continuous_batching: bool,
    ) -> None:
        self.report = layers.report
        self.layers = layers
        self._named_layers = named_layers
        self._checked = self._bypassed = False
        self._text_config = model.config.get_text_config(decoder=True)
        dense_name: str = self._text_config._attn_implementation
        self.name = _register(dense_name, continuous_batching=continuous_batching)
        self._modules = weakref.WeakSet((*model.modules(), *around))
        for module in self._modules:
            _APPLIED[module] = self
        self._text_config._attn_implementation_internal = self.name
        hooks = _PassHooks(self._text_config, self.name, dense_name)
        self._hooks = [
            handle
            for one in (model, *around)
            for handle in (
                one.register_forward_pre_hook(hooks.before, with_kwargs=True),
                one.register_forward_hook(hooks.after, always_call=True),
            )
        ]
        # The registry outlives the model.
        self._withdraw = weakref.finalize(
            model, _withdraw, self._text_config, self.name, dense_name
        )

    def remove(self) -> None:
        """Give the model back as it was; doing it again changes nothing."""
        if not self._withdraw.alive:
            return
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            _APPLIED.pop(module, None)
        self._withdraw()

    @contextmanager
    def prompt_continues(self) -> Iterator[None]:
        """Say that the prompts of this thread's calls meanwhile go on in later calls.

        Then no query of such a call is a prompt's last one, and none attends to every key because
        of `dense_queries`. The chunks give what one call gives, if each has two tokens or more
        and the cache is kept. Without it the last queries of each chunk attend densely, as they
        do with ``generate(prefill_chunk_size=...)``: never less exact, but not the same.

        Example:
            >>> from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
            >>> model = AutoModelForCausalLM.from_config(
            ...     LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=99,
            ...                 num_attention_heads=4, num_key_value_heads=2)
            ... ).eval()
            >>> config = KVSamplingConfig(block_size=16, num_probes=4, sliding_window=16,
            ...                           num_samples=8, dense_queries=8, crossover="off")
            >>> ids, cache = torch.arange(90)[None], DynamicCache()
            >>> applied = apply(model, config)
            >>> with torch.no_grad():
            ...     whole = model(ids).logits
            ...     with applied.prompt_continues():
            ...         _ = model(ids[:, :50], past_key_values=cache)
            ...     last = model(ids[:, 50:], past_key_values=cache).logits
            >>> torch.allclose(last, whole[:, 50:], atol=1e-4)
            True
        """
        current = self.layers.current
        before, current.ends_prompt = current.ends_prompt, False
        try:
            yield
        finally:
            current.ends_prompt = before

    def __enter__(self) -> PrefillReport:
        if not self._withdraw.alive:
            raise RuntimeError("this application was removed; call apply() again")
        return self.report

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def check_pass(self, kind: str) -> None:
        """Check after a forward pass that the model's layers called the interface.

        Args:
            kind: the model's class, for messages.

        Raises:
            RuntimeError: if none did; the application is removed then.
        """
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
        elif not self.layers.called:
            self.remove()
            raise RuntimeError(
                f"no layer of {kind} called transformers' attention interface "
                "in a forward pass, so nothing ran sparse; token sparse attention was removed"
            )
        elif not self._checked:
            self._checked = True
            silent = sorted(self._named_layers - self.layers.called)
            if silent:
                warnings.warn(
                    f"the settings name layers of {kind} that did not call transformers' "
                    f"attention interface in its first forward pass, and so do not run sparse: "
                    f"{', '.join(map(str, silent))}",
                    stacklevel=2,
                )


# What the modules of applied models belong to; a module that is gone is not listed any more.
_APPLIED: weakref.WeakKeyDictionary[nn.Module, AppliedSparsity] = weakref.WeakKeyDictionary()
_APPLICATIONS: Counter[str] = Counter()  # how many have registered under each name


class _PassHooks:
    """Hooks around a model's forward passes. In a copy or a pickle of the model: nothing."""

    def __init__(self, text_config: PreTrainedConfig, name: str, dense_name: str) -> None:
        self._names = (name, dense_name)
        self._text_config = text_config

    def __deepcopy__(self, memo: dict[int, Any]) -> _PassHooks:
        """Give the copy's config, which is copied here, the dense implementation back."""
        text_config = copy.deepcopy(self._text_config, memo)
        _restore(text_config, *self._names)
        return _PassHooks(text_config, *self._names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give an unpickled model's config the dense implementation back."""
        self.__dict__.update(state)
        _restore(self._text_config, *self._names)

    def before(self, module: nn.Module, given: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Before a forward pass."""
        cache = cache_among(arguments)
        logits_to_keep, use_cache = arguments.get("logits_to_keep"), arguments.get("use_cache")
        _begin_pass(module, given, logits_to_keep, cache, use_cache)

    def after(self, module: nn.Module, _: Any, output: object) -> None:
        """After a forward pass; `output` is None if it failed."""
        _end_pass(module, output)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin_pass(
    module: nn.Module,
    given: tuple[Any, ...],
    logits_to_keep: object,
    cache: object,
    use_cache: object,
) -> None:
    applied = _APPLIED.get(module)
    if applied is not None:
        cache = cache_among(given) if cache is None else cache
        applied.layers.begin_pass(
            logits_to_keep,
            cache,
            use_cache=use_cache is not False,
            recomputed=module.training and torch.is_grad_enabled() and _checkpoints(module),
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end_pass(module: nn.Module, output: object) -> None:
    applied = _APPLIED.get(module)
    if applied is not None:
        applied.layers.end_pass(output)
        if output is not None:
            applied.check_pass(type(module).__name__)


def _checkpoints(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is on, which may run layers without gradients."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@functools.cache
def _attention_function(dense_name: str, *, continuous_batching: bool) -> AttentionFunction:
    """Return what runs under a name: always the same object, which compiled models rely on."""

    def attend(*given: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        call = layer_call(*given, **named)
        applied = _APPLIED.get(call.module)
        # Models on one config object share the name, though `apply` was called for one of them.
        layers = SparseLayers({}, {}, dense_name) if applied is None else applied.layers
        return layers.attend_packed(call) if continuous_batching else layers.attend(call)

    disabled: AttentionFunction = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
    return disabled


def _register(dense_name: str, *, continuous_batching: bool) -> str:
    """Register the functions for models that ran `dense_name` before, and return their name."""
    name = SPARSE_PREFIX + dense_name.replace("sdpa", "fused")  # transformers reads "sdpa"
    if continuous_batching:  # without a mask function: no mask
        name = batched_name(name)
    else:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[dense_name])
    function = _attention_function(dense_name, continuous_batching=continuous_batching)
    AttentionInterface.register(name, function)
    _APPLICATIONS[name] += 1
    return name


def _withdraw(text_config: PreTrainedConfig, name: str, dense_name: str) -> None:
    """Take a name out of the config, which other models may share, and of the registries."""
    _restore(text_config, name, dense_name)
    _APPLICATIONS[name] -= 1
    if not _APPLICATIONS[name]:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _restore(text_config: PreTrainedConfig, name: str, dense_name: str) -> None:
    if text_config._attn_implementation == name:  # else it was set anew meanwhile
        text_config._attn_implementation_internal = dense_name
