"""What ``tsa eval`` prints of results: the tables, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import Row, chosen_samples, summarise

_TABLE_WIDTH = 110
COLUMNS = (
    *("length", "configuration", "n", "score", "difference", "95% interval", "loss"),
    *("loss below", "kept", "work", "prefill"),
)


def show(results: EvalResults, path: Path, *, as_json: bool) -> None:
    """Print what an evaluation compares, as tables or as one JSON object.

    Args:
        results: the results.
        path: their file, which is named.
        as_json: print JSON.
    """
    rows = summarise(results)
    unscored = sum(result.score is None for result in results.samples)
    if as_json:
        content = {"results": str(path), "unscored": unscored, "rows": [asdict(r) for r in rows]}
        print(json.dumps(content, indent=2))
        return
    # Files and narrow terminals get whole lines.
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    console.print(_table("All tasks together", [row for row in rows if row.task is None]))
    tasks = results.header.tasks
    for task in tasks if len(tasks) > 1 else ():
        console.print(_table(task, [row for row in rows if row.task == task]))
    for row in rows:
        if row.task is None and row.length is not None and ran_dense(row):
            of_length = f" of {row.length:,} tokens" if row.length else ""
            how = "ran dense" if _all_dense(results, row) else "left nothing out"
            console.print(
                f"note: {row.configuration!r} {how} in every layer of every sample"
                f"{of_length}: this compares dense with dense",
                markup=False,
                highlight=False,
            )
    if unscored:
        console.print(
            f"{unscored} replies have no score yet: where lm-eval is installed, run "
            f"tsa eval --score {path} --samples FILE",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def ran_dense(row: Row) -> bool:
    """Return whether a configuration other than the dense one left no attention out."""
    return row.configuration != DENSE and row.work == 1.0 and not row.work_is_bound


def _all_dense(results: EvalResults, row: Row) -> bool:
    """Return whether no layer took the sparse path in a row's samples."""
    chosen = chosen_samples(results, row.configuration, row.length or 0)
    return all(layer is None for sample in chosen for layer in sample.kept or ())


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Return a table; the rows of all lengths together only where there are several."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    several = len({row.length for row in rows if row.length is not None}) > 1
    for row in rows:
        if row.length is not None or several:
            table.add_row(*map(escape, cells(row)))
    return table


def cells(row: Row) -> tuple[str, ...]:
    """Return what tables show of a row, under `COLUMNS`."""
    return (
        "all" if row.length is None else f"{row.length:,}" if row.length else "-",
        row.configuration,
        str(row.samples),
        _cell("{:.3f}", row.score),
        _cell("{:+.3f}", row.difference),
        _cell("{:+.3f} to {:+.3f}", row.difference_low, row.difference_high),
        _cell("{:+.1%}", row.relative_loss),
        _cell("{:+.1%}", row.relative_loss_upper),
        f"{row.kept_share:.1%}",
        row.shown_work,
        f"{row.seconds:#.3g} s",
    )


def _cell(form: str, *values: float | None) -> str:
    return "-" if None in values else form.format(*values)
