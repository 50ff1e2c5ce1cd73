"""Patterns, alone and with token selection: accuracy beside measured speed.

The results are of `tsa eval`, the times of `layer_times`, with the same names of configurations:
attention alone, summed over all layers, on the model's own queries and keys, with its own heads
and with each of them four times. The densities are of `density`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.pooling import load_folder, pooled
from benchmarks.style import figure_file, interval

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import Row, summarise

RESULTS = Path(__file__).parents[1] / "results" / "patterns"
TIMES = {"8 heads": RESULTS / "times.json", "32 heads": RESULTS / "times-32-heads.json"}
DENSITIES = RESULTS / "density.json"


def name_of(configuration: str) -> str:
    """Return what the page calls a configuration."""
    return configuration.replace("+published", " + token selection")


Times = Mapping[str, Mapping[str, Any]]
"""Contents of files of `layer_times`, by the number of heads."""


def table(results: EvalResults, times: Times) -> str:
    """Return one line per length and configuration, all tasks together.

    Args:
        results: of `tsa eval`.
        times: what the speed-ups are from, one column for each.
    """
    head = ["tokens", "configuration", "score", "difference"]
    head += [f"speed-up, {heads}" for heads in times]
    head += ["95% interval", "n", "kept"]
    lines = [head]
    for row in _rows(results):
        speeds = [speeds_of(one, row.length or 0, row.configuration) for one in times.values()]
        cells = _cells(row)
        lines.append([*cells[:4], *map(_median, speeds), *cells[4:]])
    return markdown_table(lines)


def at_length(results: EvalResults, times: Times, length: int) -> str:
    """Return the score and the speed-up of each configuration at one length.

    Args:
        results: of `tsa eval`.
        times: what the speed-ups are from, one column for each.
        length: in tokens.
    """
    lines = [["settings", "score, dense", "95% interval of the difference", "prompts"]]
    lines[0] += [f"speed-up, {heads}" for heads in times]
    for row in _rows(results):
        if row.length == length:
            cells = [name_of(row.configuration), f"{row.score:.3f}, {row.dense_score:.3f}"]
            cells += [f"{row.difference_low:+.3f} to {row.difference_high:+.3f}", str(row.pairs)]
            speeds = (speeds_of(one, length, row.configuration) for one in times.values())
            lines.append([*cells, *map(_median, speeds)])
    return markdown_table(lines)


def _rows(results: EvalResults) -> list[Row]:
    """Each length and sparse configuration, all tasks together."""
    return [
        row
        for row in summarise(results)
        if row.task is None and row.length and row.configuration != DENSE and row.pairs
    ]


def _median(speeds: Sequence[float]) -> str:
    """The median, and in brackets of how many prompts."""
    return f"{median(speeds):.2f}x ({len(speeds)})" if speeds else "-"


def speeds_of(times: Mapping[str, Any], length: int, configuration: str) -> list[float]:
    """The speed-ups of a configuration, one per prompt of this length."""
    return [
        sample["speed_up"][configuration]
        for sample in times["samples"]
        if sample["length"] == length and configuration in sample["speed_up"]
    ]


def _cells(row: Row) -> list[str]:
    return [
        f"{(row.length or 0) // 1024}K",
        name_of(row.configuration),
        f"{row.score:.3f} of {row.dense_score:.3f}",
        f"{row.difference:+.3f}",
        f"{row.difference_low:+.3f} to {row.difference_high:+.3f}",
        str(row.pairs),
        f"{row.kept_share:.0%}",
    ]


def runs(rounds: Sequence[EvalResults], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the replies, and the files by their names, were measured on."""
    head = ["what", "device", "commit", "versions", "seed"]
    lines = [head]
    measured = [("replies", one.header.provenance, one.header.arguments) for one in rounds]
    measured += [(name, one["provenance"], one["arguments"]) for name, one in files.items()]
    for what, about, asked in measured:
        versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
        cells = [what, about["device"], f"`{about['commit'][:12]}`", versions]
        cells.append(str(asked["seed"]))
        lines.append(cells)
    return markdown_table(lines)


def density(found: Mapping[str, Any]) -> str:
    """Return the share of blocks that each layer's pattern keeps, the mean over the prompts.

    Args:
        found: content of a file of `density`.
    """
    samples = found["samples"]
    lengths = sorted({sample["length"] for sample in samples})
    patterns = list(samples[0]["density"])
    columns = [(length, pattern) for length in lengths for pattern in patterns]
    head = ["layer", *(f"{pattern}, {length // 1024}K" for length, pattern in columns)]
    lines = [head]
    for layer in range(len(samples[0]["density"][patterns[0]])):
        cells = [
            fmean(s["density"][pattern][layer] for s in samples if s["length"] == length)
            for length, pattern in columns
        ]
        lines.append([str(layer), *(f"{cell:.0%}" for cell in cells)])
    return markdown_table(lines)


def tables(
    rounds: Sequence[EvalResults], times: Times, densities: Mapping[str, Any]
) -> dict[str, str]:
    """Return the page's tables as Markdown, by name."""
    results = pooled(rounds)
    files = {f"times, {heads}": one for heads, one in times.items()}
    return {
        "accuracy": table(results, times),
        "density": density(densities),
        "runs": runs(rounds, {**files, "densities": densities}),
    }


def draw(results: EvalResults, times: Times, path: Path) -> None:
    """Draw score differences with their intervals over speed, by length and number of heads."""
    rows = _rows(results)
    lengths = sorted({row.length for row in rows if row.length})
    shape = (len(times), len(lengths))
    with figure_file(path, *shape, size=(13, 7), sharex=True, sharey=True) as panels:
        for (heads, timed), line in zip(times.items(), panels):
            for axes, length in zip(line, lengths):
                _draw_panel(axes, [row for row in rows if row.length == length], timed)
                axes.set_title(f"{length // 1024}K tokens, {heads}")
            line[0].set_ylabel("score minus dense score,\n95% interval")
        for axes in panels[-1]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks := [0.125, 0.25, 0.5, 1, 2, 4], [f"{tick:g}x" for tick in ticks])
            axes.set_xlabel("speed-up of attention over dense")
        panels[0][-1].legend(fontsize=7)


def _draw_panel(axes: Any, rows: Sequence[Row], timed: Mapping[str, Any]) -> None:
    for number, row in enumerate(rows):
        speeds = speeds_of(timed, row.length or 0, row.configuration)
        if speeds:
            ends = (row.difference_low, row.difference, row.difference_high)
            label = name_of(row.configuration)
            interval(axes, median(speeds), *ends, color=f"C{number}", label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8)


def load() -> tuple[list[EvalResults], dict[str, Any], dict[str, Any]]:
    """Return the results, the times and the densities that the page is about."""
    times = {heads: json.loads(path.read_text("utf-8")) for heads, path in TIMES.items()}
    rounds = list(load_folder(RESULTS).values())
    return rounds, times, json.loads(DENSITIES.read_text("utf-8"))
