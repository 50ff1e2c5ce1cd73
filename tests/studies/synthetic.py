"""A run with made-up times, which tables, figures and aims can be checked against."""

from __future__ import annotations

import dataclasses

from token_sparse_attention.benchmark.record import Record, ResultFile

PROVENANCE = {
    "device": "Abacus 9000",
    "versions": {"torch": "9.9", "triton": None},
    "commit": "0123456789abcdef",
}
ARGUMENTS = {"command": "tsa bench op", "lengths": [131072], "device": "cuda"}
S = 131072


def record(name, kind="graph", seq_len=S, ms=None, **fields):
    return Record(
        suite=fields.pop("suite", "op"),
        name=name,
        kind=kind,
        batch=1,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        seq_len=seq_len,
        dtype="bfloat16",
        median_ms=ms,
        low_ms=None if ms is None else ms * 0.99,
        high_ms=None if ms is None else ms * 1.01,
        samples=0 if ms is None else 5,
        **fields,
    )


def op_result() -> ResultFile:
    """128K tokens, half of them kept: overhead 2 ms, attention 54, the whole 56, dense 217."""
    checked, half = {"passed": True, "error": 2e-3}, {"kept": 0.5}
    stages = {"select": 0.2, "gather": 0.9, "scatter": 0.4}
    crossover = {"kept": 1.0, "drop_mass": 0.005, "passed": True}
    records = [
        record("ours/whole", "first_call", ms=5.0, **half),
        record("dense/fa4", ms=217.0, **checked),
        record("dense/flash", ms=424.0, **checked),
        record("dense/flex", "skipped", note="OutOfMemoryError: too large"),
        record("ours/score", ms=0.5),
        record("ours/window", ms=2.8),
        *(record(f"ours/{name}", ms=ms, **half) for name, ms in stages.items()),
        record("ours/attend", ms=54.0, **half),
        record("ours/whole", ms=56.0, **half, **checked),
        record("ours/whole", "eager", ms=56.1, **half, **checked),
        record("ours/whole_window", ms=60.0, **half, **checked),
        record("ours/unchunked", ms=55.9, **half, **checked),
        record("ours/whole", "memory", peak_extra_mib=512.0, **half),
        record("ours/unchunked", "memory", peak_extra_mib=2048.0, **half),
        record("eager/whole", "eager", ms=122.0, **half, **checked),
        record("eager/whole", "memory", peak_extra_mib=4608.0, **half),
        record("crossover/dense", seq_len=1024, ms=0.06, **crossover),
        record("crossover/ours", seq_len=1024, ms=0.07, **crossover),
    ]
    return ResultFile(PROVENANCE, ARGUMENTS, tuple(records))


def prefill_result() -> ResultFile:
    """128K and 256K tokens; the longer one's sparse run missed its aim."""
    records = [
        record(name, "eager", seq_len=seq_len, ms=ms, kept=kept, suite="prefill", passed=True)
        for seq_len, name, kept, ms in (
            (131072, "dense", None, 9000.0),
            (131072, "sparse/all", 0.5, 4500.0),
            (131072, "sparse/half", 0.5, 6000.0),
            (131072, "samples-4096/all", None, 3000.0),
            (262144, "dense", None, 32000.0),
            (262144, "sparse/all", 0.5, 16000.0),
        )
    ]
    return ResultFile(PROVENANCE, {"command": "tsa bench prefill"}, tuple(records))


def far_result() -> ResultFile:
    """Dense 200 ms: sampling 4, windows 3, 9 with sampled keys; dense queries 2 more."""
    checked = {"suite": "far", "passed": True, "error": 2e-3}
    records = [
        record("far/dense/fa4", ms=200.0, **checked),
        record("far/score", ms=0.5, suite="far"),
        record("far/draw/samples-4096", ms=4.0, suite="far"),
        record("far/windows/window", ms=3.0, suite="far"),
        record("far/windows/samples-4096", ms=9.0, suite="far"),
        record("far/whole/window", ms=4.0, **checked),
        record("far/whole/samples-4096", ms=14.0, **checked),
        record("far/whole/samples-4096-dense-128", ms=16.0, **checked),
    ]
    return ResultFile(PROVENANCE, {"command": "tsa bench far"}, tuple(records))


def changed(result: ResultFile, name: str, kind: str = "graph", **fields) -> ResultFile:
    """The result with one record changed."""
    records = tuple(
        dataclasses.replace(one, **fields) if (one.name, one.kind) == (name, kind) else one
        for one in result.records
    )
    assert records != result.records
    return dataclasses.replace(result, records=records)
