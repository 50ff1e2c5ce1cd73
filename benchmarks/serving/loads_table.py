"""The tables of what `loads` timed."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.markdown import markdown_table

_DENSE = "dense"
_NAMES = {
    "alone": "alone",
    "together": "at once",
    "prefix cold": "shared beginning, not cached",
    "prefix warm": "shared beginning, cached",
}
_HEAD: tuple[str, ...] = (
    "load",
    "prompt",
    "tokens per step",
    "dense",
    "sparse",
    "speed-up",
    "tokens kept",
)
_Key = tuple[str, int, int]


def tables(result: dict[str, Any]) -> str:
    """Return the tables of a result file, and where they are from, as Markdown."""
    totals, gaps = [_HEAD], [_HEAD[:5]]
    for key, ours, theirs in _pairs(result):
        if key[0] == "together":
            totals.append(_line(key, ours, theirs, theirs["seconds"], ours["seconds"]))
        elif ours["token_ms"] and theirs["token_ms"]:
            cells = (f"{median(row['token_ms']):.1f} ms" for row in (theirs, ours))
            gaps.append((*_start(key, ours), *cells))
    parts = ["The median time to a request's first token:\n\n" + first_tokens(result)]
    if len(totals) > 1:
        parts.append("The time until all requests at once are answered:\n\n")
        parts[-1] += markdown_table(totals)
    if len(gaps) > 1:
        parts.append("The median time from a token to the next:\n\n" + markdown_table(gaps))
    return "\n".join([*parts, _note(result)])


def first_tokens(result: dict[str, Any]) -> str:
    """Return the table of the times to a request's first token."""
    lines = [_HEAD]
    for key, ours, theirs in _pairs(result):
        lines.append(_line(key, ours, theirs, median(theirs["first"]), median(ours["first"])))
    return markdown_table(lines)


def _pairs(result: dict[str, Any]) -> Iterator[tuple[_Key, dict[str, Any], dict[str, Any]]]:
    """Yield each load's sparse and dense rows."""
    dense = {_key(row): row for row in result["rows"] if row["setting"] == _DENSE}
    sparse = {_key(row): row for row in result["rows"] if row["setting"] != _DENSE}
    for key in sorted(dense.keys() & sparse.keys(), key=_order):
        yield key, sparse[key], dense[key]


def _key(row: dict[str, Any]) -> _Key:
    return row["load"], row["prompt_tokens"], row["chunk"]


def _order(key: _Key) -> tuple[int, int, int]:
    return list(_NAMES).index(key[0]), key[1], key[2]


def _start(key: _Key, row: dict[str, Any]) -> tuple[str, str, str]:
    load, tokens, chunk = key
    number = f"{len(row['first'])} " if load == "together" else ""
    return number + _NAMES[load], f"{tokens:,}", f"{chunk:,}"


def _line(
    key: _Key, ours: dict[str, Any], theirs: dict[str, Any], slow: float, fast: float
) -> tuple[str, ...]:
    kept = f"{ours['kept']:.1%}" if ours["layer_calls_sparse"] else "dense"
    start = _start(key, theirs)
    return (*start, f"{slow:.3f} s", f"{fast:.3f} s", f"{slow / fast:.2f}x", kept)


def _note(result: dict[str, Any]) -> str:
    """Say where the measurement is from."""
    versions = result["versions"]
    named = ("vllm", "torch", "triton", "transformers", "flash-attn-4", "python")
    used = ", ".join(f"{name} {versions.get(name) or 'not installed'}" for name in named)
    modes = {
        "eager": "eager mode",
        "decode-graphs": "CUDA graphs for decoding, layers not compiled",
        "default": "compiled layers and CUDA graphs",
    }
    cache = result["dtype"] if result["cache"] == "auto" else result["cache"]
    layers = dict.fromkeys(
        engine["attention"] for engine in result["engines"].values() if "attention" in engine
    )
    return (
        f"{result['device']}, {result['dtype']}, "
        f"cache {cache} in blocks of {result['block_size']}, {modes[result['mode']]}; "
        f"{result['repetitions']} prompt(s) of each length.\n"
        f"Versions: {used}.\n"
        f"Commit: {result['commit'][:7]}.\n"
        f"Attention layers: {'; '.join(layers)}.\n"
    )
