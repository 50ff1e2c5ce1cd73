"""One record type for every measurement, and the file that holds a run's records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from token_sparse_attention.records import JsonFile, check_choice

SUITES = ("op", "prefill", "block", "sampling")
KERNEL_KINDS = ("graph", "events", "eager")  # what counts as kernel time, best first
KINDS = (*KERNEL_KINDS, "first_call", "memory", "skipped")


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        suite: ``"op"``, ``"prefill"``, ``"block"`` or ``"sampling"``.
        name: what ran, for example ``"dense/fa4"`` or ``"ours/score"``.
        kind: ``"graph"``: time on the device by replay of a CUDA graph; ``"events"``: time
            between CUDA events, where no graph could be captured; ``"eager"``: host clock from
            an idle device to an idle device; ``"first_call"``: what the first call at a
            length takes beyond a warm one; ``"memory"``; ``"skipped"``: see `note`.
        batch: B.
        num_heads: H.
        num_kv_heads: H_kv.
        head_dim: D.
        seq_len: S.
        dtype: of the tensors.
        kept: share of the tokens attended over; in the suite ``"block"`` the density, attended
            blocks over all causal blocks, a block on the diagonal counted as a whole one. None
            where that does not apply.
        drop_mass: the setting that decided `kept`, None where `kept` was given.
        median_ms: median time.
        low_ms: 20th percentile of the time.
        high_ms: 80th percentile of the time.
        samples: how many times were taken.
        peak_extra_mib: peak memory beyond what was allocated before the call and what the
            call returns.
        error: relative error against float64, the worst of the rows checked.
        passed: whether the check passed, None if there is none.
        note: what else to know.
    """

    suite: str
    name: str
    kind: str
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int
    dtype: str
    kept: float | None = None
    drop_mass: float | None = None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    peak_extra_mib: float | None = None
    error: float | None = None
    passed: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        check_choice("suite", self.suite, SUITES)
        check_choice("kind", self.kind, KINDS)


@dataclass(frozen=True)
class ResultFile(JsonFile):
    """What one run measured, and where.

    Attributes:
        provenance: device, versions and commit when the measurement began.
        arguments: what the command was asked for.
        records: the measurements.
    """

    ROWS: ClassVar = ("records",)
    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def failures(self) -> list[Record]:
        """The records whose check failed."""
        return [record for record in self.records if record.passed is False]
