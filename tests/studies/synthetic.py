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


def sampling_result() -> ResultFile:
    """Dense 200 ms, the whole 20; of its parts windows take half, sampled attention a quarter."""
    checked = {"suite": "sampling", "passed": True, "error": 2e-3}
    parts = {"score": 2.0, "sample": 3.0, "windows": 10.0, "attend": 18.0, "first queries": 1.0}
    records = [
        record("dense", ms=200.0, **checked),
        record("whole", ms=20.0, **checked),
        record("whole without dense queries", ms=19.0, **checked),
        record("dense", "eager", ms=202.0, **checked),
        record("whole", "eager", ms=25.25, **checked),
        record("crossover on", "eager", ms=101.0, **checked),
        record("whole", "memory", suite="sampling", peak_extra_mib=512.0),
        *(record(name, ms=ms, suite="sampling") for name, ms in parts.items()),
    ]
    return ResultFile(
        PROVENANCE, ARGUMENTS | {"command": "benchmarks.operator.sampling"}, tuple(records)
    )


def changed(result: ResultFile, name: str, kind: str = "graph", **fields) -> ResultFile:
    """The result with one record changed."""
    records = tuple(
        dataclasses.replace(one, **fields) if (one.name, one.kind) == (name, kind) else one
        for one in result.records
    )
    assert records != result.records
    return dataclasses.replace(result, records=records)
