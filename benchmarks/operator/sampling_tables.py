"""Tables of what `benchmarks.operator.sampling` measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.lookup import speed_up
from benchmarks.markdown import NONE, Rows, Table, figure_or, number
from benchmarks.operator.sampling import (
    ATTEND,
    DENSE,
    FIRST,
    PREPARE,
    SCORE,
    SUITE,
    WHOLE,
    WINDOWS,
    WITHOUT_LAST,
    Shape,
)

from token_sparse_attention.benchmark.record import KERNEL_KINDS
from token_sparse_attention.benchmark.runs import NOT_MEASURED, NoFigureError, Run, tokens

DEVICE = tuple(kind for kind in KERNEL_KINDS if kind != "eager")


def by_shape(runs: Sequence[Run]) -> Iterator[tuple[str, Run]]:
    """Yield the heads in words and the records of every shape of every run of this study."""
    for run in runs:
        records = [one for one in run.result.records if one.suite == SUITE]
        shapes = [Shape(one.num_heads, one.num_kv_heads, one.head_dim) for one in records]
        for shape in dict.fromkeys(shapes):
            own = tuple(one for one, its in zip(records, shapes) if its == shape)
            heads = f"{shape.num_heads}/{shape.num_kv_heads} of {shape.head_dim}"
            yield heads, Run(run.name, replace(run.result, records=own))


def _whole(runs: Sequence[Run]) -> Rows:
    yield (
        *("run", "heads", "tokens", "dense, ms", "sparse, ms", "20% to 80%", "speed-up"),
        *("speed-up by graph", "extra MiB"),
    )
    for heads, run in by_shape(runs):
        for seq_len in run.lengths(WHOLE):
            cells = (
                figure_or(cell, run, seq_len)
                for cell in (_dense_ms, _whole_ms, _spread, eager_speed_up, graph_speed_up)
            )
            peak = run.find(WHOLE, seq_len, kinds=("memory",))
            mib = NONE if peak is None else number(peak.peak_extra_mib or 0.0)
            yield run.name, heads, tokens(seq_len), *cells, mib


def _dense_ms(run: Run, seq_len: int) -> str:
    return number(run.need(DENSE, seq_len, kinds=("eager",)).median_ms or 0.0)


def _whole_ms(run: Run, seq_len: int) -> str:
    return number(run.need(WHOLE, seq_len, kinds=("eager",)).median_ms or 0.0)


def _spread(run: Run, seq_len: int) -> str:
    record = run.need(WHOLE, seq_len, kinds=("eager",))
    return f"{number(record.low_ms or 0.0)} to {number(record.high_ms or 0.0)}"


def eager_speed_up(run: Run, seq_len: int) -> str:
    """Return the speed-up by the host's clock."""
    return _speed_up(run, seq_len, ("eager",))


def graph_speed_up(run: Run, seq_len: int) -> str:
    """Return the speed-up on the device."""
    return _speed_up(run, seq_len, DEVICE)


def _speed_up(run: Run, seq_len: int, kinds: Sequence[str]) -> str:
    base, ours = (run.need(name, seq_len, kinds=kinds) for name in (DENSE, WHOLE))
    return f"{speed_up(base, ours):.2f}x"


def _parts(runs: Sequence[Run]) -> Rows:
    yield (
        *("run", "heads", "tokens", "scoring", "sampling", "windows", "sampled attention"),
        *("first queries", "last queries"),
    )
    for heads, run in by_shape(runs):
        for seq_len in run.lengths(SCORE):
            shares = part_shares(run, seq_len)
            yield run.name, heads, tokens(seq_len), *(f"{share:.0%}" for share in shares)


def part_shares(run: Run, seq_len: int) -> list[float]:
    """Return each part's share of their sum, in the order of the table.

    Sampling is what `PREPARE` takes beyond `SCORE`, sampled attention what `ATTEND` takes beyond
    `WINDOWS`; the last queries are what the operator takes beyond itself without them.
    """

    def ms(name: str) -> float:
        record = run.find(name, seq_len)
        if record is None or record.median_ms is None:
            raise NoFigureError(NOT_MEASURED)
        return record.median_ms

    first = ms(FIRST) if run.find(FIRST, seq_len) else 0.0
    last = ms(WHOLE) - ms(WITHOUT_LAST) if run.find(WITHOUT_LAST, seq_len) else 0.0
    parts = [ms(SCORE), ms(PREPARE) - ms(SCORE), ms(WINDOWS), ms(ATTEND) - ms(WINDOWS)]
    parts = [max(part, 0.0) for part in (*parts, first, last)]
    return [part / sum(parts) for part in parts]


SAMPLING_TABLES: dict[str, Table] = {"sampling": _whole, "sampling-parts": _parts}
