"""Patterns, token sparsity and both: accuracy beside measured speed, as a Markdown table.

    python -m benchmarks.block_sparse.accuracy --results eval.jsonl --times times.json

The results are of `tsa eval`, the times of `benchmarks.frontier.layer_times`, with the same names
of configurations: attention alone, summed over all layers, on the model's own queries and keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from token_sparse_attention.evaluation.record import DENSE, EvalResults, load_results
from token_sparse_attention.evaluation.summary import Row, summarise


def table(results: EvalResults, times: Mapping[str, Any]) -> str:
    """Return one line per length and configuration, all tasks together.

    Args:
        results: of `tsa eval`.
        times: content of a file of `layer_times`.
    """
    head = ["tokens", "configuration", "score", "difference", "95% interval", "n", "kept"]
    head += ["speed-up of attention", "prompts timed"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in summarise(results):
        if row.task is None and row.length and row.configuration != DENSE and row.pairs:
            lines.append(f"| {' | '.join(_cells(row, _speeds(times, row)))} |")
    return "\n".join(lines) + "\n"


def _speeds(times: Mapping[str, Any], row: Row) -> list[float]:
    """The speed-ups of a row's configuration, one per prompt of its length."""
    return [
        sample["speed_up"][row.configuration]
        for sample in times["samples"]
        if sample["length"] == row.length and row.configuration in sample["speed_up"]
    ]


def _cells(row: Row, speeds: list[float]) -> list[str]:
    return [
        f"{(row.length or 0) // 1024}K",
        row.configuration,
        f"{row.score:.3f} of {row.dense_score:.3f}",
        f"{row.difference:+.3f}",
        f"{row.difference_low:+.3f} to {row.difference_high:+.3f}",
        str(row.pairs),
        f"{row.kept_share:.0%}",
        f"{median(speeds):.2f}x" if speeds else "-",
        str(len(speeds)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--times", type=Path, required=True)
    args = parser.parse_args()
    times = json.loads(args.times.read_text(encoding="utf-8"))
    print(table(load_results(args.results), times), end="")


if __name__ == "__main__":
    main()
