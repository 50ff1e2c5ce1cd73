"""The pages of the operator's and of block-sparse attention's times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.block_sparse.tables import BLOCK_TABLES
from benchmarks.markdown import Table, build, fill
from benchmarks.operator.figures import draw
from benchmarks.operator.sampling_tables import FAR_TABLES
from benchmarks.operator.tables import TABLES

from token_sparse_attention.benchmark.runs import Run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES: dict[Path, tuple[Path, Mapping[str, Table]]] = {
    ROOT / "docs" / "benchmarks.md": (RESULTS, {**TABLES, **FAR_TABLES}),
    ROOT / "docs" / "patterns.md": (RESULTS / "block", BLOCK_TABLES),
}
"""Each page's folder of results and its tables."""


def load_runs(folder: Path) -> list[Run]:
    """Return a folder's result files, in the order of their names."""
    return [Run.load(path) for path in sorted(folder.glob("*.json"))]


def render(
    document: str,
    runs: Sequence[Run],
    figures: Sequence[str],
    tables: Mapping[str, Table],
) -> str:
    """`fill` the document with tables of `runs`.

    Args:
        document: see `fill`.
        runs: what was measured.
        figures: the figures there are; the one called like a table follows it.
        tables: by name.
    """
    built = {name: build(name, runs, tables) for name in tables}
    for name in built.keys() & set(figures):
        built[name] += f"\n![{name}](figures/{name}.svg)\n"
    return fill(document, built)


def make_page(page: Path) -> dict[Path, str]:
    """Return what a page and its figures are to hold, by file."""
    folder, tables = PAGES[page]
    runs = load_runs(folder)
    figures = {name: svg for name, svg in draw(runs).items() if name in tables}
    files = {page.parent / "figures" / f"{name}.svg": svg for name, svg in figures.items()}
    text = page.read_text(encoding="utf-8")
    return {page: render(text, runs, list(figures), tables), **files}
