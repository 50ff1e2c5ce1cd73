"""What ``tsa bench`` prints of a run: one line for each time, beside dense attention's."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from token_sparse_attention.benchmark.record import KERNEL_KINDS, Record
from token_sparse_attention.benchmark.runs import NoFigureError, Run, milliseconds, tokens

_TABLE_WIDTH = 100
COLUMNS = ("tokens", "what", "setting", "clock", "ms", "dense / this", "extra MiB")


def show(run: Run) -> None:
    """Print a run's records as a table, and the checks that failed."""
    # Files and narrow terminals get whole lines.
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if 0 < number < 4 else "right", no_wrap=True)
    for cells in times(run):
        table.add_row(*cells)
    console.print(table)
    for failed in run.result.failures:
        console.print(
            f"check failed: {failed.name} at {failed.seq_len:,} tokens"
            f"{', ' if _setting(failed) else ''}{_setting(failed)}: {failed.note}",
            style="red",
            markup=False,
        )


def times(run: Run) -> Iterator[tuple[str, ...]]:
    """Yield a line for each record; no time and no speed-up rests on a check that failed."""
    for record in run.result.records:
        ms, ratio = "-", "-"
        if record.kind == "skipped":
            ms = record.note.split(":")[0]
        elif record.median_ms is not None:
            ms = "check failed" if record.passed is False else f"{record.median_ms:.3g}"
            ratio = _speed_up(run, record)
        memory = "-" if record.peak_extra_mib is None else f"{record.peak_extra_mib:,.0f}"
        at = (tokens(record.seq_len), record.name, _setting(record), record.kind)
        yield (*at, ms, ratio, memory)


def _setting(record: Record) -> str:
    if record.drop_mass is not None:
        return f"drop_mass {record.drop_mass:g}"
    return "" if record.kept is None else f"{record.kept:.0%} kept"


def _speed_up(run: Run, record: Record) -> str:
    """How many times as fast as dense, where the whole operator or model was checked."""
    base = _dense(run, record)
    if record.kind not in KERNEL_KINDS or not record.passed or not (base and base.passed):
        return "-"
    return f"{milliseconds(base) / milliseconds(record):.2f}x"


def _dense(run: Run, record: Record) -> Record | None:
    """Return dense attention, or the dense model, at a record's length, by its clock if it can."""
    kinds = (record.kind, *KERNEL_KINDS)
    if record.suite == "prefill":
        return run.find("dense", record.seq_len, kinds=kinds)
    if record.drop_mass is not None:  # timed in turns with dense attention
        at = ("crossover/dense", record.kind, record.seq_len, record.drop_mass)
        beside = ((r.name, r.kind, r.seq_len, r.drop_mass) == at for r in run.result.records)
        return next((r for r, found in zip(run.result.records, beside) if found), None)
    try:
        return run.find(run.dense(record.seq_len).name, record.seq_len, kinds=kinds)
    except NoFigureError:
        return None
