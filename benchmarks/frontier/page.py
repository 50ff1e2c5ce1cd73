"""The pages of the study of accuracy against speed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.frontier import calibrated, confirmation, position_tables, questions, restored
from benchmarks.frontier.version_1 import summarise
from benchmarks.frontier.words import describe
from benchmarks.markdown import Page, markdown_table, mean_cell
from benchmarks.pooling import beside, load_folder, paired_scores, pooled
from benchmarks.replay.accuracy import join, target_of
from benchmarks.replay.results import Replay
from benchmarks.style import figure_file, interval

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import Row, difference_interval

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"
ROUNDS = RESULTS / "frontier"
POSITIONS = RESULTS / "positions"
CONFIRMED = RESULTS / "confirm"
CALIBRATED = RESULTS / "calibration" / "samples-128k.measured.json"
HEADS = CALIBRATED.with_name("heads-128k.measured.json")
DRIFT = CALIBRATED.with_name("drift-16k.measured.json")
SECOND = RESULTS / "qwen3"
AGAIN = SECOND / "samples"
"""The second architecture, trained once more: how many samples it needs."""
SPEED_ROUNDS = ("profiles", "mended")
TASKS = {
    "niah_multikey_2": "multikey 2",
    "niah_multikey_3": "multikey 3",
    "ruler_vt": "variable tracking",
}
EXAMINED = {task: TASKS[task] for task in ("niah_multikey_3", "ruler_vt")}


def pages() -> list[Page]:
    """Return the study and its screening rounds."""
    rounds = load_folder(ROUNDS)
    asked = pooled(list(load_folder(RESULTS / "questions").values()))
    counting = confirmation.answerable(asked)
    study = {
        "questions": questions.table(counting, describe),
        "questions-compared": questions.compared(counting),
        "defaults-in-replies": questions.defaults(counting),
        **_layer_tables(rounds),
        **_calibration_tables(),
        **_speed_tables(rounds),
        **_confirmed_tables(),
        **_second_tables(),
        "runs": _runs_of(asked),
    }
    figures = {
        "questions": lambda path: questions.draw(counting, path),
        "speed": lambda path: draw_speeds(rounds, path),
    }
    screened = {
        "64k": _screening(_scored_by(rounds, answers=False), 65536),
        "128k": _screening(_scored_by(rounds, answers=False), 131072),
        "answers": _screening(_scored_by(rounds, answers=True), 131072),
        "questions-tasks": confirmation.by_task(asked),
        "rounds": _runs(rounds),
    }
    screening = {"screening": lambda path: draw_screening(rounds, path)}
    return [
        Page(FOLDER / "study.md", study, figures),
        Page(FOLDER / "rounds.md", screened, screening),
    ]


def _layer_tables(rounds: Mapping[str, EvalResults]) -> dict[str, str]:
    heads = json.loads((ROUNDS / "heads.json").read_text(encoding="utf-8"))
    examined = position_tables.load_rows(POSITIONS / "places")
    single = position_tables.load_rows(POSITIONS / "heads")
    return {
        "layers": _layers(_scored_by(rounds, answers=True), heads),
        "places": position_tables.by_place(examined, TASKS),
        "same-token": position_tables.by_layer(examined, EXAMINED),
        "heads-multikey-3": position_tables.by_head(examined, "niah_multikey_3", "6"),
        "heads-tracking": position_tables.by_head(single, "ruler_vt", "0"),
    }


def _calibration_tables() -> dict[str, str]:
    return {
        "calibration": calibrated.calibration(CALIBRATED, DRIFT),
        "goals": calibrated.goals(CALIBRATED, (3.5, 4, 4.5, 5, 6)),
        "calibrated-heads": calibrated.single_heads(HEADS),
        "goals-heads": calibrated.goals(HEADS, (5, 6, 8, 10, 12, 14, 16)),
    }


def _speed_tables(rounds: Mapping[str, EvalResults]) -> dict[str, str]:
    return {
        name: confirmation.speeds(rounds[f"answers-{which}"], _replay(which), describe)
        for name, which in zip(("speeds", "speeds-mended"), SPEED_ROUNDS)
    }


def _replay(which: str) -> Replay:
    return Replay.load(ROUNDS / f"replay-{which}.json")


def _confirmed_tables() -> dict[str, str]:
    confirmed = list(load_folder(CONFIRMED).values())
    replays = [Replay.load(CONFIRMED / "replay-128k.json")]
    return {
        "confirmed": confirmation.confirmed(confirmed, replays, describe),
        "confirmed-seeds": confirmation.by_seed(confirmed, 131072),
        "aim": confirmation.aim(confirmed, replays, ("H3", "calibrated-12"), 131072, 23),
    }


def _second_tables() -> dict[str, str]:
    second, again = list(load_folder(SECOND).values()), load_folder(AGAIN)
    measured = SECOND / "heads-128k.measured.json"
    looked = position_tables.load_rows(SECOND / "positions")
    of_layer = [f"layer 10 head {head}" for head in range(8)]
    answered = [again["answers"], again["answers-same-token"]]
    replayed = [Replay.load(SECOND / "replay-128k.json")]
    return {
        "second": confirmation.confirmed(second, replayed, describe),
        "second-tasks": confirmation.by_task(beside(second)),
        "second-layers": calibrated.calibration(measured, SECOND / "drift-128k.measured.json"),
        "second-heads": calibrated.single_heads(measured),
        "second-goals": calibrated.goals(measured, (4.75, 8, 12)),
        "again-numbers": restored.table(again["numbers"], DENSE),
        "again-layers": restored.table(again["layers"], "all"),
        "again-heads": restored.table(again["heads"], "all", of_layer),
        "again-same-token": restored.table(again["same-token"], "all"),
        "again-answers": confirmation.confirmed(answered, [], describe),
        "again-looks": position_tables.by_head(looked, "niah_multikey_3", "10"),
    }


def _runs_of(asked: EvalResults) -> str:
    runs = {"questions": asked}
    for what, folder in (
        ("confirmed", CONFIRMED),
        ("second architecture", SECOND),
        ("second architecture again", AGAIN),
    ):
        runs |= {f"{what}, {name}": one for name, one in load_folder(folder).items()}
    return _runs(runs)


def _scored_by(rounds: Mapping[str, EvalResults], *, answers: bool) -> dict[str, EvalResults]:
    """The rounds whose scores are probabilities of the right answer, or those of replies."""
    return {
        name: one
        for name, one in rounds.items()
        if bool(one.header.arguments.get("answers")) == answers
    }


def _runs(rounds: Mapping[str, EvalResults]) -> str:
    lines = [["round", "device", "commit", "versions", "seed"]]
    for name, results in rounds.items():
        about = results.header.provenance
        wanted = ("torch", "transformers", "triton", "flash-attn-4", "lm-eval")
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if k in wanted)
        seed = str(results.header.arguments["seed"])
        lines.append([name, about["device"], f"`{about['commit'][:12]}`", versions, seed])
    return markdown_table(lines)


def _screening(rounds: Mapping[str, EvalResults], length: int) -> str:
    head = ["round", "what differs", *TASKS.values(), "difference", "95% interval", "n", "kept"]
    lines = [head]
    for name, label, rows, pairs in _points(rounds, length):
        low, high = difference_interval(pairs)
        cells = [
            f"{rows[task].score:.2f} of {rows[task].dense_score:.2f} ({rows[task].pairs})"
            if task in rows
            else "-"
            for task in TASKS
        ]
        difference = fmean(sparse - dense for dense, sparse in pairs)
        share = fmean(row.kept_share for row in rows.values())
        cells += [f"{difference:+.2f}", f"{low:+.2f} to {high:+.2f}", str(len(pairs))]
        lines.append([name, label, *cells, f"{share:.0%}"])
    return markdown_table(lines)


def _points(
    rounds: Mapping[str, EvalResults], length: int
) -> Iterator[tuple[str, str, dict[str, Row], list[tuple[float, float]]]]:
    """Yield round, label, rows by task and pairs of scores (dense, sparse) of each point."""
    for name, results in rounds.items():
        summary = summarise(results)
        for configuration, settings in results.header.configurations.items():
            if configuration == DENSE or _single_layer(settings or {}) is not None:
                continue
            rows = {
                row.task: row
                for row in summary
                if row.configuration == configuration and row.length == length and row.task
            }
            pairs = paired_scores(results, length, DENSE, configuration)
            if pairs:
                variants = results.header.arguments.get("variants", {})
                label = describe(settings or {}, variants.get(configuration))
                yield name, label, {task: rows[task] for task in TASKS if task in rows}, pairs


def _single_layer(settings: Mapping[str, Any]) -> int | None:
    """The layer, where only one is sparse."""
    layers = settings.get("sparse_layers") or []
    return layers[0] if len(layers) == 1 else None


def _layers(rounds: Mapping[str, EvalResults], heads: Mapping[str, Any]) -> str:
    """What each layer costs when it alone is sparse, and what its heads do densely."""
    costs: dict[str, dict[int, list[float]]] = {}
    for results in rounds.values():
        loss = {s.key: float(s.reply) for s in results.samples}
        for name, settings in results.header.configurations.items():
            layer = _single_layer(settings or {})
            if layer is None:
                continue
            for sample in results.samples:
                dense = loss.get((*sample.key[:3], DENSE))
                if sample.configuration == name and dense is not None:
                    of_task = costs.setdefault(sample.task, {})
                    of_task.setdefault(layer, []).append(loss[sample.key] - dense)
    tasks = [task for task in TASKS if task in costs]
    observed = {row["task"]: row["layers"] for row in heads["rows"]}
    head = ["layer"]
    for task in tasks:
        head += [f"{TASKS[task]}, nats", "far", "among", "error"]
    lines = [head]
    for layer in sorted(costs[tasks[0]]):
        cells = [str(layer)]
        for task in tasks:
            more, found = costs[task][layer], observed[task][layer]
            looking = [n for n, far in zip(found["among"], found["far"]) if far >= 0.5]
            cells += [
                mean_cell(more),
                f"{max(found['far']):.2f}",
                f"{min(looking):.0f}" if looking else "-",
                f"{max(found['error']):.2f}",
            ]
        lines.append(cells)
    return markdown_table(lines)


def draw_screening(rounds: Mapping[str, EvalResults], path: Path) -> None:
    """Draw each point's difference with its interval, one panel per length."""
    replies = _scored_by(rounds, answers=False)
    with figure_file(path, 1, 2, size=(13, 9), sharex=True) as panels:
        for axes, length in zip(panels, (65536, 131072)):
            points = list(_points(replies, length))
            for at, (_, _, _, pairs) in enumerate(points):
                middle = fmean(sparse - dense for dense, sparse in pairs)
                axes.plot(difference_interval(pairs), [at, at], color="tab:gray")
                axes.plot(middle, at, "o", color="tab:blue")
            axes.set_yticks(range(len(points)), [label for _, label, _, _ in points], fontsize=6)
            axes.invert_yaxis()
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel("score minus dense score of the same samples, 95% interval")
            axes.set_title(f"{length // 1024}K tokens")


def draw_speeds(rounds: Mapping[str, EvalResults], path: Path) -> None:
    """Draw profiles' probability of the right answer over their speed, one panel per round."""
    with figure_file(path, 1, len(SPEED_ROUNDS), size=(11, 4.5), sharey=True) as panels:
        for axes, which in zip(panels, SPEED_ROUNDS):
            replay = _replay(which)
            for row in join([("", rounds[f"answers-{which}"])], [replay]):
                one = row.accuracy
                if one.configuration == DENSE or row.times is None or one.difference is None:
                    continue
                ends = (one.difference_low, one.difference, one.difference_high)
                interval(axes, row.times.speed_up, *ends, color="tab:blue")
                at = (row.times.speed_up, one.difference)
                axes.annotate(
                    one.configuration, at, (4, 4), textcoords="offset points", fontsize=7
                )
            axes.axhline(0, color="black", linewidth=0.8)
            axes.axvline(4, color="black", linewidth=0.8, linestyle=":")
            axes.set_title(target_of([replay]), fontsize=8)
            axes.set_xlabel("speed-up of all layers' attention at 128K tokens")
        panels[0].set_ylabel("probability of the right answer,\nminus dense, 95% interval")
