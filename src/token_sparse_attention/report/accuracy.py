"""What an evaluation says: accuracy against cost, and which layers and heads kept how much."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from token_sparse_attention.benchmark.runs import tokens
from token_sparse_attention.calibration.show import ranges
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.evaluation.record import DENSE, EvalResults, SampleResult
from token_sparse_attention.evaluation.show import COLUMNS, cells
from token_sparse_attention.evaluation.summary import Row, layer_shares, summarise
from token_sparse_attention.report import charts
from token_sparse_attention.report.charts import Chart, Point

Shares = list[list[float] | None]
_COSTS = (("work", "attention work, dense = 1"), ("seconds", "first token, seconds"))


def accuracy(results: EvalResults) -> dict[str, Any]:
    """Return what ``accuracy.html.j2`` shows: charts of accuracy against cost, and tables."""
    rows = [row for row in summarise(results) if row.length is not None]
    together = [row for row in rows if row.task is None]
    figures: list[Chart] = []
    unscored = []
    sparse = [name for name in results.header.configurations if name != DENSE]
    series = {name: number for number, name in enumerate((DENSE, *sparse))}
    for length in dict.fromkeys(row.length for row in together):
        scored = [row for row in together if row.length == length and row.score is not None]
        if any(row.configuration == DENSE for row in scored):
            figures += _scatters(scored, series)
        else:
            unscored.append(_length(length))
    settings = results.header.configurations.items()
    return {
        "charts": figures,
        "unscored": unscored,
        "columns": COLUMNS,
        "together": [cells(row) for row in together],
        "by_task": [(str(row.task), *cells(row)) for row in rows if row.task is not None],
        "settings": [(name, json.dumps(of)) for name, of in settings if of is not None],
    }


def _scatters(rows: Sequence[Row], series: dict[str, int]) -> Iterator[Chart]:
    dense = next(row for row in rows if row.configuration == DENSE)
    for what, unit in _COSTS:
        # Of a pattern's work only an upper bound is known.
        placed = [
            _point(row, getattr(row, what), series)
            for row in rows
            if row is not dense and not (what == "work" and row.work_is_bound)
        ]
        reference = _point(dense, getattr(dense, what), series)
        title = f"{_length(dense.length)}: accuracy against {what}"
        yield charts.scatter(title, unit, placed, reference)


def _point(row: Row, x: float, series: dict[str, int]) -> Point:
    interval = None
    if row.difference_low is not None and row.difference_high is not None:
        base = row.dense_score or 0.0
        low, high = (
            min(max(base + end, 0.0), 1.0) for end in (row.difference_low, row.difference_high)
        )
        interval = (low, high)
    return Point(row.configuration, x, row.score or 0.0, interval, series[row.configuration])


def _length(length: int | None) -> str:
    return f"{tokens(length)} tokens" if length else "no set length"


@dataclass(frozen=True)
class HeatMap:
    """Kept shares by layer and head: a chart and its table.

    Attributes:
        title: names the prompts.
        caption: the title, and which prompts and tokens are counted.
        chart: the heat map.
        rows: the layer, and the mean, the least and the greatest share of its heads.
        beyond_window: whether some layers drop no query, so that their kept tokens are the keys
            that every query attends to beyond its sliding window.
    """

    title: str
    caption: str
    chart: Chart
    rows: list[tuple[str, ...]]
    beyond_window: bool


def kept_by_layer(results: EvalResults) -> list[HeatMap]:
    """Return a heat map of the mean kept share for every sparse configuration and length."""
    maps = []
    for name in results.header.configurations:
        configs = results.header.layer_configs(name)
        beyond = [n for n, config in configs.items() if isinstance(config, KVSamplingConfig)]
        for length in sorted({sample.length for sample in results.samples}):
            chosen = [
                sample
                for sample in results.samples
                if sample.configuration == name and sample.length == length and sample.kept
            ]
            if chosen:
                title, note = f"{name}, {_length(length)}", f"{len(chosen)} samples"
                maps.append(heat_map(title, mean_shares(chosen), note, beyond))
    return maps


def mean_shares(samples: Sequence[SampleResult]) -> Shares:
    """Return each layer's mean kept shares over samples of one configuration.

    Returns:
        Per layer one share for each head, or a single one if no sample tells the heads apart;
        None if the layer ran dense in every sample.
    """
    by_layer = zip(*(sample.kept or [] for sample in samples))
    means: Shares = []
    for entries in by_layer:
        if all(entry is None for entry in entries):
            means.append(None)
            continue
        shares = [
            layer_shares(entry, sample.prompt_tokens) for entry, sample in zip(entries, samples)
        ]
        heads = max(map(len, shares))
        means.append([fmean(s[head % len(s)] for s in shares) for head in range(heads)])
    return means


def heat_map(title: str, shares: Shares, note: str, beyond: Sequence[int] = ()) -> HeatMap:
    """Return a heat map with its table; `beyond` are the layers that drop no query."""
    sparse = [layer for layer, heads in enumerate(shares) if heads is not None]
    beyond = [layer for layer in sparse if layer in beyond]
    if beyond:
        layers = "" if beyond == sparse else f"layers {ranges(beyond)}: "
        note += f"; {layers}keys beyond the sliding window"
    rows: list[tuple[str, ...]] = []
    for layer, heads in enumerate(shares):
        cells = [f"{of(heads):.1%}" for of in (fmean, min, max)] if heads else ["dense"] * 3
        rows.append((str(layer), *cells))
    chart = charts.heat_map(f"Kept share by layer and head: {title}", shares)
    return HeatMap(title, f"{title} ({note})", chart, rows, bool(beyond))
