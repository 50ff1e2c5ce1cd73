"""The pages of block-sparse patterns: their speed, and their accuracy beside it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.block_sparse import accuracy
from benchmarks.block_sparse.tables import BLOCK_TABLES
from benchmarks.markdown import Page, build
from benchmarks.operator.page import RESULTS, load_runs
from benchmarks.pooling import pooled

FOLDER = Path(__file__).parent


def pages() -> list[Page]:
    """Return both pages."""
    runs = load_runs(RESULTS / "block")
    speed = {name: build(name, runs, BLOCK_TABLES) for name in BLOCK_TABLES}
    rounds, times, densities = accuracy.load()
    return [
        Page(FOLDER / "speed.md", speed),
        Page(
            FOLDER / "accuracy.md",
            accuracy.tables(rounds, times, densities),
            {"accuracy": lambda path: accuracy.draw(pooled(rounds), times, path)},
        ),
    ]
