"""Accuracy and speed of the same results in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.markdown import NONE, number
from benchmarks.replay.results import (
    Replay,
    ReplayRow,
    Times,
    counts_digest,
)

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import PATTERN, EvalResults
from token_sparse_attention.evaluation.summary import Row, summarise

NOT_REPLAYED, CHECK_FAILED = "not replayed", "check failed"
_PATTERN = "not replayed: the blocks of a pattern depend on the text"


@dataclass(frozen=True)
class FrontierRow:
    """One configuration at one length, all tasks together.

    Attributes:
        source: name of the evaluation.
        accuracy: what `summarise` says of it.
        times: of all layers' attention at the target shape; None: see `note`.
        own_times: the same at the evaluated model's own shape.
        note: why there are no times.
    """

    source: str
    accuracy: Row
    times: Times | None
    own_times: Times | None
    note: str = ""


def join(
    evaluations: Sequence[tuple[str, EvalResults]], replays: Sequence[Replay]
) -> tuple[FrontierRow, ...]:
    """Return a row per configuration and length, with the times of exactly those results.

    A replay belongs to results if it replayed the same counts under the same name at the same
    length; scores may have been added since.

    Args:
        evaluations: results, each with the name it goes by.
        replays: replays of them, at one target shape and device.

    Raises:
        UsageError: if replays were made at several target shapes, dtypes or devices.
    """
    _check_same_target(replays)
    found: dict[tuple[str, int, str, bool], tuple[Replay, ReplayRow]] = {}
    for replay in replays:
        for row in replay.rows:
            # Evaluations may share the dense results; one replay of them is enough.
            key = (row.configuration, row.length, row.digest, row.own_shape)
            found.setdefault(key, (replay, row))
    joined = []
    for source, results in evaluations:
        for accuracy in summarise(results):
            if accuracy.task is not None or accuracy.length is None:
                continue
            name, length = accuracy.configuration, accuracy.length
            digest = counts_digest(results, name, length)
            there = [found.get((name, length, digest, own)) for own in (False, True)]
            times, own_times = (one and one[0].times(one[1]) for one in there)
            note = "" if times else CHECK_FAILED if there[0] else NOT_REPLAYED
            if PATTERN in (results.header.configurations[name] or {}):
                note = _PATTERN
            joined.append(FrontierRow(source, accuracy, times, own_times, note))
    return tuple(joined)


def _check_same_target(replays: Sequence[Replay]) -> None:
    targets = {_target(replay, row) for replay in replays for row in replay.rows}
    targets.discard(None)
    if len(targets) > 1:
        one, other, *_ = sorted(map(str, targets))
        raise UsageError(f"replays must share their settings; got {one}, and {other}")


def _target(replay: Replay, row: ReplayRow) -> str | None:
    if row.own_shape:
        return None
    point = replay.row_points(row)[0]
    return (
        f"{point.num_heads} heads, {point.num_kv_heads} KV heads, head size {point.head_dim}, "
        f"{point.dtype}, {point.backend}, {replay.provenance.get('device')}"
    )


def target_of(replays: Sequence[Replay]) -> str:
    """Say what the replays were made at: shape, dtype, dense kernel and device."""
    targets = (_target(replay, row) for replay in replays for row in replay.rows)
    return next(filter(None, targets), NOT_REPLAYED)


def to_dict(row: FrontierRow) -> dict[str, Any]:
    """Return a row as one flat object for JSON."""
    return {
        "source": row.source,
        **asdict(row.accuracy),
        "dense_ms": row.times and row.times.dense_ms,
        "sparse_ms": row.times and row.times.sparse_ms,
        "speed_up": row.times and row.times.speed_up,
        "own_speed_up": row.own_times and row.own_times.speed_up,
        "note": row.note,
    }


def frontier_table(rows: Sequence[FrontierRow]) -> str:
    """Return the rows as a table in Markdown; what no row has is left out.

    Losses are relative to dense prefill on the same samples, with the one-sided 95% bound.
    Times are those of attention in all layers together.
    """
    sources = len({row.source for row in rows}) > 1
    own = any(row.own_times for row in rows)
    header = [
        *(["run"] if sources else []),
        *("length", "configuration", "n", "score", "loss", "loss below", "kept", "work"),
        *("dense, ms", "sparse, ms", "speed-up"),
        *(["speed-up, own shape"] if own else []),
    ]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        accuracy = row.accuracy
        lines.append(
            [
                *([row.source] if sources else []),
                f"{accuracy.length:,}" if accuracy.length else NONE,
                accuracy.configuration,
                str(accuracy.pairs),
                _cell("{:.3f}", accuracy.score),
                _cell("{:+.1%}", accuracy.relative_loss),
                _cell("{:+.1%}", accuracy.relative_loss_upper),
                f"{accuracy.kept_share:.1%}",
                accuracy.shown_work,
                *_time_cells(row),
                *([_speed_up(row.own_times)] if own else []),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _time_cells(row: FrontierRow) -> tuple[str, str, str]:
    if row.times is None:
        return NONE, NONE, f"**{row.note}**"
    return number(row.times.dense_ms), number(row.times.sparse_ms), _speed_up(row.times)


def _speed_up(times: Times | None) -> str:
    return NONE if times is None else f"{times.speed_up:.2f}x"


def _cell(form: str, value: float | None) -> str:
    return NONE if value is None else form.format(value)
