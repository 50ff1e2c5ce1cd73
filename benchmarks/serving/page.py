"""The page of what was measured in vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.markdown import EMPTY, Page
from benchmarks.serving import loads_table

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "serving"


def pages() -> list[Page]:
    """Return the pages, made from the files in `RESULTS`."""
    return [
        Page(FOLDER / "README.md", tables()),
        Page(FOLDER.parents[1] / "docs" / "serving.md", {"stress": _stress()}),
    ]


def tables() -> dict[str, str]:
    """Return the page's tables as Markdown, by name."""
    rows = read("chunks-cpu.json")["rows"]
    return {
        "chunks": _chunks(rows),
        "prefix": _prefix(rows),
        "first-token": _first_token("first-token-h200.json"),
        "first-token-chunks": _first_token("first-token-chunks-h100.json"),
        "loads": _loads("loads-h200.json"),
        "loads-fp8": _loads("loads-fp8-h200.json"),
    }


def _loads(name: str) -> str:
    return loads_table.tables(read(name)) if (RESULTS / name).exists() else EMPTY + "\n"


def read(name: str) -> dict[str, Any]:
    """Return a result file's content."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def _chunks(rows: list[dict[str, Any]]) -> str:
    lines = [
        _line(row, "whole" if row["chunk"] >= row["prompt_tokens"] else str(row["chunk"]))
        for row in rows
        if row["experiment"] == "chunks"
    ]
    return _table("tokens per step", lines)


def _prefix(rows: list[dict[str, Any]]) -> str:
    whole = [row for row in rows if row["chunk"] >= row["prompt_tokens"]]
    lines = [
        _line(row, "from the earlier prompt" if row["experiment"] == "prefix" else "its own")
        for row in whole
        if row["setting"] != "dense"
    ]
    return _table("prefix", lines)


def _table(column: str, lines: list[str]) -> str:
    head = f"| settings | prompt | {column} | right answers | replies as dense | tokens kept |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines]) + "\n"


def _line(row: dict[str, Any], what: str) -> str:
    return (
        f"| {row['setting']} | {row['prompt_tokens']} | {what} | {row['exact']} of {row['n']} "
        f"| {row['as_dense']} of {row['n']} | {row['kept']:.0%} |"
    )


def _stress() -> str:
    result = read("stress-cpu.json")
    memory = [sum(one) for one in result["memory_mib_of_processes_per_round"]]
    lengths = result["prompt_tokens"]
    cached = result["tokens_from_cached_prefixes"] / result["tokens_looked_up"]
    cells = {
        "requests, streamed": result["requests"],
        "further requests hung up on": result["aborted"],
        "prompt lengths": f"{lengths['min']} to {lengths['max']} tokens",
        "tokens of a step at most": f"{result['tokens_per_step']:,}",
        "prompt tokens from a cached prefix": f"{cached:.0%}",
        "requests at once": ", ".join(map(str, result["concurrency"])),
        "lost, wrong or mixed up": result["wrong_or_lost"],
        "resident memory after each round": ", ".join(f"{one:.0f}" for one in memory) + " MiB",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells.items())]) + "\n"


def _first_token(name: str) -> str:
    """Return the table of a file, whose name ends with the GPU it was measured on."""
    result = read(name)
    gpu = name.removesuffix(".json").rpartition("-")[2].upper()
    dense = {
        row["prompt_tokens"]: row["median"] for row in result["rows"] if row["setting"] == "dense"
    }
    lines = [
        "| settings | prompt | median | spread | speed-up | tokens kept |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["prompt_tokens"]):  # stable
        lines.append(
            f"| {_setting(row['setting'])} | {row['prompt_tokens']} | {row['median']:.3f} s "
            f"| {min(row['seconds']):.3f} to {max(row['seconds']):.3f} s "
            f"| {dense[row['prompt_tokens']] / row['median']:.2f}x | {row['kept']:.0%} |"
        )
    return "\n".join([*lines, "", _first_token_note(result, gpu)]) + "\n"


def _setting(name: str) -> str:
    return name if name == "dense" else f"`{name}`"


def _decoding(engines: dict[str, Any]) -> str:
    """Say how fast the tokens after the first came, where that was timed."""
    times = []
    for name, engine in engines.items():
        taken = engine.get("decode_ms")
        if isinstance(taken, list) and taken:
            low, _, high = quantiles(taken, n=4)
            times.append(f"{_setting(name)} {median(taken):.2f} ms ({low:.2f} to {high:.2f})")
        elif taken and not isinstance(taken, list):  # one reply, less the prefill's time
            times.append(f"{_setting(name)} {taken:.2f} ms")
    return (
        f"Each token after the first, after the longest prompt: {', '.join(times)}."
        if times
        else ""
    )


def _first_token_note(result: dict[str, Any], gpu: str) -> str:
    """Say where the measurement is from."""
    versions = result["versions"]
    named = ("vllm", "torch", "triton", "transformers", "flash-attn-4", "python")
    used = ", ".join(f"{name} {versions[name] or 'not installed'}" for name in named)
    layers = {name: engine["attention"] for name, engine in result["engines"].items()}
    attention = "; ".join(dict.fromkeys(layers.values()))
    engines = result["engines"].values()
    as_dense = all(engine["short_prompts_as_dense"] for engine in engines)
    mode = "CUDA graphs" if result["graphs"] else "eager mode"
    steps = (
        f"at most {result['chunk']:,} tokens a step" if result.get("chunk") else "whole prompts"
    )
    apart = max(
        engine.get("short_prompts_difference", 0.0) for engine in result["engines"].values()
    )
    return (
        f"One NVIDIA {gpu}, {result['dtype']}, {mode}, {steps}; "
        f"{result['repetitions']} prompts after {result['warm_ups']} to warm up.\n"
        f"Versions: {used}.\n"
        f"Commit: {result['commit'][:7]}.\n"
        f"Attention layers: {attention}.\n"
        f"Short prompts answered as by dense, to the bit: "
        f"{'yes' if as_dense else f'no, log-probabilities differ by up to {apart:g}'}.\n"
        f"{_decoding(result['engines'])}"
    ).rstrip()
