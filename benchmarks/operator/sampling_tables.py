"""Tables of what `benchmarks.operator.sampling` measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.lookup import speed_up
from benchmarks.markdown import NONE, Rows, Table, figure_or, number
from benchmarks.operator.sampling import (
    ATTEND,
    AUTO,
    DENSE,
    FIRST,
    SAMPLE,
    SCORE,
    SUITE,
    WHOLE,
    WINDOWS,
    WITHOUT_LAST,
    Shape,
)

from token_sparse_attention.benchmark.record import KERNEL_KINDS
from token_sparse_attention.benchmark.runs import NOT_MEASURED, NoFigureError, Run, tokens

LONG = 131072
AIMED = {16: 1.8, 32: 3.5, 64: 6.0, 128: 10.0}  # thousands of tokens
AIMED_OF_FEW_HEADS = {16: 1.2, 32: 2.5}
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
        *("speed-up by graph", "crossover on", "extra MiB"),
    )
    for heads, run in by_shape(runs):
        for seq_len in run.lengths(WHOLE):
            cells = (
                figure_or(cell, run, seq_len)
                for cell in (
                    *(_dense_ms, _whole_ms, _spread),
                    *(eager_speed_up, graph_speed_up, auto_speed_up),
                )
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


def auto_speed_up(run: Run, seq_len: int) -> str:
    """Return the speed-up by the host's clock with the crossover, as it ships."""
    return _speed_up(run, seq_len, ("eager",), AUTO)


def _speed_up(run: Run, seq_len: int, kinds: Sequence[str], of: str = WHOLE) -> str:
    base, ours = (run.need(name, seq_len, kinds=kinds) for name in (DENSE, of))
    return f"{speed_up(base, ours):.2f}x"


def _parts(runs: Sequence[Run]) -> Rows:
    yield (
        *("run", "heads", "tokens", "scoring", "sampling", "windows", "sampled attention"),
        *("first queries", "last queries"),
    )
    for heads, run in by_shape(runs):
        for seq_len in run.lengths(SAMPLE):
            shares = part_shares(run, seq_len)
            yield run.name, heads, tokens(seq_len), *(f"{share:.0%}" for share in shares)


def part_shares(run: Run, seq_len: int) -> list[float]:
    """Return each part's share of their sum, in the order of the table.

    Sampling is what `SAMPLE` takes beyond `SCORE`, sampled attention what `ATTEND` takes beyond
    `SAMPLE` and `WINDOWS`; the last queries are what the operator takes beyond itself without
    them.
    """

    def ms(name: str) -> float:
        record = run.find(name, seq_len)
        if record is None or record.median_ms is None:
            raise NoFigureError(NOT_MEASURED)
        return record.median_ms

    first = ms(FIRST) if run.find(FIRST, seq_len) else 0.0
    last = ms(WHOLE) - ms(WITHOUT_LAST) if run.find(WITHOUT_LAST, seq_len) else 0.0
    sampling, attending = ms(SAMPLE) - ms(SCORE), ms(ATTEND) - ms(SAMPLE) - ms(WINDOWS)
    parts = [ms(SCORE), sampling, ms(WINDOWS), attending, first, last]
    parts = [max(part, 0.0) for part in parts]
    return [part / sum(parts) for part in parts]


class Aim(NamedTuple):
    """A speed-up of the whole operator to reach, by the host's clock."""

    heads: str
    seq_len: int
    speed_up: float


AIMS = (
    *(Aim("32/8 of 128", length * 1024, aim) for length, aim in AIMED.items()),
    *(Aim("14/2 of 64", length * 1024, aim) for length, aim in AIMED_OF_FEW_HEADS.items()),
)
MOST_PREPARING = 0.2  # of the parts' sum at 128K: scoring and sampling
MOST_MIB = 614.4  # beyond inputs and output, at 128K
MOST_SLOWER = 0.02  # than dense with the crossover on, or
MOST_SLOWER_MS = 0.05


def _aims(runs: Sequence[Run]) -> Rows:
    """KV sampling's aims on a GPU, each with what was measured."""
    yield "aim", "measured", "", "run"
    for heads, run in by_shape([one for one in runs if one.result.arguments["device"] != "cpu"]):
        for aim in AIMS:
            if aim.heads == heads and run.find(WHOLE, aim.seq_len, kinds=("eager",)):
                got = figure_or(eager_speed_up, run, aim.seq_len)
                met = got.endswith("x") and float(got[:-1]) >= aim.speed_up
                what = f"{tokens(aim.seq_len)}: at least {aim.speed_up:g}x dense"
                yield _judged(run, f"{heads}, {what}", got, met)
        if heads == AIMS[0].heads and run.find(SAMPLE, LONG):
            share = sum(part_shares(run, LONG)[:2])
            what = f"{heads}, 128K: scoring and sampling at most {MOST_PREPARING:.0%} of it"
            yield _judged(run, what, f"{share:.0%}", share <= MOST_PREPARING)
            memory = run.find(WHOLE, LONG, kinds=("memory",))
            peak = (memory and memory.peak_extra_mib) or 0.0
            what = f"{heads}, 128K: at most 0.6 GiB beyond inputs and output"
            yield _judged(run, what, f"{peak / 1024:.2f} GiB", peak <= MOST_MIB)
        lengths = run.lengths(AUTO)
        if lengths:
            worst = max(lengths, key=lambda length: _slower(run, length)[0])
            share, ms = _slower(run, worst)
            what = f"{heads}, {tokens(min(lengths))} to {tokens(max(lengths))}, crossover on: "
            what += "never slower than dense by more than 2% and 50 us"
            met = all(_is_close(*_slower(run, length)) for length in lengths)
            yield _judged(run, what, f"{share:+.1%} ({ms * 1e3:+.0f} us) at {tokens(worst)}", met)


def _slower(run: Run, seq_len: int) -> tuple[float, float]:
    dense, auto = (run.need(name, seq_len, kinds=("eager",)).median_ms for name in (DENSE, AUTO))
    assert dense
    assert auto
    return auto / dense - 1, auto - dense


def _is_close(share: float, ms: float) -> bool:
    return share <= MOST_SLOWER or ms <= MOST_SLOWER_MS


def _judged(run: Run, what: str, got: str, met: bool) -> tuple[str, ...]:
    return what, got, "**met**" if met else "**missed**", run.name


SAMPLING_TABLES: dict[str, Table] = {
    "sampling": _whole,
    "sampling-parts": _parts,
    "sampling-aims": _aims,
}
