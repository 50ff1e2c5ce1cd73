"""Tables in Markdown, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table of these lines of cells; the first one is its head."""
    head, *body = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return "".join([head, "|" + "---|" * len(lines[0]) + "\n", *body])


def mean_cell(values: Sequence[float]) -> str:
    """Return the mean of signed values, its standard error, and how many they are."""
    return f"{fmean(values):+.2f} ± {stdev(values) / len(values) ** 0.5:.2f} ({len(values)})"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return a noun and its numbers, as in "layer 3" or "heads 0, 5"."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
