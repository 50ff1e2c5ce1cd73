"""The page of results that a user can act on, docs/results.md, from every study's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.block_sparse import accuracy
from benchmarks.frontier.confirmation import Point, Shown, glance, name_of, points
from benchmarks.frontier.page import CONFIRMED, SECOND
from benchmarks.frontier.words import describe
from benchmarks.lookup import speed_up
from benchmarks.markdown import NONE, Page, figure_or, markdown_table, number
from benchmarks.operator.page import RESULTS, load_runs
from benchmarks.pooling import load_folder, pooled
from benchmarks.replay.layers import ReplayPoint
from benchmarks.replay.results import Replay
from benchmarks.serving import page as serving
from benchmarks.style import figure_file, interval
from token_sparse_attention.benchmark.runs import Run, milliseconds, tokens
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.evaluation.summary import difference_interval, relative_loss_bound

ROOT = RESULTS.parents[1]
LENGTH = 131072
BUNDLED, QWEN = "bundled, 11.8M", "Qwen3, 23.6M"
SHIPPED = "H3"
"""The configuration that ships as the bundled model's profile."""
BY_LENGTH = ("published", "K", SHIPPED)
SELECTION = ("op-h200-current", "op-h200-long", "op-h200")
"""Runs of token selection, the newest first."""
PREFILL = "prefill-h100-32-heads"
KEPT = 0.5


def pages() -> list[Page]:
    """Return the page."""
    models = load_models()
    runs = {run.name: run for run in load_runs()}
    bundled = models[BUNDLED]
    tables = {
        "models": glance(models, LENGTH),
        "settings": legend(models),
        "lengths": by_length(points(bundled.rounds, bundled.replays)),
        "layer": one_layer(bundled.replays[0].points),
        "selection": selection([runs[name] for name in SELECTION]),
        "prefill": prefill(runs[PREFILL]),
        "serving": served(serving.read("first-token-chunks-h100.json")),
        "patterns": patterns(),
        "files": files(models, [*(runs[name] for name in SELECTION), runs[PREFILL]]),
    }
    figures = {"accuracy-speed": lambda path: draw(models, path)}
    return [Page(ROOT / "docs" / "results.md", tables, figures)]


def load_models() -> dict[str, Shown]:
    """Return what was confirmed on each model."""
    return {
        name: Shown(
            list(load_folder(folder).values()), [Replay.load(folder / "replay-128k.json")], chosen
        )
        for name, folder, chosen in (
            (BUNDLED, CONFIRMED, ("published", "F", "K", SHIPPED, "calibrated-12")),
            (QWEN, SECOND, ("published", "calibrated-8", "calibrated-12")),
        )
    }


def legend(models: Mapping[str, Shown]) -> str:
    """Say what each configuration of the main table runs."""
    lines = []
    for model, shown in models.items():
        settings = {n: s for one in shown.rounds for n, s in one.header.configurations.items()}
        for name in shown.configurations:
            if name != "published":
                lines.append(f"- {model}, {name_of(name)}: {describe(settings[name])}.\n")
    return "".join(lines)


def by_length(found: Sequence[Point]) -> str:
    """Return loss, its bound and the number of prompts of `BY_LENGTH`, one row per length."""
    lines = [["tokens", *map(name_of, BY_LENGTH)]]
    for length in sorted({point.length for point in found}):
        at = {point.configuration: point for point in found if point.length == length}
        cells = [
            f"{at[name].loss:.1%}, below {relative_loss_bound(at[name].scores):.1%} "
            f"({len(at[name].pairs):,})"
            for name in BY_LENGTH
        ]
        lines.append([tokens(length), *cells])
    return markdown_table(lines)


def one_layer(measured: Sequence[ReplayPoint]) -> str:
    """Return the operator's time in one layer by its number of samples, without dense heads."""
    lines = [["heads", "window", "samples", "dense, ms", "sparse, ms", "speed-up"]]
    seen: dict[tuple[int, int, int, int], ReplayPoint] = {}
    for point in measured:
        settings = point.settings or {}
        sampled = settings.get("method") == KVSamplingConfig.method
        if sampled and not settings["dense_heads"] and settings["sliding_window"] == 2048:
            shape = (-point.num_heads, point.head_dim)
            seen.setdefault((*shape, 2048, settings["num_samples"]), point)
    for (heads, head_dim, window, samples), point in sorted(seen.items()):
        if not point.passed or point.dense_ms is None or point.median_ms is None:
            continue
        cells = [f"{-heads} of {head_dim}", f"{window:,}", f"{samples:,}"]
        cells += [number(point.dense_ms), number(point.median_ms)]
        lines.append([*cells, f"{point.dense_ms / point.median_ms:.2f}x"])
    return markdown_table(lines)


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
    ("samples-4096/all", None, "4,096 samples, all layers"),
    ("samples-4096/half", None, "4,096 samples, half of the layers"),
    ("samples-1024/all", None, "1,024 samples, all layers"),
    ("sparse/all", KEPT, "token selection, half kept, all layers"),
    ("sparse/half", KEPT, "token selection, half kept, half of the layers"),
)


def prefill(run: Run) -> str:
    """Return the time to a model's first token, dense, and the speed-up of each setting."""
    lengths = run.lengths("dense")
    dense = [f"{milliseconds(run.need('dense', length)):,.0f} ms" for length in lengths]
    lines = [["settings", *map(tokens, lengths)], ["dense", *dense]]
    for name, kept, label in _PREFILL_SETTINGS:
        lines.append(
            [label, *(figure_or(_first_token, run, name, length, kept) for length in lengths)]
        )
    return markdown_table(lines)


def _first_token(run: Run, name: str, length: int, kept: float | None) -> str:
    return f"{speed_up(run.need('dense', length), run.need(name, length, kept)):.2f}x"


_SERVED = {
    "dense": "dense",
    "num_samples=2048": "2,048 samples, window 512",
    "drop_mass=0.5": "token selection, about half kept",
}


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
    """Return what each pattern costs and gains at `LENGTH`, alone and with token sparsity."""
    rounds, times, _ = accuracy.load()
    return accuracy.at_length(pooled(rounds), times, LENGTH)


def files(models: Mapping[str, Shown], runs: Sequence[Run]) -> str:
    """Return which device and commit each part of the page is from."""
    lines = [["what", "device", "commit", "flash-attn-4"]]
    measured: list[tuple[str, Any]] = []
    for model, shown in models.items():
        measured += [(f"replies, {model}", one.header.provenance) for one in shown.rounds]
        measured += [(f"attention of all layers, {model}", r.provenance) for r in shown.replays]
    measured += [(f"`{run.name}`", run.result.provenance) for run in runs]
    for what, about in measured:
        version = about["versions"].get("flash-attn-4") or NONE
        line = [what, about["device"], f"`{about['commit'][:12]}`", version]
        if line not in lines:
            lines.append(line)
    return markdown_table(lines)


def draw(models: Mapping[str, Shown], path: Path) -> None:
    """Draw the score's difference from dense over the speed-up at `LENGTH`, with its interval."""
    with figure_file(path) as axes:
        for color, (model, shown) in zip(("tab:blue", "tab:orange"), models.items()):
            for marker, point in zip("osD^v", shown.at(LENGTH)):
                if point.times is None or point.times.times is None:
                    continue
                low, high = difference_interval(point.scores)
                middle = point.sparse - point.dense
                label = f"{model}: {name_of(point.configuration)}"
                look = {"color": color, "marker": marker, "label": label}
                interval(axes, point.times.times.speed_up, low, middle, high, **look)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"speed-up of all layers' attention over dense, {tokens(LENGTH)} tokens")
        axes.set_ylabel("score minus dense score,\n95% interval")
        axes.set_xlim(left=0)
        axes.legend(loc="lower right", fontsize=7)
