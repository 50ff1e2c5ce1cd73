"""Figures whose files are the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure_file(path: Path) -> Iterator[Any]:
    """Give ``matplotlib.pyplot`` for one figure, which is then saved as an SVG file."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        yield plt
        figure = plt.gcf()
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
