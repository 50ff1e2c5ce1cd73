"""A model's dense attention: what it ran before, and this library's kernels in its place."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp, math_sdp_enabled
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from token_sparse_attention.attention.names import (
    backend_of_layer,
    backends_of_layers,
    parse_backend,
    pattern_config,
)
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.integrations.attention_mask import read_mask
from token_sparse_attention.integrations.obstacles import (
    DENSE_PREFIX,
    AttentionFunction,
    as_autocast,
    check_model,
    layer_call,
    obstacle,
    unwrapped,
)


def register_dense_attention(attention_backend: str | PatternConfig = "auto") -> str:
    """Register causal attention by this library's kernels or patterns, for models to run on.

    Causal prefills without a mask run on `attention_backend`; whatever else a model asks for
    goes to transformers' ``"sdpa"``. With flash-attn-4 that makes dense layers of long
    prompts faster too. Single queries, as in decode steps, stay off cuDNN unless that is the
    backend, also where PyTorch would take it: it plans anew for every number of keys. With a
    block-sparse pattern every layer runs that pattern, under a
    mask that is merely causal too (chunks of a prompt), but not under one with padding.
    `apply` can be used on top.

    Args:
        attention_backend: which kernel or pattern attends, see `token_sparse_attention`.

    Returns:
        The implementation's name, for ``from_pretrained(..., attn_implementation=name)`` or
        ``model.set_attn_implementation(name)``.

    Raises:
        TypeError: if the backend is neither text nor settings of a pattern.
        ValueError: if the backend's name or a setting of it is unknown.

    Example:
        >>> register_dense_attention("math"), register_dense_attention("flexprefill")
        ('dense_math', 'dense_flexprefill')
    """
    backend = parse_backend(attention_backend)
    name = _implementation_name(backend)

    def run(*given: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        call = layer_call(*given, **named)
        one_query = call.query_len == 1
        other = one_query or obstacle(call)[0] is not None
        kv_len = None if other else unpadded_len(call.mask, call.query_len, call.kv_len)
        if kv_len is None:
            off_cudnn = one_query and backend != "cudnn" and not is_compiling()
            with _off_cudnn() if off_cudnn else nullcontext():
                return call.run(dense_function("sdpa", call.module))
        keys = slice(kv_len)
        query, key, value = as_autocast((call.query, call.key[:, :, keys], call.value[:, :, keys]))
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        resolved = resolve_backend(backend_in(call.module), query, key)
        out = resolved.attend(query, key, value, scale=scale).out
        return out.transpose(1, 2).contiguous(), None

    # A compiled model, and a chunk of a prompt, get a mask even where it is merely causal.
    # Patterns read it, and lengths, on the host; for a dense kernel sdpa does as well.
    unpadded_len = _no_mask
    backend_in: Callable[[nn.Module], str] = lambda _: backend  # noqa: E731
    if pattern_config(backend) is not None:
        unpadded_len, backend_in = _causal_mask, partial(_backend_in, backend)
        run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    AttentionInterface.register(name, run)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def use_own_kernels(model: PreTrainedModel, attention_backend: str) -> None:
    """Make a model on CUDA run on `register_dense_attention`; one elsewhere stays as it is.

    Sparse and dense layers then run on the same kernels, so that comparisons show sparsity alone.
    """
    if model.device.type == "cuda":
        model.set_attn_implementation(register_dense_attention(attention_backend))


@contextmanager
def attention_of_every_layer(
    model: PreTrainedModel, attention_backend: str | PatternConfig
) -> Iterator[None]:
    """Run a model on `register_dense_attention` of a backend meanwhile.

    Inside, `apply` makes layers token sparse on top.

    Args:
        model: a model that `apply` could serve.
        attention_backend: which kernel or pattern attends.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model cannot be served, the backend is unknown, or its settings are
            for another number of layers or heads.
    """
    model, _ = unwrapped(model)
    check_model(model)
    config = model.config.get_text_config(decoder=True)
    backend = parse_backend(attention_backend)
    backends_of_layers(backend, config.num_hidden_layers, config.num_attention_heads)
    name, before = register_dense_attention(backend), config._attn_implementation
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


@contextmanager
def _off_cudnn() -> Iterator[None]:
    """Keep PyTorch's attention off cuDNN meanwhile, unless it may run on nothing else."""
    others = math_sdp_enabled()  # type: ignore[no-untyped-call]
    if not (others and cudnn_sdp_enabled()):  # type: ignore[no-untyped-call]
        yield
        return
    enable_cudnn_sdp(False)
    try:
        yield
    finally:
        enable_cudnn_sdp(True)


def _no_mask(mask: Tensor | None, query_len: int, kv_len: int) -> int | None:
    """Return how many keys there are if no mask says so, else None."""
    return kv_len if mask is None and query_len == kv_len else None


def _causal_mask(mask: Tensor | None, query_len: int, kv_len: int) -> int | None:
    """Return how many keys are in use if the mask is causal without padding, else None."""
    layout = read_mask(mask, query_len, kv_len)
    return None if layout is None or layout.padding_mask is not None else layout.kv_len


def _backend_in(backend: str, module: nn.Module) -> str:
    """Return what a pattern is in the layer that `module` attends for."""
    layer: int | None = getattr(module, "layer_idx", None)
    config = getattr(module, "config", None)
    if layer is None or config is None:  # then settings that name layers raise in the attention
        return backend
    return backend_of_layer(backend, layer, config.num_hidden_layers)


def _implementation_name(backend: str) -> str:
    if pattern_config(backend) is None:
        return DENSE_PREFIX + backend.replace("flash", "fa2")  # transformers reads "flash"
    pattern, colon, _ = backend.partition(":")
    # Other settings, another name; transformers gives ":" and "/" in a name a meaning.
    digest = f"_{hashlib.sha256(backend.encode()).hexdigest()[:12]}" if colon else ""
    return f"{DENSE_PREFIX}{pattern}{digest}"


def dense_function(name: str, module: nn.Module) -> AttentionFunction:
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
