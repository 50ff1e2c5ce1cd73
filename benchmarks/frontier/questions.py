"""Every question of the study on the same 200 prompts a length: tables and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.frontier.version_1 import summarise
from benchmarks.markdown import markdown_table
from benchmarks.pooling import paired_scores
from benchmarks.style import figure_file, interval

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import Row, difference_interval

Describe = Callable[[Mapping[str, Any], Mapping[str, Any]], str]


def table(results: EvalResults, describe: Describe) -> str:
    """Return one line per point: its difference from dense at each length, and its work.

    How many prompts it has is told for the longest length; the others have them all.

    Args:
        results: of `benchmarks.frontier.screen`, of the tasks that count.
        describe: says in words what settings and a variant do.
    """
    rows = _rows(results)
    lengths = sorted({length for _, length in rows})
    names = [f"{length // 1024}K" for length in lengths]
    head = ["point", "what it runs", *names, f"n, {names[-1]}", f"work, {names[-1]}"]
    lines = [head]
    dense = [rows[DENSE, length] for length in lengths]
    cells = [f"{row.score:.3f} of {row.pairs} prompts" for row in dense]
    lines.append(["dense", "its score", *cells, str(dense[-1].pairs), "100%"])
    variants = results.header.arguments.get("variants", {})
    for name, settings in results.header.configurations.items():
        if name != DENSE:
            cells = [name, describe(settings or {}, variants.get(name, {}))]
            cells += [_difference(rows.get((name, length))) for length in lengths]
            last = rows.get((name, lengths[-1]))
            cells += [str(last.pairs), f"{last.work:.0%}"] if last else ["-", "-"]
            lines.append(cells)
    return markdown_table(lines)


def _rows(results: EvalResults) -> dict[tuple[str, int], Row]:
    """All tasks together, by configuration and length."""
    return {
        (row.configuration, row.length): row
        for row in summarise(results)
        if row.task is None and row.length and row.pairs
    }


def _difference(row: Row | None) -> str:
    if row is None:
        return "-"
    interval = f"{row.difference_low:+.3f} to {row.difference_high:+.3f}"
    return f"{row.difference:+.3f} ({interval})"


def defaults(results: EvalResults) -> str:
    """Return what the default method loses in replies with all layers sparse, by length."""
    rows = _rows(results)
    lines = [["tokens", "difference from dense", "prompts"]]
    for (name, length), row in rows.items():
        if name == "keys-only-all-layers":
            lines.append([f"{length // 1024}K", _difference(row), str(row.pairs)])
    return markdown_table(lines)


COMPARISONS = {
    "layers 0 and 6 dense, of zeros": ("published-sensitive-dense", "published"),
    "a window of 512 instead of zeros": ("drop-0.005", "published-sensitive-dense"),
    "window 128 instead of 32": ("window-128", "window-32"),
    "window 512 instead of 128": ("window-512", "window-128"),
    "window 2048 instead of 512": ("window-2048", "window-512"),
    "4 sinks, window 512": ("window-512-sinks", "window-512"),
    "4 sinks, window 2048": ("window-2048-sinks", "window-2048"),
    "budgets per head": ("per-head", "window-512"),
    "scored by 32 queries instead of 128": ("scored-by-32", "window-512"),
    "scored by 512 queries instead of 128": ("scored-by-512", "window-512"),
    "half of the scoring queries spread": ("spread-queries", "window-512"),
    "values' norms": ("value-norms", "window-512"),
    "8 neighbours on each side": ("neighbours", "window-512"),
    "drop mass 0.05 instead of 0.2": ("drop-0.05", "drop-0.2"),
    "all layers, queries dropped": ("all-layers", "window-512"),
    "all layers, none dropped": ("keys-only-all-layers", "keys-only"),
    "no queries dropped": ("keys-only", "window-2048-sinks"),
}
"""What is asked, and the two points that answer it."""


def compared(results: EvalResults) -> str:
    """Return how two points differ on the prompts that both have, by length.

    Args:
        results: of `benchmarks.frontier.screen`, of the tasks that count.
    """
    lengths = sorted({sample.length for sample in results.samples})
    head = ["what is changed", *(f"{length // 1024}K" for length in lengths)]
    lines = [head]
    for what, (point, base) in COMPARISONS.items():
        cells = [what]
        for length in lengths:
            pairs = paired_scores(results, length, base, point)
            cells.append(_paired(pairs) if pairs else "-")
        lines.append(cells)
    return markdown_table(lines)


def _paired(pairs: list[tuple[float, float]]) -> str:
    low, high = difference_interval(pairs)
    difference = fmean(other - score for score, other in pairs)
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f}; {len(pairs)})"


FAMILIES = {
    "keys": ("no queries dropped", "tab:green"),
    "window": ("window", "tab:blue"),
    "drop": ("drop mass", "tab:orange"),
    "published": ("zeros", "tab:red"),
}
"""Label and colour of points, by the first word of their names."""
OTHERS = ("other questions", "tab:gray")
LABELLED = (
    "keys-only",
    "keys-only-all-layers",
    "window-32",
    "window-2048",
    "drop-0.005",
    "drop-0.6",
    "published",
    "published-drift-layers",
    "all-layers",
)


def draw(results: EvalResults, path: Path) -> None:
    """Draw each point's difference from dense over its attention work, one panel per length."""
    rows = _rows(results)
    lengths = sorted({length for _, length in rows})
    size = (5 * len(lengths), 5)
    with figure_file(path, 1, len(lengths), size=size, sharex=True, sharey=True) as panels:
        for axes, length in zip(panels, lengths):
            for (name, where), row in rows.items():
                if name != DENSE and where == length and row.difference is not None:
                    _draw_point(axes, name, row)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xlim(0, 1)
            axes.set_title(f"{length // 1024}K tokens")
            axes.set_xlabel("attention work, share of dense")
        panels[0].set_ylabel("score minus dense score of the same prompts, 95% interval")
        for kind, color in (*FAMILIES.values(), OTHERS):
            panels[0].plot([], [], "o", color=color, label=kind)
        panels[0].legend(loc="lower left", fontsize=8)


def _draw_point(axes: Any, name: str, row: Row) -> None:
    color = FAMILIES.get(name.partition("-")[0], OTHERS)[1]
    interval(axes, row.work, row.difference_low, row.difference, row.difference_high, color=color)
    if name in LABELLED:
        right = row.work > 0.6
        axes.annotate(
            name, (row.work, row.difference), (-6 if right else 6, -3),
            textcoords="offset points", ha="right" if right else "left", fontsize=7,
        )  # fmt: skip
