"""What ``tsa fidelity`` prints of results, and its plot; needs neither rich nor a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from token_sparse_attention.evaluation.summary import show_work
from token_sparse_attention.fidelity.prompts import SHAPES
from token_sparse_attention.fidelity.record import FidelityResults
from token_sparse_attention.fidelity.summary import Interval, Row, summarise
from token_sparse_attention.plots import drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    *("configuration", "prompts", "KL per token", "95% interval", "vs first", "same top token"),
    *("loss change", "KL, 95th pct.", "worst prompt", "kept", "work", "first token", "dense"),
)
_LEGEND = (
    "KL(dense || sparse) in nats; loss change: of an answer token's negative log-likelihood. "
    "First token: mean seconds."
)


def show(results: FidelityResults, *, as_json: bool) -> None:
    """Print what was measured, as tables or as one JSON object."""
    rows = summarise(results)
    if as_json:
        about = {name: getattr(results.header, name) for name in ("provenance", "arguments")}
        print(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2))
        return
    arguments, device = results.header.arguments, results.header.provenance["device"]
    print(f"{arguments['model']}, {arguments['dtype']}, on {device}")
    for line in lines(rows):
        print(line)


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the tables as lines: all shapes of a length together, and each shape."""
    shown, before = list[str](), None
    for row in rows:
        if before != (row.length, row.shape):
            before = (row.length, row.shape)
            own = [one for one in rows if (one.length, one.shape) == before]
            what = "all shapes" if row.shape is None else f"{row.shape}: {SHAPES[row.shape]}"
            shown += ["", f"{row.length:,} tokens, {what}", *_table(own)]
    for row in rows:
        if row.shape is None and row.work == 1 and not row.work_is_bound:
            shown.append(
                f"note: {row.configuration!r} left nothing out of prompts of {row.length:,} "
                "tokens: this compares dense with dense"
            )
    return [*shown, "", _LEGEND]


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths))
        )
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.configuration,
        str(row.prompts),
        f"{row.divergence:.4f}",
        _interval(row.divergence_interval, ".4f"),
        "-" if row.ratio is None else f"{row.ratio:.2f} ({_interval(row.ratio_interval, '.2f')})",
        f"{row.agreement:.1%}",
        f"{row.loss_change:+.4f}",
        f"{row.tail:.4f}",
        f"{row.worst:.4f} (#{row.worst_index})",
        f"{row.kept_share:.1%}",
        show_work(row.work, row.work_is_bound),
        f"{row.seconds:#.3g} s",
        f"{row.dense_seconds:#.3g} s",
    )


def _interval(interval: Interval, form: str) -> str:
    return "-" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def draw(results: FidelityResults, suffix: str) -> bytes:
    """Return the plot: divergence against time to first token, a panel for each length.

    Args:
        results: at least one configuration beside the dense one.
        suffix: ``".svg"`` or ``".png"``.
    """
    rows = [row for row in summarise(results) if row.shape is None]

    def panel(length: int) -> Any:
        return lambda axes: _draw(axes, [row for row in rows if row.length == length])

    return drawn([panel(length) for length in dict.fromkeys(row.length for row in rows)], suffix)


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        color = f"C{number % 10}"
        if row.divergence_interval is not None:
            axes.vlines(row.seconds, *row.divergence_interval, alpha=0.5, color=color)
        axes.plot(row.seconds, row.divergence, "o", label=row.configuration, color=color)
    axes.axvline(rows[0].dense_seconds, color="C7", linestyle="--", label="dense")
    positive = [row.divergence for row in rows if row.divergence > 0]
    if positive:  # nothing diverges has a place on this scale, unlike on a logarithmic one
        axes.set_yscale("symlog", linthresh=min(positive))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{rows[0].length:,} tokens")
    finish(axes, "time to first token, s", "KL per answer token, nats")
