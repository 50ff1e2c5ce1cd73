"""What keeps a model, or one call of a layer's attention, from running sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from token_sparse_attention.gate import DenseReason

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
# Names must contain neither "flash" nor "sdpa", which transformers interprets.
SPARSE_PREFIX = "tsa_"  # of the names under which `apply` registers
DENSE_PREFIX = "dense_"  # of the names that `register_dense_attention` gives
# Arguments that change nothing about attention itself. Any other one that is set, and that
# `obstacle` does not read, sends the layer to the model's own implementation.
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


class LayerCall(NamedTuple):
    """One call of a layer's attention, as transformers makes it.

    Attributes:
        module: the layer's attention module.
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``, the cache's slots included.
        value: ``[B, H_kv, S_kv, D_v]``.
        mask: ``[B, 1, S_q, S_kv]`` or None.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        dropout: the layer's dropout.
        arguments: what else the layer passes.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    dropout: float
    arguments: dict[str, Any]

    @property
    def query_len(self) -> int:
        """S_q."""
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        """S_kv."""
        return self.key.shape[2]

    def run(self, function: AttentionFunction) -> tuple[Tensor, Tensor | None]:
        """Return what an attention function gives, ``[B, S_q, H, D_v]`` and maybe weights."""
        return function(
            self.module, self.query, self.key, self.value, self.mask,
            scaling=self.scale, dropout=self.dropout, **self.arguments,
        )  # fmt: skip


def layer_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> LayerCall:
    """Return what transformers hands to an attention function, by the names that it uses."""
    return LayerCall(module, query, key, value, attention_mask, scaling, dropout, arguments)


def obstacle(call: LayerCall) -> tuple[DenseReason | None, str]:
    """Return what makes a call more than plain causal self-attention, and on what it was met.

    Returns:
        The reason and a detail, for example an argument's name; ``(None, "")`` if nothing does.
    """
    query, key, value, arguments = call.query, call.key, call.value, call.arguments
    is_causal = arguments.get("is_causal")
    if is_causal is None:  # a layer that does not say so may attend to another sequence
        is_causal = getattr(call.module, "is_causal", False)
    window = arguments.get("sliding_window")
    config = getattr(call.module, "config", None)
    wants_weights = arguments.get("output_attentions", getattr(config, "output_attentions", False))
    records_gradients = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value)
    )
    obstacles = {
        DenseReason.NOT_CAUSAL: not is_causal,
        DenseReason.SLIDING_WINDOW: window is not None and window < key.shape[2],
        DenseReason.SOFT_CAP: arguments.get("softcap") is not None,
        DenseReason.ATTENTION_SINKS: arguments.get("s_aux") is not None,
        DenseReason.DROPOUT: call.dropout > 0,
        DenseReason.GRADIENTS: records_gradients,
        DenseReason.ATTENTION_WEIGHTS: bool(wants_weights),
        DenseReason.HEAD_DIM: value.shape != key.shape,
        DenseReason.DTYPES: len({_autocast_dtype(x) for x in (query, key, value)}) > 1,
    }
    for reason, stands in obstacles.items():
        if stands:
            return reason, ""
    for name, argument in arguments.items():
        if name not in _NEUTRAL_ARGUMENTS and argument is not None and argument is not False:
            return DenseReason.UNKNOWN_ARGUMENT, name
    return None, ""


def as_autocast(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return tensors in autocast's dtype where that is on, as PyTorch's attention takes them."""
    return tuple(tensor.to(_autocast_dtype(tensor)) for tensor in tensors)


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def unwrapped(model: nn.Module) -> tuple[PreTrainedModel, list[nn.Module]]:
    """Return the model inside what torch.compile and PEFT make of one, and PEFT's models.

    PEFT's are returned because some versions call the forward method of the model inside, and
    not the model, so its hooks do not run.

    Args:
        model: what was given; it may be no model at all.

    Returns:
        The innermost model, which `check_model` is to check; and the models of PEFT around it.
    """
    around = []
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):  # PEFT
            around.append(model)
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model, around  # type: ignore[return-value]


def check_model(model: PreTrainedModel, *, continuous_batching: bool = False) -> None:
    """Raise unless the attention of a model can be replaced.

    The model's code decides, not the flags of its class: hybrid families leave these unset
    although their attention layers call the interface.

    Args:
        model: the model.
        continuous_batching: whether it is to be replaced for continuous batching.

    Raises:
        TypeError: if it is no transformers model.
        ValueError: if it is no decoder whose code calls the attention interface, runs an
            implementation that is not known, or runs sparse already.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {kind}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be decoder-only, but {kind} is an encoder-decoder model")
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"model must use transformers' attention interface, which {kind} does not call"
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
