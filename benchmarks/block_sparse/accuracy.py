"""Patterns, token sparsity and both: accuracy beside measured speed, in docs/pattern-accuracy.md.

    python -m benchmarks.block_sparse.accuracy

The results are of `tsa eval`, the times of `benchmarks.frontier.layer_times`, with the same names
of configurations: attention alone, summed over all layers, on the model's own queries and keys.
The densities are of `benchmarks.block_sparse.density`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from token_sparse_attention.benchmark.tables import fill
from token_sparse_attention.evaluation.record import DENSE, EvalResults, load_results
from token_sparse_attention.evaluation.summary import Row, difference_interval, summarise

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pattern-accuracy.md"
FIGURE = ROOT / "docs" / "figures" / "pattern-accuracy.svg"
RESULTS = ROOT / "benchmarks" / "results" / "patterns" / "answers.jsonl"
TIMES = RESULTS.with_name("times.json")
DENSITIES = RESULTS.with_name("density.json")
SPARSE = "F"
"""The configuration of token sparsity alone, which others add to a pattern."""


def name_of(configuration: str) -> str:
    """Return what the page calls a configuration."""
    words = {SPARSE: "token sparsity", "published": "published rule"}
    return " + ".join(words.get(part, part) for part in configuration.split("+"))


def table(results: EvalResults, times: Mapping[str, Any]) -> str:
    """Return one line per length and configuration, all tasks together.

    Args:
        results: of `tsa eval`.
        times: content of a file of `layer_times`.
    """
    head = ["tokens", "configuration", "score", "difference", "95% interval", "n", "kept"]
    head += ["speed-up of attention", "prompts timed"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in _rows(results):
        lines.append(
            f"| {' | '.join(_cells(row, speeds_of(times, row.length or 0, row.configuration)))} |"
        )
    return "\n".join(lines) + "\n"


def _rows(results: EvalResults) -> list[Row]:
    """Each length and sparse configuration, all tasks together."""
    return [
        row
        for row in summarise(results)
        if row.task is None and row.length and row.configuration != DENSE and row.pairs
    ]


def combined(results: EvalResults, times: Mapping[str, Any]) -> str:
    """Return each pattern with token sparsity beside the same pattern alone, by length."""
    head = ["tokens", "pattern", "alone", "with token sparsity", "difference", "95% interval", "n"]
    head += ["speed-up over the pattern alone"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for length, alone, pairs in _combinations(results):
        both = speeds_of(times, length, f"{alone}+{SPARSE}")
        ratios = [b / a for a, b in zip(speeds_of(times, length, alone), both)]
        low, high = difference_interval(pairs)
        first, second = (fmean(column) for column in zip(*pairs))
        cells = [
            f"{length // 1024}K",
            alone,
            f"{first:.3f}",
            f"{second:.3f}",
            f"{second - first:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            str(len(pairs)),
            f"{median(ratios):.2f}x" if ratios else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _combinations(results: EvalResults) -> Iterator[tuple[int, str, list[tuple[float, float]]]]:
    """Yield length, pattern, and the scores of the pattern alone and with token sparsity."""
    names = results.header.configurations
    scores = {sample.key: sample.score for sample in results.samples}
    for length in sorted({sample.length for sample in results.samples}):
        for alone in names:
            pairs = [
                (score, both)
                for key, score in scores.items()
                if key[1] == length and key[3] == alone and score is not None
                if (both := scores.get((*key[:3], f"{alone}+{SPARSE}"))) is not None
            ]
            if pairs:
                yield length, alone, pairs


def speeds_of(times: Mapping[str, Any], length: int, configuration: str) -> list[float]:
    """The speed-ups of a configuration, one per prompt of this length."""
    return [
        sample["speed_up"][configuration]
        for sample in times["samples"]
        if sample["length"] == length and configuration in sample["speed_up"]
    ]


def _cells(row: Row, speeds: list[float]) -> list[str]:
    return [
        f"{(row.length or 0) // 1024}K",
        name_of(row.configuration),
        f"{row.score:.3f} of {row.dense_score:.3f}",
        f"{row.difference:+.3f}",
        f"{row.difference_low:+.3f} to {row.difference_high:+.3f}",
        str(row.pairs),
        f"{row.kept_share:.0%}",
        f"{median(speeds):.2f}x" if speeds else "-",
        str(len(speeds)),
    ]


def runs(results: EvalResults, *files: Mapping[str, Any]) -> str:
    """Return what the replies, the times and the densities were measured on."""
    head = ["what", "device", "commit", "versions", "seed"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    measured = [(results.header.provenance, results.header.arguments)]
    measured += [(one["provenance"], one["arguments"]) for one in files]
    for what, (about, asked) in zip(("replies", "times", "densities"), measured):
        versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
        cells = [what, about["device"], f"`{about['commit'][:12]}`", versions]
        cells.append(str(asked["seed"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for layer in range(len(samples[0]["density"][patterns[0]])):
        cells = [
            fmean(s["density"][pattern][layer] for s in samples if s["length"] == length)
            for length, pattern in columns
        ]
        lines.append(f"| {layer} | {' | '.join(f'{cell:.0%}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def tables(
    results: EvalResults, times: Mapping[str, Any], densities: Mapping[str, Any]
) -> dict[str, str]:
    """Return the page's tables as Markdown, by name."""
    return {
        "accuracy": table(results, times),
        "combined": combined(results, times),
        "density": density(densities),
        "runs": runs(results, times, densities),
    }


def draw(results: EvalResults, times: Mapping[str, Any]) -> None:
    """Draw score differences with their intervals over speed, one panel per length."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "pattern-accuracy"
    rows = _rows(results)
    lengths = sorted({row.length for row in rows if row.length})
    figure, panels = plt.subplots(1, len(lengths), figsize=(13, 4.5), sharey=True, squeeze=False)
    for axes, length in zip(panels[0], lengths):
        for number, row in enumerate(one for one in rows if one.length == length):
            speeds = speeds_of(times, length, row.configuration)
            if not speeds:
                continue
            color, speed = f"C{number}", median(speeds)
            axes.plot([speed] * 2, [row.difference_low, row.difference_high], color=color)
            marker = "s" if SPARSE in row.configuration else "o"
            label = name_of(row.configuration)
            axes.plot(speed, row.difference, marker, color=color, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := [0.125, 0.25, 0.5, 1, 2, 4], [f"{tick:g}x" for tick in ticks])
        axes.set_xlabel("speed-up of attention over dense")
        axes.set_title(f"{length // 1024}K tokens")
    panels[0][0].set_ylabel("score minus dense score, 95% interval")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def load() -> tuple[EvalResults, dict[str, Any], dict[str, Any]]:
    """Return the results, the times and the densities that the page is about."""
    times, densities = (json.loads(path.read_text("utf-8")) for path in (TIMES, DENSITIES))
    return load_results(RESULTS), times, densities


def main() -> None:
    """Write the page and the figure."""
    results, times, densities = load()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(text, tables(results, times, densities)), encoding="utf-8")
    draw(results, times)


if __name__ == "__main__":
    main()
