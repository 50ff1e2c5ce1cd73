"""Markdown: tables, what stands in their cells, and pages whose tables are generated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from token_sparse_attention.benchmark.runs import CHECK_FAILED, NoFigureError, Run
from token_sparse_attention.errors import UsageError

EMPTY = "Not measured yet."
NONE = "-"
_MARKER = re.compile(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", re.DOTALL)

Rows = Iterator[Sequence[str]]
Table = Callable[[Sequence[Run]], Rows]


class Page(NamedTuple):
    """A Markdown file whose tables and figures are made from result files.

    Attributes:
        path: the file.
        tables: what stands between its markers, by their names.
        figures: what draws a file of ``figures/``, by its name without ``.svg``.
    """

    path: Path
    tables: Mapping[str, str]
    figures: Mapping[str, Callable[[Path], object]] = {}

    def files(self) -> dict[Path, str]:
        """Return what the page and its figures are to hold."""
        text = fill(self.path.read_text(encoding="utf-8"), self.tables)
        found = {self.path: text}
        with TemporaryDirectory() as folder:
            for name, draw in self.figures.items():
                draw(drawn := Path(folder) / f"{name}.svg")
                at = self.path.parent / "figures" / drawn.name
                found[at] = drawn.read_text(encoding="utf-8")
        return found

    def markers(self) -> list[str]:
        """Return the names of the page's markers, in order."""
        return _MARKER.findall(self.path.read_text(encoding="utf-8"))


def fill(document: str, tables: Mapping[str, str]) -> str:
    """Return the document with these tables between its markers.

    Args:
        document: Markdown with ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` lines.
        tables: by name, in Markdown.

    Raises:
        UsageError: if a marker names no table, or there is none.
    """
    names = _MARKER.findall(document)
    unknown = [name for name in names if name not in tables]
    if unknown or not names:
        raise UsageError(
            f"the document must have markers named after {', '.join(tables)}; "
            f"got {unknown[0] if unknown else 'none'}"
        )
    return _MARKER.sub(
        lambda match: f"<!-- begin {match[1]} -->\n{tables[match[1]]}<!-- end {match[1]} -->",
        document,
    )


def build(name: str, runs: Sequence[Run], tables: Mapping[str, Table]) -> str:
    """Return one of `tables`, in Markdown."""
    lines = list(tables[name](runs))
    return markdown_table(lines) if len(lines) > 1 else EMPTY + "\n"


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


def figure_or(claim: Callable[..., str], *arguments: Any) -> str:
    """Return ``claim(*arguments)``, or why there is no such figure."""
    try:
        return claim(*arguments)
    except NoFigureError as error:
        return f"**{CHECK_FAILED}**" if str(error) == CHECK_FAILED else NONE


def number(value: float) -> str:
    """Return three significant digits; all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
