"""Plots that commands write to a file: which files these may be, and one look for all."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from token_sparse_attention.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
_STYLE: Any = {"svg.hashsalt": "token-sparse-attention", "svg.fonttype": "none", "font.size": 9}
_SIZE = (6.4, 3.4)


def check_plot(path: Path) -> None:
    """Raise before anything is measured if the plot could not be drawn.

    Raises:
        UsageError: if the file's ending is unknown or matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"--plot must end in {' or '.join(FORMATS)}, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib: pip install 'token-sparse-attention[report]'"
        ) from error


def drawn(panels: list[Callable[[Axes], None]], suffix: str) -> bytes:
    """Return a plot.

    Args:
        panels: what draws each panel, from the left.
        suffix: ``".svg"`` or ``".png"``. The same panels give the same SVG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_SIZE[0] * len(panels), _SIZE[1]), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            draw(axes)
        buffer = io.BytesIO()
        form = suffix.removeprefix(".")
        about = {"Date": None, "Creator": None} if form == "svg" else {}
        figure.savefig(buffer, format=form, dpi=150, metadata=about)
    return buffer.getvalue()


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Label axes, and add a grid and a legend."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
