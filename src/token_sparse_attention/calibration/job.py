"""A whole calibration: measure, choose, and say what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from token_sparse_attention.calibration import drift as drifts
from token_sparse_attention.calibration import sensitivity as sensitivities
from token_sparse_attention.calibration.choose import UnreachableError
from token_sparse_attention.calibration.heads import measure_heads
from token_sparse_attention.calibration.options import CalibrationOptions
from token_sparse_attention.calibration.prompts import Prompt
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    Choice,
    HeadSensitivity,
    LayerDrift,
    PromptLength,
    Sensitivity,
)
from token_sparse_attention.info import provenance
from token_sparse_attention.profile import LayerProfile

Progress = Callable[[str], None]


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
    sizes = model.config.get_text_config(decoder=True)
    num_layers = sizes.num_hidden_layers

    def measure(profile: LayerProfile) -> sensitivities.Reading:
        return sensitivities.measure(model, references, profile, **code)

    def measure_together(profile: LayerProfile) -> sensitivities.Reading:
        on_progress(f"{len(profile.layers)} layers sparse together")
        return measure(profile)

    rows = sensitivities.measure_sensitivity(
        measure, num_layers, options.base, options.settings, on_progress
    )
    measured = [
        dataclasses.replace(choice, **measure_together(choice.profile).of_choice(num_layers))
        for choice in choices
    ]
    if not any(row.sparse_prompts for row in rows):
        reasons = "; ".join(dict.fromkeys(row.note for row in rows))
        return rows, [], measured, f"no layer ran sparse under any setting: {reasons}"
    heads, with_heads = measure_heads(
        measure, sizes.num_attention_heads, options.base, rows, options.heads_of, on_progress
    )
    rows += with_heads
    try:
        chosen = sensitivities.choose_profile(rows, options.base, *options.goal, measure_together)
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
        chosen = sensitivities.choose_profile(result.sensitivity, options.base, *options.goal)
    except UnreachableError as error:
        return dataclasses.replace(result, choices=drift, failure=str(error))
    return dataclasses.replace(result, choices=(*drift, chosen), failure="")
