"""The tables of vLLM under several loads."""

from __future__ import annotations

from typing import Any

from benchmarks.serving.loads_table import tables


def row(setting: str, load: str, first: list[float], **changes: Any) -> dict[str, Any]:
    known = {"chunk": 16384, "prompt_tokens": 32768, "seconds": sum(first), "token_ms": [7.0, 9.0]}
    counts = {"kept": 0.125, "layer_calls_sparse": 64 if setting != "dense" else 0}
    return {"setting": setting, "load": load, "first": first} | known | counts | changes


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": "a GPU", "dtype": "bfloat16", "cache": "auto", "block_size": 128,
        "mode": "decode-graphs", "repetitions": 2, "versions": {"vllm": "0.26.0"},
        "commit": "0123456789", "engines": {"dense": {"attention": "A"}, "default": {}},
        "rows": rows,
    }  # fmt: skip


def test_sparse_is_compared_with_dense_under_the_same_load():
    rows = [
        row("dense", "alone", [1.2, 1.0]),
        row("dense", "alone", [8.0, 8.0], prompt_tokens=131072),  # sparse was not timed
        row("dense", "together", [1.0, 2.0]),
        row("default", "together", [0.5, 1.0]),
        row("default", "alone", [0.5, 0.6]),
    ]
    first, every, gaps = tables(result(rows)).split("\n\n")[1:6:2]
    assert "| alone | 32,768 | 16,384 | 1.100 s | 0.550 s | 2.00x | 12.5% |" in first
    assert "131,072" not in first
    assert "| 2 at once | 32,768 | 16,384 | 3.000 s | 1.500 s | 2.00x | 12.5% |" in every
    assert "| alone | 32,768 | 16,384 | 8.0 ms | 8.0 ms |" in gaps
    assert "at once" not in gaps


def test_a_load_that_ran_dense_throughout_says_so():
    rows = [row("dense", "alone", [1.0]), row("default", "alone", [1.0], layer_calls_sparse=0)]
    assert "| 1.00x | dense |" in tables(result(rows))
