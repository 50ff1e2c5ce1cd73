"""The page of results that a user can act on, docs/results.md, from every study's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.block_sparse import accuracy
from benchmarks.lookup import speed_up
from benchmarks.markdown import EMPTY, NONE, Page, figure_or, markdown_table, number
from benchmarks.operator.page import RESULTS, load_runs
from benchmarks.operator.sampling import AUTO, WHOLE
from benchmarks.operator.sampling_tables import (
    AIMS,
    auto_speed_up,
    by_shape,
    eager_speed_up,
    graph_speed_up,
)
from benchmarks.pooling import load_folder, pooled
from benchmarks.released import page as released
from benchmarks.serving import loads_table
from benchmarks.serving import page as serving
from token_sparse_attention.benchmark.runs import Run, milliseconds, tokens
from token_sparse_attention.evaluation.record import EvalResults
from token_sparse_attention.evaluation.summary import Row, summarise

ROOT = RESULTS.parents[1]
LENGTH = 131072
SELECTED = {"bundled, 11.8M": "bundled", "Qwen3, 23.6M": "qwen3"}
"""Folders of replies under token selection, by what the page calls the model."""
SELECTION = ("op-h200-current", "op-h200-long", "op-h200")
"""Runs of token selection, the newest first."""
PREFILL = "prefill-h100-32-heads"
KEPT = 0.5
SHORTEST = 16384


def pages() -> list[Page]:
    """Return the page."""
    replies = {
        model: list(load_folder(RESULTS / "selection" / folder).values())
        for model, folder in SELECTED.items()
    }
    runs = {run.name: run for run in load_runs()}
    named = [*(runs[name] for name in SELECTION), runs[PREFILL]]
    sampled = [run for run in runs.values() if run.name.startswith("sampling-h")]  # GPUs
    tables = {
        "layer": one_layer(sampled),
        "divergence": released.table(released.divergence(released.same_prompts())),
        "first-token": loads_table.first_tokens(serving.read("loads-h200.json")),
        "selection-answers": by_length(replies),
        "selection": selection([runs[name] for name in SELECTION]),
        "prefill": prefill(runs[PREFILL]),
        "serving": served(serving.read("first-token-chunks-h100.json")),
        "patterns": patterns(),
        "files": files(replies, [*sampled, *named]),
    }
    first = {
        "speed": layer_by_length(sampled),
        "peers": released.table(released.peers(released.same_prompts())),
    }
    return [Page(ROOT / "docs" / "results.md", tables), Page(ROOT / "README.md", first)]


def layer_by_length(runs: Sequence[Run]) -> str:
    """Return the speed-up of a layer of 32 heads with the defaults, where dense takes long."""
    heads = AIMS[0].heads
    found = [run for name, run in by_shape(runs) if name == heads]
    lengths = [length for run in found for length in run.lengths(AUTO) if length >= SHORTEST]
    lines = [["tokens", *map(tokens, lengths)]]
    for run in found:
        lines.append(["speed-up", *(figure_or(auto_speed_up, run, one) for one in lengths)])
    return markdown_table(lines)


def one_layer(runs: Sequence[Run]) -> str:
    """Return the speed-up of one layer under KV sampling, by heads and length."""
    found = list(by_shape(runs))
    if not found:
        return EMPTY + "\n"
    lengths = sorted({length for _, run in found for length in run.lengths(WHOLE)})
    lines = [["heads", "timed", *map(tokens, lengths)]]
    for heads, run in found:
        for timed, cell in (
            ("eager calls", eager_speed_up),
            ("CUDA graph", graph_speed_up),
            ("eager calls, crossover on", auto_speed_up),
        ):
            lines.append([heads, timed, *(figure_or(cell, run, length) for length in lengths)])
    return markdown_table(lines)


def by_length(replies: Mapping[str, Sequence[EvalResults]]) -> str:
    """Return what token selection loses in every layer, one row per model and length."""
    head = ["model", "tokens", "score, dense", "loss", "loss below", "work", "prompts"]
    lines = [head]
    for model, rounds in replies.items():
        rows = [row for one in rounds for row in summarise(one) if _is_shown(row)]
        for row in sorted(rows, key=lambda row: row.length or 0):
            lines.append(
                [
                    *(model, tokens(row.length or 0), f"{row.score:.3f}, {row.dense_score:.3f}"),
                    *(f"{row.relative_loss:.1%}", f"{row.relative_loss_upper:.1%}"),
                    *(row.shown_work, f"{row.pairs:,}"),
                ]
            )
    return markdown_table(lines)


def _is_shown(row: Row) -> bool:
    return row.task is None and bool(row.length) and row.configuration == "published"


def selection(runs: Sequence[Run]) -> str:
    """Return the whole operator's time where half of the tokens are kept, of the newest run."""
    lines = [["tokens", "dense, ms", "half kept, ms", "speed-up"]]
    newest: dict[int, Run] = {}
    for run in runs:
        for length in run.lengths("ours/whole"):
            if run.find("ours/whole", length, KEPT):
                newest.setdefault(length, run)
    for length, run in sorted(newest.items()):
        cells = (figure_or(cell, run, length) for cell in (_dense_ms, _kept_ms, _faster))
        lines.append([tokens(length), *cells])
    return markdown_table(lines)


def _dense_ms(run: Run, length: int) -> str:
    return number(milliseconds(run.dense(length)))


def _kept_ms(run: Run, length: int) -> str:
    return number(milliseconds(run.need("ours/whole", length, KEPT)))


def _faster(run: Run, length: int) -> str:
    return f"{speed_up(run.dense(length), run.need('ours/whole', length, KEPT)):.2f}x"


_PREFILL_SETTINGS = (
    ("sparse/all", "token selection, half kept, all layers"),
    ("sparse/half", "token selection, half kept, half of the layers"),
)


def prefill(run: Run) -> str:
    """Return the time to a model's first token, dense, and the speed-up of each setting."""
    lengths = run.lengths("dense")
    dense = [f"{milliseconds(run.need('dense', length)):,.0f} ms" for length in lengths]
    lines = [["settings", *map(tokens, lengths)], ["dense", *dense]]
    for name, label in _PREFILL_SETTINGS:
        lines.append([label, *(figure_or(_first_token, run, name, length) for length in lengths)])
    return markdown_table(lines)


def _first_token(run: Run, name: str, length: int) -> str:
    return f"{speed_up(run.need('dense', length), run.need(name, length, KEPT)):.2f}x"


_SERVED = {"dense": "dense", "drop_mass=0.5": "token selection, about half kept"}


def served(result: Mapping[str, Any]) -> str:
    """Return the time to the first token in vLLM, by setting and length."""
    rows = {(row["setting"], row["prompt_tokens"]): row["median"] for row in result["rows"]}
    lengths = sorted({length for _, length in rows})
    lines = [["settings", *map(tokens, lengths)]]
    for setting, label in _SERVED.items():
        cells = [f"{rows['dense', length] / rows[setting, length]:.2f}x" for length in lengths]
        if setting == "dense":
            cells = [f"{1e3 * rows[setting, length]:,.0f} ms" for length in lengths]
        lines.append([label, *cells])
    return markdown_table(lines)


def patterns() -> str:
    """Return what each pattern costs and gains at `LENGTH`, alone and on selected tokens."""
    rounds, times, _ = accuracy.load()
    return accuracy.at_length(pooled(rounds), times, LENGTH)


def files(replies: Mapping[str, Sequence[EvalResults]], runs: Sequence[Run]) -> str:
    """Return which device and commit each part of the page is from."""
    lines = [["what", "device", "commit", "flash-attn-4"]]
    measured: list[tuple[str, Any]] = [
        (f"replies, {model}", one.header.provenance)
        for model, rounds in replies.items()
        for one in rounds
    ]
    measured += [(f"`{run.name}`", run.result.provenance) for run in runs]
    for what, about in measured:
        version = about["versions"].get("flash-attn-4") or NONE
        line = [what, about["device"], f"`{str(about['commit'])[:12]}`", version]
        if line not in lines:
            lines.append(line)
    return markdown_table(lines)
