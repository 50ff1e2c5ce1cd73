"""Tables of what `benchmarks.operator.sampling` measured.

Costs are numbers of keys per query: how many keys dense attention passes over, for every query,
in the time that a stage takes. So are the constants of `crossover`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.lookup import speed_up
from benchmarks.markdown import NONE, Rows, Table, figure_or, number

from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.benchmark.runs import (
    NOT_MEASURED,
    NoFigureError,
    Run,
    milliseconds,
    tokens,
)

WINDOW = "window"  # the setting without sinks and sampled keys
SAMPLING = "far/draw/"  # what the files call the stage that samples keys


def _dense(run: Run, seq_len: int) -> Record:
    names = run.names("far/dense/")
    if not names:
        raise NoFigureError(NOT_MEASURED)
    return run.need(names[0], seq_len)


def keys_per_query(run: Run, seq_len: int, name: str) -> float:
    """Return how many keys per query dense attention passes over in a stage's time.

    Raises:
        NoFigureError: if one was not measured, or dense attention's check failed.
    """
    return _keys_in(run, seq_len, milliseconds(run.need(name, seq_len, checked=False)))


def _keys_in(run: Run, seq_len: int, ms: float) -> float:
    return ms / milliseconds(_dense(run, seq_len)) * seq_len


def sampling_keys(run: Run, seq_len: int, setting: str) -> float:
    """Return what sampling a setting's keys and attending to them costs, in keys per query.

    Raises:
        NoFigureError: if it was not measured, or the operator's check under it failed.
    """
    run.need(f"far/whole/{setting}", seq_len)
    choosing, attending, window = (
        keys_per_query(run, seq_len, name)
        for name in (f"{SAMPLING}{setting}", f"far/windows/{setting}", f"far/windows/{WINDOW}")
    )
    return choosing + attending - window


def dense_query_keys(run: Run, seq_len: int, count: int) -> float:
    """Return what each of the last `count` queries costs that attend to every key.

    It is the difference that they make to the operator.

    Raises:
        NoFigureError: if it was not measured, or a check failed.
    """
    return _keys_in(run, seq_len, _dense_queries_ms(run, seq_len, count)) / count


def _dense_queries_ms(run: Run, seq_len: int, count: int) -> float:
    without = _without_dense_queries(run).get(count)
    if without is None:
        raise NoFigureError(NOT_MEASURED)
    both = (run.need(name, seq_len) for name in (f"{without}-dense-{count}", without))
    with_them, others = map(milliseconds, both)
    return with_them - others


def _without_dense_queries(run: Run) -> dict[int, str]:
    """What was measured with some number of dense queries: the same without, by the number."""
    found = (re.fullmatch(r"(.*)-dense-(\d+)", name) for name in run.names("far/whole/"))
    return {int(one[2]): one[1] for one in found if one}


def _settings(runs: Sequence[Run]) -> Rows:
    yield "run", "tokens", "setting", "choose", "attend", "whole", "speed-up", "keys per query"
    for run in runs:
        for seq_len in run.lengths("far/score"):
            for name in run.names("far/whole/"):
                setting = name.removeprefix("far/whole/")
                yield (
                    *(run.name, tokens(seq_len), setting),
                    _ms(run, seq_len, f"{SAMPLING}{setting}"),
                    _ms(run, seq_len, f"far/windows/{setting}"),
                    figure_or(_checked_ms, run, seq_len, name),
                    figure_or(_speed_up, run, seq_len, name),
                    figure_or(_sampling_keys, run, seq_len, setting),
                )


def _stages(runs: Sequence[Run]) -> Rows:
    yield "run", "tokens", "stage", "ms", "keys per query"
    for run in runs:
        for seq_len in run.lengths("far/score"):
            for name in (*run.names("far/dense/"), "far/score", f"far/windows/{WINDOW}"):
                stage = name.removeprefix("far/").replace("/", ", ")
                cost = figure_or(_keys, run, seq_len, name)
                yield run.name, tokens(seq_len), stage, _ms(run, seq_len, name), cost
            for count in _without_dense_queries(run):
                ms = figure_or(_extra, run, seq_len, count)
                cost = figure_or(_each, run, seq_len, count)
                yield run.name, tokens(seq_len), f"{count} dense queries", ms, cost


def _ms(run: Run, seq_len: int, name: str) -> str:
    record = run.find(name, seq_len)
    return NONE if record is None or record.median_ms is None else number(record.median_ms)


def _checked_ms(run: Run, seq_len: int, name: str) -> str:
    return number(milliseconds(run.need(name, seq_len)))


def _speed_up(run: Run, seq_len: int, name: str) -> str:
    return f"{speed_up(_dense(run, seq_len), run.need(name, seq_len)):.2f}x"


def _sampling_keys(run: Run, seq_len: int, setting: str) -> str:
    return number(sampling_keys(run, seq_len, setting))


def _keys(run: Run, seq_len: int, name: str) -> str:
    return number(keys_per_query(run, seq_len, name))


def _extra(run: Run, seq_len: int, count: int) -> str:
    return number(_dense_queries_ms(run, seq_len, count))


def _each(run: Run, seq_len: int, count: int) -> str:
    each = dense_query_keys(run, seq_len, count)
    return f"{number(count * each)}: {number(each)} each"


SAMPLING_TABLES: dict[str, Table] = {"far-settings": _settings, "far-stages": _stages}
