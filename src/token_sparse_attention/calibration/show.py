"""A calibration for people: a table of the layers, sentences on the choice, and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.table import Table

from token_sparse_attention.calibration.drift import drift_threshold
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    Choice,
    LayerDrift,
    LayerSetting,
    Sensitivity,
)
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.plots import drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def layer_table(result: CalibrationResult) -> Table:
    """Return one row per layer: its drift, its sensitivity, and its setting in each choice."""
    rows = of_whole_layers(result.sensitivity)
    settings = list(dict.fromkeys(row.setting for row in rows))
    table = Table("layer")
    if result.drift:
        table.add_column("drift")
    for setting in settings:
        table.add_column(f"KL, share\nat {setting.value}")
    for choice in result.choices:
        table.add_column("by drift" if choice.goal == "drift_quantile" else "by KL")
    for layer in range(len(result.drift) or len(rows) // max(len(settings), 1)):
        cells = [str(layer)]
        if result.drift:
            cells.append(f"{result.drift[layer].drift:.3g}")
        cells += [_cell(row) for row in rows if row.layer == layer]
        table.add_row(*cells, *(_setting(choice, layer) for choice in result.choices))
    return table


def of_whole_layers(rows: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Return the measurements of layers all of whose heads are sparse."""
    return [row for row in rows if not row.setting.dense_heads]


def plus_minus(value: float, error: float | None) -> str:
    """Return a value with its standard error, if there is one."""
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def _cell(row: Sensitivity) -> str:
    if not row.sparse_prompts:
        return "ran dense"
    return f"{row.divergence:.1e} {row.kept_share:.0%}"


def _setting(choice: Choice, layer: int) -> str:
    changes = choice.profile.layers.get(layer)
    if changes is None:
        return "dense"
    base = choice.profile.base
    name = base.calibrated_field
    dense = changes.get("dense_heads", ())
    heads = f", dense heads {ranges(dense)}" if dense else ""
    return f"{changes.get(name, getattr(base, name))}{heads}"


def sentences(result: CalibrationResult) -> list[str]:
    """Say what was measured and chosen."""
    lengths = sorted({prompt.tokens for prompt in result.prompts})
    span = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
    count = len(result.prompts)
    told = [f"Measured on {count} prompt{'s' if count > 1 else ''} of {span} tokens."]
    if result.sensitivity:
        positions = sum(prompt.continuation_tokens + 1 for prompt in result.prompts)
        name = result.sensitivity[0].setting.name
        told.append(
            f"KL: of the sparse model's next-token predictions from the dense ones, in nats, over "
            f"{positions} positions, one layer sparse at a time at each {name}; ± is the standard "
            "error over prompts."
        )
        if isinstance(result.base, KVSamplingConfig):
            told.append("Shares are of sinks and samples, behind the sliding window.")
    told += _notes(of_whole_layers(result.sensitivity))
    for layer in dict.fromkeys(one.layer for one in result.heads):
        own = [one for one in result.heads if one.layer == layer]
        costs = ", ".join(f"{one.head}: {one.divergence:.1e}" for one in own)
        told.append(
            f"Heads of layer {layer}, one sparse at a time at {own[0].setting}, nats: {costs}."
        )
    num_layers = len(result.drift) or len({row.layer for row in result.sensitivity})
    told += [_sentence(choice, result, num_layers) for choice in result.choices]
    if result.failure:
        told.append(f"No profile: {result.failure}.")
    return told


def _notes(rows: Sequence[Sensitivity]) -> list[str]:
    """Why which layers ran dense, and at which settings if not at all."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    met: dict[tuple[str, int], list[LayerSetting]] = {}
    for row in rows:
        if row.note:
            met.setdefault((row.note, row.layer), []).append(row.setting)
    groups: dict[tuple[str, tuple[LayerSetting, ...]], list[int]] = {}
    for (note, layer), own in met.items():
        groups.setdefault((note, tuple(own)), []).append(layer)
    told = []
    for (note, own_settings), layers in groups.items():
        some = len(own_settings) < len(settings)
        at = f" at {', '.join(map(str, own_settings))}" if some else ""
        told.append(
            "Ran dense on some or all prompts, counted as divergence 0 and work 1: "
            f"layers {ranges(layers)}{at} ({note})."
        )
    return told


def _sentence(choice: Choice, result: CalibrationResult, num_layers: int) -> str:
    layers = sorted(choice.profile.layers)
    which = f"{len(layers)} of {num_layers} layers sparse ({ranges(layers) or 'none'})"
    if choice.goal == "drift_quantile":
        threshold, _ = drift_threshold([row.drift for row in result.drift], choice.value)
        text = (
            f"By drift: {which}, those at or below the {choice.value:g} quantile, {threshold:.3g}"
        )
    else:
        text = f"By sensitivity, {choice.goal.replace('_', ' ')} {choice.value:g}: {which}"
    if choice.divergence is not None and choice.work is not None:
        together = plus_minus(choice.divergence, choice.standard_error)
        text += f"; together {together} nats"
        if len(choice.prompt_divergences) > 1:
            most = max(choice.prompt_divergences)
            number = choice.prompt_divergences.index(most) + 1
            text += f" (most on prompt {number} of {len(choice.prompt_divergences)}: {most:.3g})"
        text += f", attention work {choice.work:.3f} of dense"
    if choice.summed_divergence is not None:
        text += f"; the layers' own divergences add up to {choice.summed_divergence:.3g}"
        if choice.divergence is None:
            work = _mean_work(choice, result.sensitivity, num_layers)
            text += f", their own work is {work:.3f} of dense; not measured together"
    if choice.steps_moved:
        way = "back" if choice.goal == "divergence_budget" else "on"
        text += f"; moved {way} by {choice.steps_moved} steps to meet it together"
    return text + "."


def _mean_work(choice: Choice, rows: Sequence[Sensitivity], num_layers: int) -> float:
    """Mean over the layers of the work that each alone was measured to leave."""
    own = {
        row.layer: row.work
        for row in rows
        if choice.profile.layers.get(row.layer) == row.setting.changes
    }
    return (math.fsum(own.values()) + num_layers - len(own)) / num_layers


def ranges(layers: Sequence[int]) -> str:
    """Return ascending numbers in short form.

    Example:
        >>> ranges([0, 2, 3, 4])
        '0, 2-4'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def draw(result: CalibrationResult, suffix: str) -> bytes:
    """Return the plot: drift and sensitivity side by side, or the one that was measured.

    Args:
        result: the calibration.
        suffix: ``".svg"`` or ``".png"``. The same result gives the same SVG.
    """
    panels: list[Callable[[Axes], None]] = []
    if result.drift:
        panels.append(partial(_draw_drift, result=result))
    if result.sensitivity:
        panels.append(partial(_draw_sensitivity, rows=of_whole_layers(result.sensitivity)))
    return drawn(panels, suffix)


def _draw_drift(axes: Axes, result: CalibrationResult) -> None:
    values = [row.drift for row in result.drift]
    styles = (("o", "C0", "at or below: sparse"), ("s", "C7", "above: dense"))
    for chosen, (marker, color, label) in zip((True, False), styles):
        rows = [row for row in result.drift if row.at_or_below == chosen]
        _draw_layers(axes, rows, "drift", fmt=marker, markersize=4, color=color, label=label)
    if min(values) > 0:  # one layer, often the first, can drift a hundred times as far as others
        axes.set_yscale("log")
    threshold, _ = drift_threshold(values, result.choices[0].value)
    axes.axhline(threshold, color="C3", linewidth=1, label=f"{result.choices[0].value:g} quantile")
    finish(axes, "layer", "drift, share of all layers'")


def _draw_sensitivity(axes: Axes, rows: Sequence[Sensitivity]) -> None:
    ran = [row for row in rows if row.sparse_prompts]
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in ran if row.setting == setting]
        style = {"fmt": "o-", "markersize": 3, "linewidth": 1, "label": str(setting)}
        _draw_layers(axes, own, "divergence", **style)
    positive = [row.divergence for row in ran if row.divergence > 0]
    if positive:  # zero has a place on this scale, unlike on a logarithmic one
        axes.set_yscale("symlog", linthresh=min(positive))
    axes.set_ylim(bottom=0)
    finish(axes, "layer", "KL with this layer alone sparse, nats")


def _draw_layers(
    axes: Axes, rows: Sequence[LayerDrift] | Sequence[Sensitivity], what: str, **style: Any
) -> None:
    """Draw one value of each layer with its standard error."""
    values = [getattr(row, what) for row in rows]
    errors = [row.standard_error or 0.0 for row in rows]
    axes.errorbar([row.layer for row in rows], values, yerr=errors, **style)
