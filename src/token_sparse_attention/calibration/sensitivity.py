"""How much the model's predictions change when layers are sparse: measured, not guessed.

A prompt is prefilled sparsely, sparsity is removed, and the reply's tokens are run on the cache
that the prefill left. The Kullback-Leibler divergence of the next-token distributions from
those of the dense model is averaged over the prompt's last position and the reply's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention.calibration.choose import (
    Combination,
    Option,
    UnreachableError,
    back_off,
    combinations,
    reaching_speedup,
    summed_divergence,
    within_budget,
)
from token_sparse_attention.calibration.drift import check_eval, standard_error
from token_sparse_attention.calibration.prompts import Prompt
from token_sparse_attention.calibration.record import Choice, LayerSetting, Sensitivity
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.record import LayerRecord
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.methods import method_of
from token_sparse_attention.profile import LayerProfile, without_crossover

ALL_KEYS = "every query attends to every key"
# Why a layer runs dense under one setting and may run sparse under another.
_BY_SETTING = (DenseReason.NOTHING_TO_DROP, DenseReason.CROSSOVER_KEPT)


@dataclass(frozen=True)
class Reference:
    """What the dense model says to a prompt.

    Attributes:
        ids: ``[1, S]`` the prompt.
        continuation: ``[1, N]`` the reply that follows, N may be 0.
        log_probs: ``[N + 1, V]`` float32, after the prompt and after each token of the reply.
    """

    ids: Tensor
    continuation: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class LayerReading:
    """What one layer did in one prefill.

    Attributes:
        kept_share: share of the tokens that the heads kept.
        work: mean over heads of the method's `work`.
        sparse: whether the layer ran sparse; not where every query sees every key all the same.
        undecided: whether the layer ran dense whatever the setting.
        why_dense: empty if it ran sparse, `ALL_KEYS` if every query attends to every key.
    """

    kept_share: float
    work: float
    sparse: bool
    undecided: bool
    why_dense: str


_ABSENT = LayerReading(1.0, 1.0, False, True, "layer does not call the attention interface")


@dataclass(frozen=True)
class Reading:
    """One setting's effect on all prompts.

    Attributes:
        divergences: in nats, one per prompt; exactly 0 where every layer ran dense.
        layers: for each prompt, layer number -> what it did.
    """

    divergences: tuple[float, ...]
    layers: tuple[Mapping[int, LayerReading], ...]

    @property
    def divergence(self) -> float:
        """Mean over prompts."""
        return math.fsum(self.divergences) / len(self.divergences)

    @property
    def standard_error(self) -> float | None:
        """Of `divergence` over prompts; None with one prompt."""
        return standard_error(self.divergences) if len(self.divergences) > 1 else None

    def of_layer(self, layer: int) -> list[LayerReading]:
        """Return what a layer did, one entry per prompt."""
        return [layers.get(layer, _ABSENT) for layers in self.layers]

    def work(self, num_layers: int) -> float:
        """Return the mean of the work over prompts and layers."""
        readings = [r for layer in range(num_layers) for r in self.of_layer(layer)]
        return math.fsum(reading.work for reading in readings) / len(readings)

    def of_choice(self, num_layers: int) -> dict[str, Any]:
        """Return the fields of a `Choice` that say what its layers do together."""
        return {
            "divergence": self.divergence,
            "standard_error": self.standard_error,
            "prompt_divergences": self.divergences,
            "work": self.work(num_layers),
        }


Measure = Callable[[LayerProfile], Reading]  # `measure` of one model and its references


@torch.no_grad()
def dense_reference(model: Any, prompt: Prompt, max_reply: int = 32) -> Reference:
    """Run a prompt densely and record what the model predicts.

    Args:
        model: a transformers causal language model in eval mode.
        prompt: the prompt; without a continuation, the model's greedy reply is taken.
        max_reply: tokens of that reply at most; 0 for the last position of the prompt only.

    Raises:
        ValueError: if the model is in training mode or its logits are not numbers.
    """
    check_eval(model)
    ids = prompt.ids.to(model.device)
    if prompt.continuation is None:
        continuation = _greedy_reply(model, ids, max_reply)
    else:
        continuation = prompt.continuation.to(model.device)
    prefill = model(ids, use_cache=True, logits_to_keep=1)
    log_probs = _log_probs(model, prefill, continuation)
    if log_probs.isnan().any():
        raise ValueError("the dense model's logits must be numbers, but some are NaN")
    return Reference(ids, continuation, log_probs)


def _greedy_reply(model: Any, ids: Tensor, max_tokens: int) -> Tensor:
    """The model's own reply, without what ends it: nothing sensible follows that."""
    if max_tokens == 0:
        return ids[:, :0]
    generated: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        return_dict_in_generate=False,
    )
    reply = generated[:, ids.shape[1] :]
    end = model.generation_config.eos_token_id
    if end is not None:
        ends = torch.isin(reply[0], torch.as_tensor(end, device=reply.device)).nonzero()
        reply = reply[:, : int(ends[0])] if len(ends) else reply
    return reply


def _log_probs(model: Any, prefill: Any, continuation: Tensor) -> Tensor:
    """Log-probabilities ``[N + 1, V]`` after a prefill and after each token that follows."""
    logits = [prefill.logits[0, -1:]]
    if continuation.shape[1]:
        follow = model(continuation, past_key_values=prefill.past_key_values, use_cache=True)
        logits.append(follow.logits[0])
    return torch.cat(logits).float().log_softmax(-1)


def token_divergences(dense: Tensor, sparse: Tensor) -> Tensor:
    """Return KL(dense || sparse) in nats at each position, ``[N]`` float64.

    Args:
        dense: ``[N, V]`` log-probabilities.
        sparse: ``[N, V]`` log-probabilities.

    Raises:
        ValueError: if one is not finite.
    """
    old, new = dense.double(), sparse.double()
    terms = torch.where(old.isneginf(), 0.0, old.exp() * (old - new))
    values = terms.sum(-1)
    if not values.isfinite().all():
        found = float(values[~values.isfinite()][0])
        raise ValueError(f"the sparse model's logits must be finite, but KL is {found}")
    return values


def divergence(dense: Tensor, sparse: Tensor) -> float:
    """Return the mean of `token_divergences`.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]]).log()
        >>> round(divergence(half, torch.tensor([[0.25, 0.75]]).log()), 4)
        0.1438
    """
    # Rounding can leave a little less than nothing.
    return max(float(token_divergences(dense, sparse).mean()), 0.0)


@torch.no_grad()
def measure(
    model: Any,
    references: Sequence[Reference],
    config: SparseConfig | LayerProfile,
    *,
    impl: str = "auto",
    attention_backend: str = "auto",
) -> Reading:
    """Measure how far the model under `config` is from the dense model.

    Args:
        model: the model that the references are from.
        references: what it says densely.
        config: the settings; their crossover is taken as ``"off"``, so that short prompts
            show what long ones will do.
        impl: see `token_sparse_attention`.
        attention_backend: see `token_sparse_attention`.
    """
    config = without_crossover(config)
    divergences, layers = [], []
    for reference in references:
        with apply(model, config, impl=impl, attention_backend=attention_backend) as report:
            prefill = model(reference.ids, use_cache=True, logits_to_keep=1)
        readings = {record.layer: _read_layer(record) for record in report}
        value = 0.0
        if any(reading.sparse for reading in readings.values()):
            log_probs = _log_probs(model, prefill, reference.continuation)
            value = divergence(reference.log_probs, log_probs)
        divergences.append(value)
        layers.append(readings)
    return Reading(tuple(divergences), tuple(layers))


def _read_layer(record: LayerRecord) -> LayerReading:
    selection = record.selection
    if selection is None or "sparse" not in record.paths:
        why = str(record.reasons[0])
        return LayerReading(1.0, 1.0, False, why not in map(str, _BY_SETTING), why)
    assert record.config is not None, "a layer that ran sparse has settings"
    method = method_of(record.config)
    works = [method.work(n, record.kv_len) for n in selection.lengths.flatten().tolist()]
    if min(works) >= 1:
        return LayerReading(1.0, 1.0, False, False, ALL_KEYS)
    return LayerReading(record.kept_share, math.fsum(works) / len(works), True, False, "")


def measure_sensitivity(
    measure_profile: Measure,
    num_layers: int,
    base: SparseConfig,
    settings: Sequence[LayerSetting],
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Sensitivity]:
    """Make one layer at a time sparse, under each setting, and measure the divergence.

    Args:
        measure_profile: `measure` of the model and its references.
        num_layers: layers of the model.
        base: what every layer starts from.
        settings: what to try: values of the config's ``calibrated_field``.
        on_progress: told what is being done.

    Returns:
        One entry per layer and setting, in that order.
    """
    rows = []
    for layer in range(num_layers):
        last: tuple[LayerSetting, Reading] | None = None
        for setting in settings:
            on_progress(f"sensitivity, layer {layer} of {num_layers - 1}, {setting}")
            if last is None or not _known(last[1].of_layer(layer), last[0], setting):
                last = setting, measure_profile(LayerProfile(base, {layer: setting.changes}))
            rows.append(layer_row(layer, setting, last[1]))
    return rows


def _known(own: Sequence[LayerReading], read_at: LayerSetting, setting: LayerSetting) -> bool:
    """Whether a layer's readings at one setting tell what it does at another."""
    more = setting.value >= read_at.value  # samples that cover a prompt: so do more
    return all(r.undecided or (r.why_dense == ALL_KEYS and more) for r in own)


def layer_row(layer: int, setting: LayerSetting, reading: Reading) -> Sensitivity:
    """Return what a layer did, alone sparse, as a row of the results."""
    own = reading.of_layer(layer)
    return Sensitivity(
        layer=layer,
        setting=setting,
        divergence=reading.divergence,
        standard_error=reading.standard_error,
        kept_share=math.fsum(r.kept_share for r in own) / len(own),
        work=math.fsum(r.work for r in own) / len(own),
        sparse_prompts=sum(r.sparse for r in own),
        note="; ".join(dict.fromkeys(r.why_dense for r in own if not r.sparse)),
    )


def choose_profile(
    rows: Sequence[Sensitivity],
    base: SparseConfig,
    goal: str,
    value: float,
    measure_profile: Measure | None = None,
) -> Choice:
    """Choose each layer's setting, and measure the choice as a whole.

    Args:
        rows: from `measure_sensitivity`.
        base: the settings that the profile starts from.
        goal: ``"divergence_budget"``: as little work as a divergence of `value` nats allows,
            both by the layers' sum and measured together; or ``"target_speedup"``: as little
            divergence as work of at most ``1 / value`` allows, measured together.
        value: see `goal`.
        measure_profile: measures a profile on the calibration prompts; without it the layers'
            own measurements decide, by the sum of divergences or the mean of work.

    Raises:
        UnreachableError: if no combination reaches the target speed-up.
    """
    reach = {"divergence_budget": within_budget, "target_speedup": reaching_speedup}
    if goal not in reach:
        raise ValueError(f"goal must be divergence_budget or target_speedup, got {goal!r}")
    path, num_layers = _path(rows), len({row.layer for row in rows})
    start = index = reach[goal](path, value)
    together: dict[str, Any] = {}
    if measure_profile is not None:
        measured = measure_profile

        @functools.cache
        def read(index: int) -> Reading:
            return measured(_profile(path[index], base))

        if goal == "divergence_budget":
            index = back_off(start, lambda i: read(i).divergence <= value)
        else:
            index = _reaching(value, start, len(path), lambda i: read(i).work(num_layers))
        together = read(index).of_choice(num_layers)
    return Choice(
        goal=goal,
        value=value,
        profile=_profile(path[index], base),
        summed_divergence=summed_divergence(path[index]),
        steps_moved=abs(index - start),
        **together,
    )


def _reaching(speedup: float, start: int, end: int, work: Callable[[int], float]) -> int:
    """Return the first index from `start` on whose measured work is at most ``1 / speedup``."""
    for index in range(start, end):
        if work(index) * speedup <= 1:
            return index
    least = work(end - 1)
    raise UnreachableError(
        f"target speed-up {speedup:g} is out of reach: with every layer at its "
        f"cheapest measured setting, together, the attention work is {least:.3f} "
        f"of dense, {1 / least:.2f}x"
    )


def _path(rows: Sequence[Sensitivity]) -> list[Combination]:
    """The combinations of the measured settings that are worth choosing from."""
    by_layer: dict[int, list[Option]] = {}
    for row in rows:
        option = Option(row.setting, row.divergence, row.work)
        by_layer.setdefault(row.layer, []).append(option)
    return combinations([by_layer[layer] for layer in sorted(by_layer)])


def _profile(combination: Combination, base: SparseConfig) -> LayerProfile:
    layers = {
        layer: option.setting.changes
        for layer, option in enumerate(combination)
        if option.setting is not None
    }
    return LayerProfile(base, layers)
