"""One look for every figure, and files that are the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from token_sparse_attention.benchmark.runs import tokens

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "token-sparse-attention",
}
PANEL = (6.4, 3.4)
"""Width and height of a panel, in inches."""


@contextmanager
def figure_file(
    path: Path,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = PANEL,
    **shared: bool,
) -> Iterator[Any]:
    """Give a figure's axes, one or an array of them, and then save it as an SVG file.

    Args:
        path: the file.
        rows: of panels.
        columns: of panels.
        size: of the whole figure, in inches.
        shared: ``sharex`` and ``sharey`` of the panels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure: Any = Figure(figsize=size, layout="constrained")
        yield figure.subplots(rows, columns, **shared)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def token_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Make the x axis one of these numbers of tokens, doubling."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(length) for length in lengths], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def interval(
    axes: Any, x: float, low: float | None, middle: float | None, high: float | None, **look: Any
) -> None:
    """Draw a point with its interval; `look` is the point's colour, marker and label."""
    axes.plot([x, x], [low, high], color=look.get("color"), alpha=0.4)
    axes.plot(x, middle, linestyle="", **{"marker": "o", "markersize": 5} | look)
