"""What was aimed at, and whether it was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.lookup import WALL_KINDS, overhead_ms, speed_up

from token_sparse_attention.benchmark.runs import (
    CHECK_FAILED,
    MAIN_KEPT,
    NOT_MEASURED,
    NoFigureError,
    Run,
    milliseconds,
    tokens,
)

K = 1024
CROSSOVER_SHARE, CROSSOVER_MS = 0.02, 0.02  # slower by either of these does not count


class Outcome(NamedTuple):
    """What was measured, for people, and whether it reaches the aim."""

    measured: str
    met: bool


class Target(NamedTuple):
    """An aim, and how to look whether a run reaches it."""

    aim: str
    judge: Callable[[Run], Outcome]


def _overhead(seq_len: int, most_ms: float, most_share: float | None = None) -> Target:
    def judge(run: Run) -> Outcome:
        overhead = overhead_ms(run, seq_len, MAIN_KEPT)
        attend = milliseconds(run.need("ours/attend", seq_len, MAIN_KEPT, checked=False))
        share = overhead / attend
        met = overhead <= most_ms and (most_share is None or share <= most_share)
        return Outcome(f"{overhead:.2f} ms, {share:.1%}", met)

    aim = f"overhead at most {most_ms:g} ms"
    if most_share is not None:
        aim += f" and {most_share:.0%} of attention over the kept tokens"
    return Target(f"{_at(seq_len)}: {aim}", judge)


def _whole_over_dense(seq_len: int, least: float) -> Target:
    def judge(run: Run) -> Outcome:
        base = run.need("dense/fa4", seq_len)
        ratio = speed_up(base, run.need("ours/whole", seq_len, MAIN_KEPT))
        return Outcome(f"{ratio:.2f}x", ratio >= least)

    return Target(
        f"{_at(seq_len)}: whole operator at least {least:g}x as fast as dense flash-attn-4", judge
    )


def _whole_over_eager(seq_len: int, least: float) -> Target:
    def judge(run: Run) -> Outcome:
        base = run.need("eager/whole", seq_len, MAIN_KEPT, WALL_KINDS)
        ratio = speed_up(base, run.need("ours/whole", seq_len, MAIN_KEPT, WALL_KINDS))
        return Outcome(f"{ratio:.2f}x", ratio >= least)

    aim = f"whole operator at least {least:g}x as fast as the eager composition"
    return Target(f"{_at(seq_len)}: {aim}", judge)


def _fallback(seq_len: int, most_ms: float) -> Target:
    def judge(run: Run) -> Outcome:
        windowed = run.need("ours/whole_window", seq_len, MAIN_KEPT)
        zero = run.need("ours/whole", seq_len, MAIN_KEPT)
        extra = milliseconds(windowed) - milliseconds(zero)
        return Outcome(f"{extra:.2f} ms", extra <= most_ms)

    return Target(f"{_at(seq_len)}: windowed fallback at most {most_ms:g} ms more", judge)


def _memory(seq_len: int, most_gib: float, most_slower: float) -> Target:
    def judge(run: Run) -> Outcome:
        peak = run.need("ours/whole", seq_len, MAIN_KEPT, ("memory",), checked=False)
        whole = milliseconds(run.need("ours/whole", seq_len, MAIN_KEPT))
        slower = whole / milliseconds(run.need("ours/unchunked", seq_len, MAIN_KEPT)) - 1
        gib = (peak.peak_extra_mib or 0.0) / K
        met = gib <= most_gib and slower <= most_slower
        return Outcome(f"{gib:.2f} GiB, {slower:+.1%}", met)

    return Target(
        f"{_at(seq_len)}: at most {most_gib:g} GiB extra peak memory, at most {most_slower:.0%} "
        "slower than all heads at once",
        judge,
    )


def _first_call(most_ms: float) -> Target:
    def judge(run: Run) -> Outcome:
        found = [r for r in run.result.records if r.kind == "first_call" and r.high_ms is not None]
        if not found:
            raise NoFigureError(NOT_MEASURED)
        worst = max(record.high_ms or 0.0 for record in found)
        return Outcome(f"{worst:.1f} ms at worst", worst <= most_ms)

    return Target(f"first call at a new length at most {most_ms:g} ms over a warm one", judge)


def _never_slower() -> Target:
    def judge(run: Run) -> Outcome:
        found = []
        for record in run.result.records:
            if record.name == "crossover/ours" and record.kind != "eager":
                over, base = crossover_ms(run, record.kind, record.seq_len, record.drop_mass)
                excess = over / max(CROSSOVER_SHARE * base, CROSSOVER_MS)
                found.append((excess, over, base, record.seq_len))
        if not found:
            raise NoFigureError(NOT_MEASURED)
        excess, over, base, seq_len = max(found)
        where = f"{over / base:+.1%} ({over * 1e3:+.0f} us) at {tokens(seq_len)}"
        return Outcome(f"at worst {where}", excess <= 1)

    return Target(
        f"crossover on: on the device never slower than dense by more than "
        f"{CROSSOVER_SHARE:.0%} or {CROSSOVER_MS * 1e3:g} us",
        judge,
    )


def crossover_ms(
    run: Run, kind: str, seq_len: int, drop_mass: float | None
) -> tuple[float, float]:
    """Return how much slower than dense the operator with its crossover is, and dense's time.

    Raises:
        NoFigureError: if it was not measured or a check failed.
    """
    found = {
        record.name: record
        for record in run.result.records
        if (record.kind, record.seq_len, record.drop_mass) == (kind, seq_len, drop_mass)
    }
    if not {"crossover/ours", "crossover/dense"} <= set(found):
        raise NoFigureError(NOT_MEASURED)
    ours, dense = found["crossover/ours"], found["crossover/dense"]
    if not (ours.passed and dense.passed):
        raise NoFigureError(CHECK_FAILED)
    return milliseconds(ours) - milliseconds(dense), milliseconds(dense)


def _prefill(seq_len: int, least: float) -> Target:
    def judge(run: Run) -> Outcome:
        base = run.need("dense", seq_len)
        ratio = speed_up(base, run.need("sparse/all", seq_len, MAIN_KEPT))
        return Outcome(f"{ratio:.2f}x", ratio >= least)

    return Target(
        f"{_at(seq_len)}: prefill with all layers sparse at least {least:g}x as fast as dense",
        judge,
    )


def _at(seq_len: int) -> str:
    return f"{tokens(seq_len)}, {MAIN_KEPT:.0%} kept"


TARGETS = (
    _overhead(128 * K, 2.2, 0.04),
    _whole_over_dense(128 * K, 3.75),
    _whole_over_eager(128 * K, 1.9),
    _overhead(32 * K, 0.6),
    _fallback(128 * K, 3.0),
    _memory(128 * K, 0.6, 0.01),
    _first_call(20.0),
    _never_slower(),
    _prefill(128 * K, 1.7),
    _prefill(256 * K, 2.2),
)


def outcomes(
    runs: Sequence[Run], targets: Sequence[Target] = TARGETS
) -> Iterable[tuple[str, str, str, str]]:
    """Yield each aim, what was measured, whether it was met, and in which run."""
    for target in targets:
        judged = False
        for run in runs:
            try:
                measured, met = target.judge(run)
                verdict = "met" if met else "missed"
            except NoFigureError as error:
                if str(error) == NOT_MEASURED:
                    continue
                measured, verdict = "-", str(error)
            judged = True
            yield target.aim, measured, verdict, run.name
        if not judged:
            yield target.aim, "-", NOT_MEASURED, "-"
