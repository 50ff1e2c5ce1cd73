"""The page of the operator's and of whole prefills' times."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.markdown import Page, build
from benchmarks.operator.charts import FIGURES, draw
from benchmarks.operator.sampling_tables import SAMPLING_TABLES
from benchmarks.operator.tables import TABLES

from token_sparse_attention.benchmark.runs import Run

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"


def load_runs(folder: Path = RESULTS) -> list[Run]:
    """Return a folder's files of records, in the order of their names."""
    return [Run.load(path) for path in sorted(folder.glob("*.json"))]


def pages() -> list[Page]:
    """Return the page, made from the files of records in `RESULTS`."""
    runs = load_runs()
    both = {**TABLES, **SAMPLING_TABLES}
    tables = {name: build(name, runs, both) for name in both}
    figures = {name: partial(draw, name, runs) for name in FIGURES}
    return [Page(FOLDER / "study.md", tables, figures)]
