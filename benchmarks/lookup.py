"""What the pages ask of a run's records, beyond what `tsa bench` shows."""

from __future__ import annotations

from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.benchmark.runs import MAIN_KEPT, Run, milliseconds

WALL_KINDS = ("eager", "graph", "events")  # the host's part vanishes where it was not timed
STAGES = ("ours/score", "ours/select", "ours/gather", "ours/scatter")


def kept_shares(run: Run, name: str) -> list[float]:
    """Return the kept shares at which something was measured, descending."""
    kept = {r.kept for r in run.result.records if r.name == name and r.kept is not None}
    return sorted(kept, reverse=True)


def main_kept(run: Run) -> float:
    """Return the kept share to show where only one is shown."""
    shares = kept_shares(run, "ours/whole")
    return MAIN_KEPT if MAIN_KEPT in shares or not shares else shares[0]


def overhead_ms(run: Run, seq_len: int, kept: float) -> float:
    """Return the time of all stages but attention.

    Raises:
        NoFigureError: if a stage was not measured or the whole operator's check failed.
    """
    run.need("ours/whole", seq_len, kept)
    return sum(
        milliseconds(
            run.need(name, seq_len, None if name == "ours/score" else kept, checked=False)
        )
        for name in STAGES
    )


def speed_up(base: Record, ours: Record) -> float:
    """Return how many times as fast `ours` is as `base`, both of one run and both checked."""
    return milliseconds(base) / milliseconds(ours)
