"""The page of what a released model showed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import EMPTY, NONE, Page, markdown_table
from benchmarks.pooling import load_folder, pooled
from benchmarks.released.join import joined

from token_sparse_attention.benchmark.runs import tokens
from token_sparse_attention.calibration.record import CalibrationResult
from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import show_work
from token_sparse_attention.evaluation.summary import summarise as answer_rows
from token_sparse_attention.fidelity.prompts import SHAPES
from token_sparse_attention.fidelity.record import FidelityResults, load_results
from token_sparse_attention.fidelity.summary import Interval, Row, summarise

Lines = list[list[str]]
FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "released"
SAME_PROMPTS = ("main", "calibrated", "patterns")
"""Files of `tsa fidelity` that are about the same prompts."""
OTHERS = ("short", "crossover", "yarn")
"""Files of `tsa fidelity` at other lengths."""
READ = ("short", "yarn")
"""Those of them that say how well the dense model reads their lengths."""
NAMES = {
    "default": "window 2,048, 2,048 samples (default)",
    "m4096": "window 2,048, 4,096 samples",
    "m8192": "window 2,048, 8,192 samples",
    "w4096": "window 4,096, 2,048 samples",
    "w1024-m1024": "block and window 1,024, 1,024 samples",
    "window": "window 2,048 and sinks alone",
    "later": "default in the later half of the layers, dense before",
    "low4096-up512": "4,096 samples in the earlier half, 512 in the later",
    "low4096-up1024": "4,096 samples in the earlier half, 1,024 in the later",
    "quarter": "calibrated for a quarter of the work, window 2,048",
    "quarter-w1024": "calibrated for a quarter of the work, window 1,024",
    "eighth": "calibrated for an eighth of the work, window 1,024",
    "flexprefill": "FlexPrefill",
    "xattention": "XAttention",
    "minference": "MInference",
}
"""Configurations, as the page calls them."""
PEERS = ("default", "m4096", "window", "flexprefill", "xattention", "minference")
"""Those that README.md shows."""


def pages() -> list[Page]:
    """Return the page, made from the files in `RESULTS`; those that are missing leave a gap."""
    found, main = _files(), same_prompts()
    others = {name: load_results(found[name]) for name in OTHERS if name in found}
    chosen = [CalibrationResult.load(path) for path in sorted(RESULTS.glob("*.measured.json"))]
    tables = {
        "divergence": divergence(main),
        "lengths": by_length(list(others.values())),
        "dense": dense_loss([*main, *(others[name] for name in READ if name in others)]),
        "choices": choices(chosen),
        "layers": layers(chosen),
        "heads": heads(chosen),
        "answers": answers(list(load_folder(RESULTS / "answers").values())),
    }
    return [Page(FOLDER / "README.md", {name: table(lines) for name, lines in tables.items()})]


def same_prompts() -> list[FidelityResults]:
    """Return the results about the same prompts as one; nothing if there are none."""
    found = _files()
    parts = [load_results(found[name]) for name in SAME_PROMPTS if name in found]
    return [joined(parts)] if parts else []


def _files() -> dict[str, Path]:
    return {path.name.partition(".jsonl")[0]: path for path in RESULTS.glob("*.jsonl*")}


def table(lines: Lines) -> str:
    """Return lines as a table, or that nothing was measured yet."""
    return markdown_table(lines) if len(lines) > 1 else EMPTY + "\n"


def divergence(found: Sequence[FidelityResults]) -> Lines:
    """Return how far each configuration's predictions are from dense ones."""
    lines = [
        ["every layer, unless said", "work", "KL per token", "of the default", *SHAPES,
         "same top token", "loss change", "prompts"],
    ]  # fmt: skip
    for results in found:
        rows = summarise(results)
        of_shape = {(row.configuration, row.shape): row for row in rows}
        for row in rows:
            if row.shape is None:
                shapes = (of_shape.get((row.configuration, shape)) for shape in SHAPES)
                lines.append(
                    [NAMES.get(row.configuration, row.configuration), _work(row), _kl(row),
                     f"{_number(row.ratio)}{_interval(row.ratio_interval, '.2f')}",
                     *(NONE if one is None else f"{one.divergence:.4f}" for one in shapes),
                     f"{row.agreement:.1%}", f"{row.loss_change:+.4f}", f"{row.prompts}"]
                )  # fmt: skip
    return lines


def peers(found: Sequence[FidelityResults]) -> Lines:
    """Return the divergence of the default and of what it is measured against, in short."""
    lines = [["every layer", "work", "KL per token", "same top token"]]
    for results in found:
        rows = {row.configuration: row for row in summarise(results) if row.shape is None}
        for name in PEERS:
            if name in rows:
                row = rows[name]
                lines.append([NAMES[name], _work(row), _kl(row), f"{row.agreement:.1%}"])
    return lines


def by_length(found: Sequence[FidelityResults]) -> Lines:
    """Return the divergence at other lengths, all shapes together."""
    lines = [["tokens", "model", "crossover", "settings", "work", "KL per token", "prompts"]]
    for results in found:
        for row in summarise(results):
            if row.shape is None:
                config = next(iter(results.header.layer_configs(row.configuration).values()))
                name = NAMES.get(row.configuration, row.configuration)
                lines.append(
                    [tokens(row.length), _model(results), config.crossover, name, _work(row),
                     _kl(row), f"{row.prompts}"]
                )  # fmt: skip
    return lines


def dense_loss(found: Sequence[FidelityResults]) -> Lines:
    """Return the dense model's own loss, which says where it can be read at all."""
    lines = [["tokens", "model", *SHAPES]]
    for results in found:
        dense = [answer for answer in results.answers if answer.configuration == DENSE]
        for length in sorted({answer.length for answer in dense}):
            losses = (
                [fmean(a.loss) for a in dense if (a.length, a.shape) == (length, shape)]
                for shape in SHAPES
            )
            cells = (f"{fmean(one):.3f}" if one else NONE for one in losses)
            lines.append([tokens(length), _model(results), *cells])
    return lines


def choices(found: Sequence[CalibrationResult]) -> Lines:
    """Return what `tsa calibrate` chose, and what it measured of that."""
    lines = [
        ["window", "target", "work", "KL, sum of the layers", "KL, together", "sparse layers"]
    ]
    for result in found:
        for choice in result.choices:
            lines.append(
                [f"{result.base.to_dict()['sliding_window']:,}", f"1/{choice.value:g}",
                 _number(choice.work, ".3f"), _number(choice.summed_divergence, ".4f"),
                 _number(choice.divergence, ".4f"), f"{len(choice.profile.layers)}"]
            )  # fmt: skip
    return lines


def layers(found: Sequence[CalibrationResult]) -> Lines:
    """Return what each layer costs, alone sparse; a column for each window and setting."""
    cells: dict[int, dict[str, str]] = {}
    for result in found:
        window = result.base.to_dict()["sliding_window"]
        for row in result.sensitivity:
            if not row.setting.dense_heads:
                name = f"window {window:,}, {row.setting.value:,}"
                error = "" if row.standard_error is None else f" ±{row.standard_error:.5f}"
                cells.setdefault(row.layer, {})[name] = f"{row.divergence:.5f}{error}"
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    body = [[f"{n}", *(row.get(name, NONE) for name in columns)] for n, row in cells.items()]
    return [["layer", *columns], *body]


def heads(found: Sequence[CalibrationResult]) -> Lines:
    """Return what single heads of the costliest layers cost, costliest first."""
    lines = [["layer", "samples", "heads and their KL, costliest first"]]
    for result in found:
        for layer in dict.fromkeys(head.layer for head in result.heads):
            own = [head for head in result.heads if head.layer == layer]
            cell = ", ".join(f"{head.head}: {head.divergence:.5f}" for head in own)
            lines.append([f"{layer}", f"{own[0].setting.value:,}", cell])
    return lines


def answers(found: Sequence[EvalResults]) -> Lines:
    """Return RULER's scores by length, all tasks together, and how they differ from dense."""
    head = ["tokens", "settings", "work", "score, dense", "difference, 95%", "loss", "prompts"]
    lines = [head]
    for row in answer_rows(pooled(found)) if found else ():
        scored = row.score is not None and row.dense_score is not None
        if row.task is None and row.length and row.configuration != DENSE and scored:
            lines.append(
                [tokens(row.length), NAMES.get(row.configuration, row.configuration),
                 row.shown_work, f"{row.score:.3f}, {row.dense_score:.3f}",
                 f"{row.difference_low:+.3f} to {row.difference_high:+.3f}",
                 _number(row.relative_loss, ".1%"), f"{row.pairs:,}"]
            )  # fmt: skip
    return lines


def _model(results: FidelityResults) -> str:
    return "YaRN" if str(results.header.arguments["model"]).endswith("YaRN") else "as released"


def _work(row: Row) -> str:
    return show_work(row.work, row.work_is_bound)


def _kl(row: Row) -> str:
    return f"{row.divergence:.4f}{_interval(row.divergence_interval, '.4f')}"


def _number(value: float | None, form: str = ".2f") -> str:
    return NONE if value is None else f"{value:{form}}"


def _interval(interval: Interval, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"
