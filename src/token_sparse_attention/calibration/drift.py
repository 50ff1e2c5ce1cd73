"""The published choice of layers: those whose input and output differ least.

Source: arXiv 2602.03216, inter-layer representation drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.integrations.obstacles import unwrapped
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.profile import LayerProfile

EPSILON = 1e-8
_CHUNK_TOKENS = 4096  # whose hidden states are held in float32 at a time


@dataclass(frozen=True)
class Drift:
    """How far each layer moves its tokens.

    Attributes:
        relative: mean over prompts, for each layer, of the token-mean of
            ``||h_out - h_in|| / (||h_in|| + 1e-8)``.
        normalised: `relative` divided by its sum over the layers.
        standard_error: of `normalised`'s mean over prompts, each prompt normalised by itself;
            None with one prompt.
        attending: numbers of the layers that call the attention interface; others, as in
            hybrid models, cannot run sparse. None for all.
    """

    relative: tuple[float, ...]
    normalised: tuple[float, ...]
    standard_error: tuple[float, ...] | None
    attending: tuple[int, ...] | None = None


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a transformers model.

    They are the list of ``num_hidden_layers`` modules in the text decoder whose members hold,
    in order, a module with that ``layer_idx``, as every model with a cache has.

    Raises:
        ValueError: if there is no such list, or more than one.
    """
    model, _ = unwrapped(model)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(_has_index(layer, index) for index, layer in enumerate(module))
    ]
    if len(found) != 1:
        raise ValueError(
            f"model must have one list of {count} numbered decoder layers, "
            f"but {type(model).__name__} has {len(found)}"
        )
    return found[0]


def _has_index(layer: nn.Module, index: int) -> bool:
    return any(getattr(module, "layer_idx", None) == index for module in layer.modules())


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return the token-mean of ``||after - before|| / (||before|| + 1e-8)``.

    Norms are taken in float32 and a part of the tokens at a time.

    Args:
        before: ``[B, S, hidden]``, a layer's input.
        after: ``[B, S, hidden]``, its output.

    Returns:
        A float32 scalar on the device of `before`.
    """
    total = before.new_zeros((), dtype=torch.float32)
    for start in range(0, before.shape[1], _CHUNK_TOKENS):
        old = before[:, start : start + _CHUNK_TOKENS].float()
        new = after[:, start : start + _CHUNK_TOKENS].float()
        total += ((new - old).norm(dim=-1) / (old.norm(dim=-1) + EPSILON)).sum()
    return total / before.shape[:2].numel()


@contextmanager
def watch_layers(model: Any) -> Iterator[dict[int, Tensor]]:
    """Record each decoder layer's `relative_change` in the forward passes within.

    The value is computed inside the hook, so no hidden states outlive their layer.

    Yields:
        Layer number -> the newest forward pass's scalar, on the layer's device.
    """
    changes: dict[int, Tensor] = {}

    def hook(index: int) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            changes[index] = relative_change(before, after)

        return record

    handles = []
    try:
        for index, layer in enumerate(decoder_layers(model)):
            handles.append(layer.register_forward_hook(hook(index), with_kwargs=True))
        yield changes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_drift(
    model: Any,
    prompts: Sequence[Tensor],
    on_progress: Callable[[str], None] = lambda _: None,
) -> Drift:
    """Measure how far each decoder layer moves its tokens.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: token ids, ``[1, S]`` each; they may differ in length.
        on_progress: told what is being done.

    Raises:
        ValueError: if there are no prompts, the layers cannot be found, the model is in
            training mode, a hidden state is not finite, or `apply` cannot serve the model.
        RuntimeError: if no layer calls the attention interface.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    check_eval(model)
    rows = []
    applied = apply(model, KVSamplingConfig(sparse_layers=()))  # dense; it sees who attends
    with applied, watch_layers(model) as changes:
        for number, ids in enumerate(prompts, 1):
            on_progress(f"drift, prompt {number} of {len(prompts)}: {ids.shape[1]:,} tokens")
            model(ids.to(model.device), use_cache=False, logits_to_keep=1)
            row = [float(changes[layer]) for layer in sorted(changes)]
            if not all(map(math.isfinite, row)):
                raise ValueError(f"the hidden states of prompt {number} must be finite")
            rows.append(row)
    return replace(summarise(rows), attending=tuple(sorted(applied.layers.called)))


def summarise(rows: Sequence[Sequence[float]]) -> Drift:
    """Return the drift of layers from ``[prompt][layer]`` relative changes.

    Raises:
        ValueError: if no layer changes anything, so that nothing can be normalised.
    """
    relative = [math.fsum(column) / len(rows) for column in zip(*rows)]
    if math.fsum(relative) == 0:
        raise ValueError("at least one layer must change its input, but none does")
    errors = None
    if len(rows) > 1:
        errors = tuple(standard_error(column) for column in zip(*map(_normalise, rows)))
    return Drift(tuple(relative), tuple(_normalise(relative)), errors)


def _normalise(row: Sequence[float]) -> list[float]:
    total = math.fsum(row)
    return [value / total for value in row]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two values."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def drift_threshold(drift: Sequence[float], quantile: float) -> tuple[float, tuple[int, ...]]:
    """Return the quantile of the layers' drift, and the layers at or below it.

    The quantile lies between two layers' values, as in ``torch.quantile`` by default. The
    layers are found by rank, so that rounding cannot lose the one that the quantile falls on.

    Raises:
        ValueError: if `quantile` is outside ``[0, 1]`` or there are no layers.

    Example:
        >>> drift_threshold([0.4, 0.1, 0.2, 0.3], 0.5)
        (0.25, (1, 2))
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"drift_quantile must be in [0, 1], got {quantile}")
    if not drift:
        raise ValueError("drift must hold at least one layer, got none")
    ordered = sorted(drift)
    position = quantile * (len(ordered) - 1)
    rank = min(math.floor(position + 1e-9), len(ordered) - 1)
    low, high = ordered[rank], ordered[min(rank + 1, len(ordered) - 1)]
    threshold = low + max(position - rank, 0.0) * (high - low)
    layers = tuple(layer for layer, value in enumerate(drift) if value <= low)
    return threshold, layers


def drift_profile(
    drift: Drift, base: SparseConfig, quantile: float = 0.5
) -> tuple[float, LayerProfile]:
    """Return the threshold, and the profile with the layers of least drift sparse.

    Args:
        drift: what was measured.
        base: the settings of the sparse layers.
        quantile: the paper's delta; of the layers that attend, those at or below this quantile
            become sparse.
    """
    layers = range(len(drift.normalised)) if drift.attending is None else drift.attending
    threshold, ranks = drift_threshold([drift.normalised[layer] for layer in layers], quantile)
    return threshold, LayerProfile(base, {layers[rank]: {} for rank in ranks})


def check_eval(model: Any) -> None:
    """Raise if dropout may be active, which would be measured along."""
    if model.training:
        raise ValueError("model must be in eval mode; call model.eval() first")
