"""A whole calibration: measure, choose, and say what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from token_sparse_attention.attention.resolve import check_backend
from token_sparse_attention.calibration import drift as drifts
from token_sparse_attention.calibration import sensitivity as sensitivities
from token_sparse_attention.calibration.choose import UnreachableError
from token_sparse_attention.calibration.heads import measure_heads
from token_sparse_attention.calibration.prompts import Prompt
from token_sparse_attention.calibration.record import (
    METHODS,
    CalibrationResult,
    Choice,
    HeadSensitivity,
    LayerDrift,
    LayerSetting,
    PromptLength,
    Sensitivity,
)
from token_sparse_attention.config import SparseConfig, TokenSelectionConfig
from token_sparse_attention.info import provenance
from token_sparse_attention.profile import LayerProfile

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure, and what the choice should reach.

    Attributes:
        method: ``"drift"``, ``"sensitivity"``, or ``"both"``: sensitivity decides, and drift's
            choice is measured beside it.
        base: the settings that every layer starts from; its ``sparse_layers`` must be None.
        drift_quantile: layers at or below this quantile of the drift become sparse.
        values: what sensitivity tries in each layer for the ``calibrated_field`` of `base`;
            None for its ``calibrated_values``.
        heads_of: how many of the costliest layers are measured head by head as well, to leave
            single heads of theirs dense.
        divergence_budget: nats that the chosen layers may cost together; or
        target_speedup: how many times less attention work they should leave.
        max_reply: tokens of the model's own reply along which divergence is measured, where a
            prompt brings no continuation.
        impl: see `token_sparse_attention`.
        attention_backend: the kernel of sparse layers, one of `BACKENDS`: a pattern would add
            its own divergence to that of token sparsity.

    Raises:
        ValueError: if a field is out of range or does not go with `base`, or sensitivity has
            not exactly one goal.
    """

    method: str = "drift"
    base: SparseConfig = field(default_factory=TokenSelectionConfig)
    drift_quantile: float = 0.5
    values: tuple[float, ...] | None = None
    heads_of: int = 0
    divergence_budget: float | None = None
    target_speedup: float | None = None
    max_reply: int = 32
    impl: str = "auto"
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        check_backend(self.attention_backend)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.base.sparse_layers is not None:
            raise ValueError(
                "sparse_layers must be null in the base settings, because calibration chooses "
                f"the layers; got {list(self.base.sparse_layers)}"
            )
        if not 0 <= self.drift_quantile <= 1:
            raise ValueError(f"drift_quantile must be in [0, 1], got {self.drift_quantile}")
        if self.max_reply < 0:
            raise ValueError(f"max_reply must be at least 0, got {self.max_reply}")
        if self.method == "drift":
            unused = {
                "divergence_budget": self.divergence_budget,
                "target_speedup": self.target_speedup,
                "values": self.values,
                "heads_of": self.heads_of or None,
            }
            given = [name for name, value in unused.items() if value is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(unused)} need method sensitivity or both; "
                    f"method drift got {', '.join(given)}"
                )
            return
        goals = [self.divergence_budget, self.target_speedup]
        if goals.count(None) != 1:
            raise ValueError(
                f"method {self.method} needs one goal, divergence_budget or target_speedup; "
                f"got {'both' if None not in goals else 'neither'}"
            )
        budget, speedup = self.divergence_budget, self.target_speedup
        if budget is not None and not (math.isfinite(budget) and budget >= 0):
            raise ValueError(f"divergence_budget must be at least 0, got {budget}")
        if speedup is not None and not (math.isfinite(speedup) and speedup >= 1):
            raise ValueError(f"target_speedup must be at least 1, got {speedup}")
        self._check_settings()

    def _check_settings(self) -> None:
        name, values = self.base.calibrated_field, self.values
        if not name:
            raise ValueError(f"base must be of a method with a calibrated_field, got {self.base}")
        if values is not None:
            if not values:
                raise ValueError("values must hold at least one number, got none")
            if len(set(values)) != len(values):
                raise ValueError(f"values must not repeat a number, got {values}")
            for value in values:
                dataclasses.replace(self.base, **{name: value})
        if self.heads_of < 0:
            raise ValueError(f"heads_of must be at least 0, got {self.heads_of}")

    @property
    def settings(self) -> tuple[LayerSetting, ...]:
        """What sensitivity tries in each layer."""
        values = self.base.calibrated_values if self.values is None else self.values
        return tuple(LayerSetting(self.base.calibrated_field, value) for value in values)

    @property
    def goal(self) -> tuple[str, float]:
        """What the choice should reach: its name in `record.GOALS`, and its value."""
        if self.divergence_budget is not None:
            return "divergence_budget", self.divergence_budget
        if self.target_speedup is not None:
            return "target_speedup", self.target_speedup
        return "drift_quantile", self.drift_quantile


def calibrate(
    model: Any,
    prompts: Sequence[Prompt],
    options: CalibrationOptions,
    *,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda _: None,
) -> CalibrationResult:
    """Measure a model's layers and choose which run sparse.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: what to measure on.
        options: what to measure and to reach.
        name: what the result calls the model; by default what the model calls itself.
        arguments: what the result says was asked for; by default the options.
        on_progress: told what is being done.

    Returns:
        The result; if the goal is out of reach, with `failure` set and no profile.

    Raises:
        ValueError: if the model or the prompts cannot be measured.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    about = provenance(str(model.device))
    lengths = [PromptLength(prompt.ids.shape[1], 0) for prompt in prompts]
    layers: list[LayerDrift] = []
    choices: list[Choice] = []
    rows: list[Sensitivity] = []
    heads: list[HeadSensitivity] = []
    failure = ""
    if options.method != "sensitivity":
        measured = drifts.measure_drift(model, [p.ids for p in prompts], on_progress)
        layers, choice = _by_drift(measured, options)
        choices.append(choice)
    if options.method != "drift":
        references = []
        for number, prompt in enumerate(prompts, 1):
            on_progress(f"dense reply, prompt {number} of {len(prompts)}")
            references.append(sensitivities.dense_reference(model, prompt, options.max_reply))
        lengths = [PromptLength(r.ids.shape[1], r.continuation.shape[1]) for r in references]
        rows, heads, choices, failure = _by_sensitivity(
            model, references, choices, options, on_progress
        )
    fields = dataclasses.asdict(options)
    fields = {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items() if n != "base"}
    return CalibrationResult(
        method=options.method,
        model=model.config.name_or_path if name is None else name,
        dtype=str(model.dtype).removeprefix("torch."),
        provenance=about,
        arguments=fields if arguments is None else arguments,
        base=options.base,
        prompts=tuple(lengths),
        drift=tuple(layers),
        sensitivity=tuple(rows),
        heads=tuple(heads),
        choices=tuple(choices),
        failure=failure,
    )


def _by_drift(
    measured: drifts.Drift, options: CalibrationOptions
) -> tuple[list[LayerDrift], Choice]:
    quantile = options.drift_quantile
    _, profile = drifts.drift_profile(measured, options.base, quantile)
    errors = measured.standard_error
    layers = [
        LayerDrift(
            layer=layer,
            relative=relative,
            drift=measured.normalised[layer],
            standard_error=None if errors is None else errors[layer],
            at_or_below=layer in profile.layers,
        )
        for layer, relative in enumerate(measured.relative)
    ]
    return layers, Choice("drift_quantile", quantile, profile)


def _by_sensitivity(
    model: Any,
    references: Sequence[sensitivities.Reference],
    choices: list[Choice],
    options: CalibrationOptions,
    on_progress: Progress,
) -> tuple[list[Sensitivity], list[HeadSensitivity], list[Choice], str]:
    """The measurements, the choices (drift's measured too), and why there is none."""
    code = {"impl": options.impl, "attention_backend": options.attention_backend}
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers

    def measure(profile: LayerProfile) -> sensitivities.Reading:
        on_progress(f"{len(profile.layers)} layers sparse together")
        return sensitivities.measure(model, references, profile, **code)

    rows = sensitivities.measure_sensitivity(
        model, references, options.base, options.settings, on_progress=on_progress, **code
    )
    measured = [
        dataclasses.replace(choice, **measure(choice.profile).of_choice(num_layers))
        for choice in choices
    ]
    if not any(row.sparse_prompts for row in rows):
        reasons = "; ".join(dict.fromkeys(row.note for row in rows))
        return rows, [], measured, f"no layer ran sparse under any setting: {reasons}"
    heads, with_heads = measure_heads(
        model, references, options.base, rows, options.heads_of, on_progress=on_progress, **code
    )
    rows += with_heads
    try:
        chosen = sensitivities.choose_profile(rows, options.base, *options.goal, measure)
    except UnreachableError as error:
        return rows, heads, measured, str(error)
    return rows, heads, [*measured, chosen], ""


def choose_again(result: CalibrationResult, options: CalibrationOptions) -> CalibrationResult:
    """Return earlier measurements with another choice, for another goal.

    Nothing is measured, so what the chosen layers do together is not known.

    Args:
        result: of method ``"sensitivity"`` or ``"both"``.
        options: the goal; `base` must be the result's.

    Raises:
        ValueError: if no sensitivity was measured.
    """
    if not result.sensitivity:
        raise ValueError(f"sensitivity must have been measured, got method {result.method!r}")
    drift = tuple(choice for choice in result.choices if choice.goal == "drift_quantile")
    try:
        chosen = sensitivities.choose_from(result.sensitivity, options.base, *options.goal)
    except UnreachableError as error:
        return dataclasses.replace(result, choices=drift, failure=str(error))
    return dataclasses.replace(result, choices=(*drift, chosen), failure="")
