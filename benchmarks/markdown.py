"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table of these lines of cells; the first one is its head."""
    head, *body = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return "".join([head, "|" + "---|" * len(lines[0]) + "\n", *body])
