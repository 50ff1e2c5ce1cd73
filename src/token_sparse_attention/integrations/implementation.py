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

from token_sparse_attention.attention.causal import (
    attend,
    backend_of_layer,
    backends_of_layers,
    parse_backend,
    pattern_config,
)
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import DenseReason, TokenSparseConfig
from token_sparse_attention.integrations.attention_mask import read_mask

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
# Names must contain neither "flash" nor "sdpa", which transformers interprets.
SPARSE_PREFIX = "tsa_"  # of the names under which `apply` registers
DENSE_PREFIX = "dense_"  # of the names that `register_dense_attention` gives
# Arguments that change nothing about attention itself. Any other one that is set, and that
# `dense_reason` does not read, sends the layer to the model's own implementation.
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

_ANY_LENGTH = TokenSparseConfig(min_tokens=0, window_size=1)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


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

    def run(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        reason, _ = dense_reason(module, query, key, value, _ANY_LENGTH, dropout, kwargs)
        kv_len = None if reason else unpadded_len(attention_mask, query.shape[2], key.shape[2])
        if kv_len is None:
            sdpa = partial(dense_function("sdpa", module), module, query, key, value)
            one_query = query.shape[2] == 1 and backend != "cudnn"
            with _off_cudnn() if one_query and not is_compiling() else nullcontext():
                return sdpa(attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = as_autocast((query, key[:, :, :kv_len], value[:, :, :kv_len]))
        out = attend(query, key, value, scale=scale, backend=backend_in(module)).out
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


@contextmanager
def attention_of_every_layer(
    model: PreTrainedModel, attention_backend: str | PatternConfig
) -> Iterator[None]:
    """Run a model on `register_dense_attention` of a backend meanwhile.

    `apply` inside makes layers token sparse besides.

    Args:
        model: a model that `apply` could serve.
        attention_backend: which kernel or pattern attends.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model cannot be served, the backend is unknown, or its settings are
            for another number of layers or heads.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
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


def check_model(model: PreTrainedModel, *, continuous_batching: bool = False) -> None:
    """Raise unless the attention of a model can be replaced.

    Args:
        model: the model.
        continuous_batching: whether it is to be replaced for continuous batching.

    Raises:
        TypeError: if it is no transformers model.
        ValueError: if it is no decoder on the attention interface, runs an implementation that
            is not known, or runs sparse already.
    """
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
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if SPARSE_PREFIX in implementation:
        raise ValueError(
            "model already runs token sparse attention; remove() the first application before "
            "applying again (models built on one config object share it)"
        )
    if implementation not in DENSE_IMPLEMENTATIONS and not implementation.startswith(DENSE_PREFIX):
        raise ValueError(
            f"model must run one of the attention implementations "
            f"{', '.join(DENSE_IMPLEMENTATIONS)}, got {implementation!r}; call "
            "model.set_attn_implementation('sdpa') first"
        )
    if continuous_batching and implementation not in DENSE_IMPLEMENTATIONS:
        raise ValueError(
            "model must run 'eager' or 'sdpa' under token sparse attention for continuous "
            f"batching, got {implementation!r}"
        )


def dense_reason(
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
    return obstacle(module, query, key, value, dropout, kwargs)


def obstacle(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[DenseReason | None, str]:
    """Return what makes this call more than plain causal attention, as `dense_reason` does."""
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
        DenseReason.DTYPES: len({_autocast_dtype(x) for x in (query, key, value)}) > 1,
    }
    for reason, stands in obstacles.items():
        if stands:
            return reason, ""
    for name, argument in kwargs.items():
        if name not in _NEUTRAL_ARGUMENTS and argument is not None and argument is not False:
            return DenseReason.UNKNOWN_ARGUMENT, name
    return None, ""


def as_autocast(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return tensors in autocast's dtype where that is on, as PyTorch's attention takes them."""
    return tuple(tensor.to(_autocast_dtype(tensor)) for tensor in tensors)


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


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
