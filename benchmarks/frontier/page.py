"""Write the tables and the figures of the study's pages and the README from the result files.

python -m benchmarks.frontier.page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.frontier import confirmation, position_tables, questions, restored
from benchmarks.markdown import fill, markdown_table, mean_cell
from benchmarks.pooling import beside, load_folder, paired_scores, pooled
from benchmarks.replay.accuracy import join, target_of
from benchmarks.replay.results import Replay
from benchmarks.style import figure_file

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import Row, difference_interval, summarise

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "frontier.md"
ROUNDS = PAGE.with_name("frontier-rounds.md")
"""What was screened before every question was asked on the same prompts."""
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "frontier"
QUESTIONS = RESULTS.parent / "questions"
POSITIONS = RESULTS.parent / "positions"
CONFIRMED = RESULTS.parent / "confirm"
CALIBRATED = RESULTS.parent / "calibration" / "samples-128k.measured.json"
HEADS = CALIBRATED.with_name("heads-128k.measured.json")
DRIFT = CALIBRATED.with_name("drift-16k.measured.json")
SECOND = RESULTS.parent / "qwen3"
AGAIN = SECOND / "samples"
"""The second architecture, trained once more: how many samples it needs."""
FIGURE = ROOT / "docs" / "figures" / "frontier-screening.svg"
QUESTIONS_FIGURE = FIGURE.with_name("frontier-questions.svg")
SPEED_FIGURE = FIGURE.with_name("frontier-speed.svg")
SPEED_ROUNDS = ("profiles", "mended")
TASKS = {
    "niah_multikey_2": "multikey 2",
    "niah_multikey_3": "multikey 3",
    "ruler_vt": "variable tracking",
}
EXAMINED = {task: TASKS[task] for task in ("niah_multikey_3", "ruler_vt")}


def load_all() -> dict[str, EvalResults]:
    """Return all rounds' results by their file's name."""
    return load_folder(RESULTS)


def load_questions() -> EvalResults:
    """Return the answers to every question, from the runs that shared the samples."""
    return pooled(list(load_folder(QUESTIONS).values()))


def tables(rounds: Mapping[str, EvalResults]) -> dict[str, str]:
    """Return the pages' tables as Markdown, by name."""
    asked = load_questions()
    counting = confirmation.answerable(asked)
    built = {"questions": questions.table(counting, describe)}
    built["questions-compared"] = questions.compared(counting)
    built["questions-tasks"] = confirmation.by_task(asked)
    for length in (65536, 131072):
        built[f"{length // 1024}k"] = _screening(_scored_by(rounds, answers=False), length)
    answers = _scored_by(rounds, answers=True)
    built["answers"] = _screening(answers, 131072)
    heads = json.loads((RESULTS / "heads.json").read_text(encoding="utf-8"))
    built["layers"] = _layers(answers, heads)
    examined = position_tables.load_rows(POSITIONS / "places")
    single = position_tables.load_rows(POSITIONS / "heads")
    built["places"] = position_tables.by_place(examined, TASKS)
    built["same-token"] = position_tables.by_layer(examined, EXAMINED)
    built["heads-multikey-3"] = position_tables.by_head(examined, "niah_multikey_3", "6")
    built["heads-tracking"] = position_tables.by_head(single, "ruler_vt", "0")
    built["calibration"] = confirmation.calibration(CALIBRATED, DRIFT)
    built["goals"] = confirmation.goals(CALIBRATED, (3.5, 4, 4.5, 5, 6))
    built["calibrated-heads"] = confirmation.single_heads(HEADS)
    built["goals-heads"] = confirmation.goals(HEADS, (5, 6, 8, 10, 12, 14, 16))
    for name, which in zip(("speeds", "speeds-mended"), SPEED_ROUNDS):
        replay = Replay.load(RESULTS / f"replay-{which}.json")
        built[name] = confirmation.speeds(rounds[f"answers-{which}"], replay, _label)
    confirmed, second = load_folder(CONFIRMED), load_folder(SECOND)
    first_rounds, second_rounds = list(confirmed.values()), list(second.values())
    replays = [Replay.load(CONFIRMED / "replay-128k.json")]
    replayed = [Replay.load(SECOND / "replay-128k.json")]
    built["confirmed"] = confirmation.confirmed(first_rounds, replays, _label)
    built["confirmed-seeds"] = confirmation.by_seed(first_rounds, 131072)
    built["second"] = confirmation.confirmed(second_rounds, replayed, _label)
    shown = confirmation.Shown
    models = {
        "bundled, 11.8M": shown(first_rounds, replays, ("published", "F", "H3", "calibrated-12")),
        "Qwen3, 23.6M": shown(
            second_rounds, replayed, ("published", "calibrated-8", "calibrated-12")
        ),
    }
    built["glance"] = confirmation.glance(models, 131072)
    built["second-tasks"] = confirmation.by_task(beside(second_rounds))
    measured = SECOND / "heads-128k.measured.json"
    drift = SECOND / "drift-128k.measured.json"
    built["second-layers"] = confirmation.calibration(measured, drift)
    built["second-heads"] = confirmation.single_heads(measured)
    built["second-goals"] = confirmation.goals(measured, (4.75, 8, 12))
    again = load_folder(AGAIN)
    built["again-numbers"] = restored.table(again["numbers"], DENSE)
    built["again-layers"] = restored.table(again["layers"], "all")
    of_layer = [f"layer 10 head {head}" for head in range(8)]
    built["again-heads"] = restored.table(again["heads"], "all", of_layer)
    built["again-same-token"] = restored.table(again["same-token"], "all")
    answered = [again["answers"], again["answers-same-token"]]
    built["again-answers"] = confirmation.confirmed(answered, [], _label)
    looked = position_tables.load_rows(SECOND / "positions")
    built["again-looks"] = position_tables.by_head(looked, "niah_multikey_3", "10")
    runs = {"questions": asked, **{f"confirmed, {name}": r for name, r in confirmed.items()}}
    runs |= {f"second architecture, {name}": r for name, r in second.items()}
    runs |= {f"second architecture again, {name}": r for name, r in again.items()}
    built["runs"] = _runs(runs)
    built["rounds"] = _runs(rounds)
    return built


def _label(settings: Mapping[str, Any]) -> str:
    return describe(settings, {})


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
                label = describe(settings or {}, variants.get(configuration, {}))
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
            for sample in results.samples if layer is not None else ():
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


def describe(settings: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """Say in words what a point runs."""
    if "layers" in settings:
        return _describe_profile(settings)
    layers = settings["sparse_layers"]
    named = "all layers" if layers is None else _name_layers(layers)
    return ", ".join([named, *_differences(settings, variant)])


def _differences(settings: Mapping[str, Any], variant: Mapping[str, Any]) -> list[str]:
    parts = []
    if settings.get("select_queries", True):
        parts.append(f"drop mass {settings['drop_mass']:g}")
    if settings["fallback"] == "zero":
        parts.append("zeros")
    elif settings["fallback_window"] != 512:
        parts.append(f"window {settings['fallback_window']}")
    if settings["budget"] == "per_head":
        parts.append("budget per head")
    if settings["window_size"] != 128:
        parts.append(f"scored by {settings['window_size']} queries")
    words = {
        "pool_size": "scores of {} neighbours pooled",
        "fallback_sinks": "{} sinks",
        "fallback_landmarks": "{} landmarks",
        "fallback_samples": "{} tokens drawn by score",
        "landmarks": "{} landmarks",
        "spread": "{} of the scoring queries spread",
        "neighbours": "{} neighbours on each side selected too",
        "landmarks_by": "chosen by {} spread queries",
        "own_landmarks": "{} of them by the last queries",
        "samples": "{} samples",
        "drawn": "{} tokens drawn by score",
        "dense_last": "last {} queries dense",
        "dense_queries": "last {} queries dense",
        "pooled": "means of blocks of {}",
    }
    for field, text in words.items():
        value = settings.get(field) or variant.get(field)
        if value and (field, value) != ("pool_size", 7):
            parts.append(text.format(value))
    parts += confirmation.dense_heads(settings)
    if variant.get("pooled") and variant["pooled_for"] != "both":
        parts.append(f"for {variant['pooled_for']} queries only")
    if variant.get("segments", 1) > 1:
        parts.append(f"in each of {variant['segments']} segments")
    if variant.get("value_norm"):
        parts.append("scores times the values' norms")
    if variant.get("union"):
        parts.append("selected queries see their window too")
    if settings.get("select_queries") is False:
        parts.append("no queries dropped")
    elif variant.get("selected") == "others":
        parts.append("selected queries like the others")
    if variant.get("selected") == "dense":
        parts.append("selected queries dense")
    if variant.get("fallback") == "dense":
        parts.append("unselected queries dense")
    if variant.get("fallback") == "keys":
        parts.append("all queries see the window and the selected keys")
    return parts


def _describe_profile(profile: Mapping[str, Any]) -> str:
    """Say what each layer runs, then what all of them do; layers not named are dense."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, changes in profile["layers"].items():
        parts = tuple(_differences({**profile["base"], **changes}, {}))
        groups.setdefault(parts, []).append(int(layer))
    shared = [part for part in next(iter(groups)) if all(part in parts for parts in groups)]
    each = []
    for parts, layers in groups.items():
        own = ", ".join(part for part in parts if part not in shared)
        each.append(f"{_name_layers(layers)}: {own}" if own else _name_layers(layers))
    return "; ".join([*each, f"each {', '.join(shared)}"] if shared else each)


def _name_layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    missing = sorted(set(range(layers[0], layers[-1])) - set(layers))
    without = f" without {', '.join(map(str, missing))}" if missing else ""
    span, listed = f"{layers[0]} to {layers[-1]}{without}", ", ".join(map(str, layers))
    return f"layers {listed if missing and len(listed) < len(span) else span}"


def draw(rounds: Mapping[str, EvalResults]) -> None:
    """Draw each point's difference with its interval, one panel per length."""
    with figure_file(FIGURE) as plt:
        _, panels = plt.subplots(1, 2, figsize=(13, 9), sharex=True)
        replies = _scored_by(rounds, answers=False)
        for axes, length in zip(panels, (65536, 131072)):
            points = list(_points(replies, length))
            for at, (_, _, _, pairs) in enumerate(points):
                low, high = difference_interval(pairs)
                middle = fmean(sparse - dense for dense, sparse in pairs)
                axes.plot([low, high], [at, at], color="tab:gray")
                axes.plot(middle, at, "o", color="tab:blue")
            axes.set_yticks(range(len(points)), [label for _, label, _, _ in points], fontsize=6)
            axes.invert_yaxis()
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel("score minus dense score of the same samples, 95% interval")
            axes.set_title(f"{length // 1024}K tokens")


def draw_speeds(rounds: Mapping[str, EvalResults]) -> None:
    """Draw profiles' probability of the right answer over their speed, one panel per round."""
    with figure_file(SPEED_FIGURE) as plt:
        _, panels = plt.subplots(1, len(SPEED_ROUNDS), figsize=(11, 4.5), sharey=True)
        for axes, which in zip(panels, SPEED_ROUNDS):
            replay = Replay.load(RESULTS / f"replay-{which}.json")
            for row in join([("", rounds[f"answers-{which}"])], [replay]):
                one = row.accuracy
                if one.configuration == DENSE or row.times is None or one.difference is None:
                    continue
                speed = row.times.speed_up
                axes.plot([speed] * 2, [one.difference_low, one.difference_high], color="tab:gray")
                axes.plot(speed, one.difference, "o", color="tab:blue")
                axes.annotate(
                    one.configuration, (speed, one.difference), (4, 4), textcoords="offset points",
                    fontsize=7,
                )  # fmt: skip
            axes.axhline(0, color="black", linewidth=0.8)
            axes.axvline(4, color="black", linewidth=0.8, linestyle=":")
            axes.set_title(target_of([replay]), fontsize=8)
            axes.set_xlabel("speed-up of all layers' attention at 128K tokens")
        panels[0].set_ylabel("probability of the right answer,\nminus dense, 95% interval")


def main() -> None:
    """Write the pages and the figures."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rounds = load_all()
    built = tables(rounds)
    for page in (PAGE, ROUNDS, README):
        page.write_text(fill(page.read_text(encoding="utf-8"), built), encoding="utf-8")
    questions.draw(confirmation.answerable(load_questions()), QUESTIONS_FIGURE)
    draw(rounds)
    draw_speeds(rounds)


if __name__ == "__main__":
    main()
