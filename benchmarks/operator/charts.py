"""Figures of what ``tsa bench op`` and ``tsa bench prefill`` measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lookup import STAGES, kept_shares, main_kept, speed_up
from benchmarks.operator.tables import prefill_setting, tflops
from benchmarks.style import figure_file, token_axis

from token_sparse_attention.benchmark.runs import (
    NOT_MEASURED,
    NoFigureError,
    Run,
    milliseconds,
    tokens,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = dict[str, tuple[list[int], list[float]]]


def draw(name: str, runs: Sequence[Run], path: Path) -> None:
    """Draw one of `FIGURES`.

    Raises:
        NoFigureError: if the runs have no data for it.
    """
    with figure_file(path) as axes:
        if not FIGURES[name](axes, _of_one_device(runs)):
            raise NoFigureError(NOT_MEASURED)


def _of_one_device(runs: Sequence[Run]) -> list[Run]:
    """Return the runs on the device that was measured most, the fullest first."""
    fullest = sorted(runs, key=lambda run: len(run.result.records), reverse=True)
    device = fullest[0].result.provenance["device"] if fullest else None
    return [run for run in fullest if run.result.provenance["device"] == device]


def _dense(axes: Axes, runs: Sequence[Run]) -> bool:
    lines: Lines = {}
    for run in runs:
        for name in run.names("dense/"):
            label = name.removeprefix("dense/")
            for seq_len in run.lengths(name):
                _add(lines, label, seq_len, _rate, run, name)
    return _plot_lines(axes, lines, "dense causal attention, TFLOP/s")


def _rate(seq_len: int, run: Run, name: str) -> float:
    return tflops(run.need(name, seq_len))


def _whole_dense(axes: Axes, runs: Sequence[Run]) -> bool:
    lines: Lines = {}
    for run in runs:
        for kept in kept_shares(run, "ours/whole"):
            for seq_len in run.lengths("ours/whole"):
                _add(lines, f"{kept:.0%} kept", seq_len, _over_dense, run, kept)
    return _plot_lines(axes, lines, "speed-up over dense attention")


def _over_dense(seq_len: int, run: Run, kept: float) -> float:
    return speed_up(run.dense(seq_len), run.need("ours/whole", seq_len, kept))


def _stages(axes: Axes, runs: Sequence[Run]) -> bool:
    """Each stage's time in percent of attention over the kept tokens, on top of each other."""
    heights: dict[str, dict[int, float]] = {name: {} for name in STAGES}
    for run in runs:
        kept = main_kept(run)
        for seq_len in run.lengths("ours/attend"):
            try:
                run.need("ours/whole", seq_len, kept)
                attend = milliseconds(run.need("ours/attend", seq_len, kept, checked=False))
                stage_ms = [
                    run.need(name, seq_len, None if name == STAGES[0] else kept, checked=False)
                    for name in STAGES
                ]
            except NoFigureError:
                continue
            for name, record in zip(STAGES, stage_ms):
                heights[name].setdefault(seq_len, 100 * milliseconds(record) / attend)
    lengths = sorted(heights[STAGES[0]])
    bottom = [0.0] * len(lengths)
    for name in STAGES:
        values = [heights[name][seq_len] for seq_len in lengths]
        axes.bar([tokens(s) for s in lengths], values, bottom=bottom, label=name[5:], width=0.6)
        bottom = [low + value for low, value in zip(bottom, values)]
    axes.set_xlabel("tokens")
    axes.set_ylabel("% of attention over the kept tokens")
    axes.legend()
    return bool(lengths)


def _prefill(axes: Axes, runs: Sequence[Run]) -> bool:
    lines: Lines = {}
    for run in runs:
        for name in (*run.names("sparse/"), *run.names("samples-")):
            shares: list[float | None] = [*kept_shares(run, name)] or [None]
            for kept in shares:
                layers, what = prefill_setting(name, kept)
                label = f"{what}{'' if kept is None else ' kept'}, {layers} layers"
                for seq_len in run.lengths(name):
                    _add(lines, label, seq_len, _over_prefill, run, name, kept)
    return _plot_lines(axes, lines, "speed-up of the time to first token")


def _over_prefill(seq_len: int, run: Run, name: str, kept: float | None) -> float:
    return speed_up(run.need("dense", seq_len), run.need(name, seq_len, kept))


def _add(
    lines: Lines, label: str, seq_len: int, value: Callable[..., float], *arguments: Any
) -> None:
    """Add ``value(seq_len, *arguments)`` to a line, unless it has that length or there is none."""
    if seq_len in lines.get(label, ([],))[0]:
        return
    try:
        point = value(seq_len, *arguments)
    except NoFigureError:
        return
    lengths, values = lines.setdefault(label, ([], []))
    lengths.append(seq_len)
    values.append(point)


def _plot_lines(axes: Axes, lines: Lines, what: str) -> bool:
    for label, (lengths, values) in lines.items():
        points = sorted(zip(lengths, values))
        axes.plot(*zip(*points), marker="o", markersize=3, label=label)
    shown = sorted({seq_len for lengths, _ in lines.values() for seq_len in lengths})
    token_axis(axes, shown)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(what)
    if lines:
        axes.legend()
    return bool(lines)


FIGURES: dict[str, Callable[[Axes, Sequence[Run]], bool]] = {
    "dense": _dense,
    "stages": _stages,
    "whole-dense": _whole_dense,
    "prefill": _prefill,
}
