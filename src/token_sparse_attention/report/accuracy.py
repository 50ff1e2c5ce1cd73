"""What an evaluation says: accuracy against cost, and which layers and heads kept how much."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from statistics import fmean

from token_sparse_attention.benchmark.runs import tokens
from token_sparse_attention.calibration.show import ranges
from token_sparse_attention.evaluation.record import DENSE, EvalResults, SampleResult
from token_sparse_attention.evaluation.summary import Row, layer_shares, summarise
from token_sparse_attention.report import charts
from token_sparse_attention.report.markup import Markup, folded, join, table, tag

Shares = list[list[float] | None]
_COLUMNS = (
    *("length", "configuration", "samples", "accuracy", "difference", "95% interval"),
    *("loss below", "kept", "work", "first token"),
)
_HOW_TO_READ = (
    "Each point is one configuration, the dashed line is dense prefill; up and to the left is "
    "better. Bars are 95% intervals of the difference from dense on the same samples, drawn "
    "from the dense accuracy. Work is the share of all causal pairs of a query and a key that "
    "are attended to. First token is the mean time from the start of the prefill."
)
BESIDE_WINDOW = (
    "In layers that select no queries, the kept tokens are those that every query sees besides "
    "its window."
)


def accuracy(results: EvalResults) -> Markup:
    """Return the charts of accuracy over cost, and their tables."""
    rows = summarise(results)
    colours = {
        name: number % charts.COLOURS for number, name in enumerate(results.header.configurations)
    }
    together = [row for row in rows if row.task is None and row.length is not None]
    figures: list[Markup] = []
    for length in dict.fromkeys(row.length for row in together):
        figures += _scatters(length, [r for r in together if r.length == length], colours)
    by_task = [row for row in rows if row.task is not None and row.length is not None]
    return join(
        tag("p", _HOW_TO_READ),
        tag("div", figures, class_="grid"),
        table("All tasks together", _COLUMNS, map(_cells, together)),
        folded(
            "Task by task",
            table(
                "Task by task",
                ("task", *_COLUMNS),
                ((str(row.task), *_cells(row)) for row in by_task),
            ),
        ),
        folded(
            "Settings",
            table(
                "Settings",
                ("configuration", "settings"),
                (
                    (name, json.dumps(settings))
                    for name, settings in results.header.configurations.items()
                    if settings is not None
                ),
                prose=True,
            ),
        ),
    )


def _scatters(
    length: int | None, rows: Sequence[Row], colours: dict[str, int]
) -> Iterator[Markup]:
    scored = [row for row in rows if row.score is not None]
    dense = next((row for row in scored if row.configuration == DENSE), None)
    if dense is None:
        yield tag("p", f"{_length(length)}: nothing has a score yet.")
        return
    for what, unit in (("work", "attention work, dense = 1"), ("seconds", "first token, seconds")):
        # A pattern's work is not known, only a bound of it.
        placed = [row for row in scored if row is not dense]
        placed = [row for row in placed if what != "work" or not row.work_is_bound]
        points = [_point(row, getattr(row, what), colours) for row in placed]
        reference = _point(dense, getattr(dense, what), colours)
        title = f"{_length(length)}: accuracy against {what}"
        chart = charts.scatter(title, unit, points, reference)
        yield tag("figure", tag("figcaption", title), chart)


def _point(row: Row, x: float, colours: dict[str, int]) -> charts.Point:
    score, low, high = row.score or 0.0, None, None
    if None not in (row.difference, row.difference_low, row.difference_high):
        base = row.dense_score or 0.0
        low, high = (
            min(max(base + (end or 0.0), 0.0), 1.0)
            for end in (row.difference_low, row.difference_high)
        )
    return charts.Point(row.configuration, x, score, low, high, colours[row.configuration])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        _length(row.length),
        row.configuration,
        str(row.samples),
        _number("{:.3f}", row.score),
        _number("{:+.3f}", row.difference),
        _number("{:+.3f} to {:+.3f}", row.difference_low, row.difference_high),
        _number("{:.1%}", row.relative_loss_upper),
        f"{row.kept_share:.1%}",
        row.shown_work,
        f"{row.seconds:.3g} s",
    )


def _number(form: str, *values: float | None) -> str:
    return "-" if None in values else form.format(*values)


def _length(length: int | None) -> str:
    return f"{tokens(length)} tokens" if length else "no set length"


def kept_by_layer(results: EvalResults) -> Markup:
    """Return a heat map of the mean kept share for every sparse configuration and length."""
    figures, beside_any = [], False
    for name in results.header.configurations:
        configs = results.header.layer_configs(name)
        beside = [layer for layer, config in configs.items() if not config.select_queries]
        for length in sorted({sample.length for sample in results.samples}):
            chosen = [
                sample
                for sample in results.samples
                if sample.configuration == name and sample.length == length and sample.kept
            ]
            if chosen:
                shares = mean_shares(chosen)
                title = f"{name}, {_length(length)}"
                figures.append(heat_figure(title, shares, f"{len(chosen)} samples", beside))
                beside_any = beside_any or bool(beside)
    if not figures:
        return tag("p", "There are no sparse configurations.")
    return join(
        tag(
            "p",
            "Mean share of the prompt that a head attends over, in percent. One wide cell: all "
            "heads of the layer keep equally many. Prompts for which a layer ran dense count as "
            "100; a layer that always did is marked dense.",
            f" {BESIDE_WINDOW}" if beside_any else "",
        ),
        charts.key([("k", "stronger: more kept"), ("d", "dense")]),
        tag("div", figures, class_="grid"),
    )


def mean_shares(samples: Sequence[SampleResult]) -> Shares:
    """Return each layer's mean kept shares over samples of one configuration.

    Returns:
        Per layer one share for each head, or a single one if all heads kept alike in every
        sample; None if the layer ran dense in every sample.
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


def heat_figure(title: str, shares: Shares, note: str, beside: Sequence[int] = ()) -> Markup:
    """Return a heat map with its table; `beside` are the layers that select no queries."""
    sparse = [layer for layer, heads in enumerate(shares) if heads is not None]
    beside = [layer for layer in sparse if layer in beside]
    if beside:
        layers = "" if beside == sparse else f"layers {ranges(beside)}: "
        note += f"; {layers}what every query sees besides its window"
    rows: list[tuple[str, ...]] = []
    for layer, heads in enumerate(shares):
        if heads is None:
            rows.append((str(layer), "dense", "dense", "dense"))
        else:
            rows.append((str(layer), *(f"{f(heads):.1%}" for f in (fmean, min, max))))
    return tag(
        "figure",
        tag("figcaption", f"{title} ({note})"),
        charts.heat_map(f"Kept share by layer and head: {title}", shares),
        folded("Table", table(title, ("layer", "mean", "least head", "most head"), rows)),
    )
