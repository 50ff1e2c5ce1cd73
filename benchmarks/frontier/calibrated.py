"""Tables of what `tsa calibrate` measured and chose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import fsum
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table, numbered

from token_sparse_attention.calibration.record import (
    CalibrationResult,
    HeadSensitivity,
    Sensitivity,
)
from token_sparse_attention.calibration.sensitivity import choose_profile
from token_sparse_attention.calibration.show import of_whole_layers


def calibration(path: Path, drift: Path) -> str:
    """Return each layer's divergence by its number of samples beside its drift.

    Args:
        path: what `tsa calibrate --method sensitivity --samples` measured.
        drift: what ``--method drift`` did.
    """
    result, drifts = CalibrationResult.load(path), CalibrationResult.load(drift)
    drifting = {one.layer: one.drift for one in drifts.drift}
    by_drift = drifts.choices[0].profile.layers
    chosen = result.choices[0].profile.layers
    whole = of_whole_layers(result.sensitivity)
    counts = sorted({int(row.setting.value) for row in whole})
    head = ["layer", *(f"{count:,} samples" for count in counts), "chosen", "drift", "by drift"]
    lines = [head]
    layers: dict[int, dict[int, Sensitivity]] = defaultdict(dict)
    for row in whole:
        layers[row.layer][int(row.setting.value)] = row
    for layer, rows in layers.items():
        cells = [_cost(rows[count].divergence, rows[count].standard_error) for count in counts]
        own = chosen.get(layer)
        listed = [f"{own['num_samples']:,}", *dense_heads(own)] if own else ["dense"]
        cells.append(", ".join(listed))
        cells += [f"{drifting[layer]:.1e}", "sparse" if layer in by_drift else "dense"]
        lines.append([str(layer), *cells])
    return markdown_table(lines)


def goals(path: Path, targets: Iterable[float]) -> str:
    """Return what the same measurements choose for other target speed-ups.

    Args:
        path: as for `calibration`.
        targets: how many times less attention work to aim at.
    """
    result = CalibrationResult.load(path)
    counts = sorted({int(row.setting.value) for row in result.sensitivity}, reverse=True)
    layers = sorted({row.layer for row in result.sensitivity})
    head = ["attention work", "dense", *(f"{count:,} samples" for count in counts)]
    head.append("sum of divergences")
    lines = [head]
    for target in targets:
        choice = choose_profile(result.sensitivity, result.base, "target_speedup", target)
        chosen = choice.profile.layers
        cells = [f"1/{target:g}", _listed(str(layer) for layer in layers if layer not in chosen)]
        cells += [
            _listed(_layer(n, one) for n, one in chosen.items() if one["num_samples"] == count)
            for count in counts
        ]
        lines.append([*cells, f"{choice.summed_divergence:.1e}"])
    return markdown_table(lines)


def _listed(layers: Iterable[str]) -> str:
    return ", ".join(layers) or "-"


def _layer(number: int, changes: Mapping[str, Any]) -> str:
    return " ".join([str(number), *(f"({heads})" for heads in dense_heads(changes))])


def dense_heads(settings: Mapping[str, Any]) -> list[str]:
    """Say which heads the settings leave dense, as in "heads 0, 5 dense"; nothing if none."""
    heads = settings.get("dense_heads") or ()
    return [f"{numbered('head', heads)} dense"] if heads else []


def single_heads(path: Path, most: int = 3) -> str:
    """Return what the costliest heads of the layers cost that were measured head by head.

    Args:
        path: as for `goals`.
        most: how many heads of a layer to name; the others' costs are added up.
    """
    result = CalibrationResult.load(path)
    layers: dict[int, list[HeadSensitivity]] = defaultdict(list)
    for one in result.heads:
        layers[one.layer].append(one)
    lines = [["layer", "samples", "costliest heads", "all others"]]
    for layer, heads in layers.items():
        heads.sort(key=lambda one: -one.divergence)
        named = [f"{one.head}: {_cost(one.divergence, one.standard_error)}" for one in heads]
        others = fsum(one.divergence for one in heads[most:])
        samples = f"{int(heads[0].setting.value):,}"
        lines.append([str(layer), samples, "; ".join(named[:most]), f"{others:.1e}"])
    return markdown_table(lines)


def _cost(divergence: float, error: float | None) -> str:
    return f"{divergence:.1e}" if error is None else f"{divergence:.1e} ± {error:.0e}"
