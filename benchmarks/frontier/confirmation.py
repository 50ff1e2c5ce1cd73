"""The last tables of docs/frontier.md: layers' choices, profiles' speeds, the confirmation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.frontier.version_1 import summarise
from benchmarks.markdown import markdown_table
from benchmarks.replay.accuracy import FrontierRow, join, target_of
from benchmarks.replay.results import Replay

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import (
    difference_interval,
    kept_share,
    relative_loss_bound,
)

NAMES = {
    "A2": "three dense layers",
    "F": "two dense layers",
    "G": "two dense layers, else the defaults",
    "H1": "a dense layer, a dense head",
    "H2": "two dense heads, more samples in layer 3",
    "H3": "two dense heads",
    "K": "two dense heads, else the defaults",
    "default": "the defaults in all layers",
    "dense-1-10": "layers 1 and 10 dense",
    "same-token": "four heads dense",
    "samples-16384": "16,384 samples in all layers",
    "published-drift": "published, drift's layers",
    "calibrated-4.75": "calibrated for 1/4.75",
    "calibrated-8": "calibrated for 1/8",
    "calibrated-12": "calibrated for 1/12",
}
"""What the page calls the profiles that were confirmed."""
_ANSWERED = 0.5
Describe = Callable[[Mapping[str, Any]], str]


def speeds(results: EvalResults, replay: Replay, describe: Describe) -> str:
    """Return profiles' probability of the right answer beside their replayed speed."""
    head = ["point", "what differs", "probability", "n", "speed-up", "at the model's own shape"]
    lines = [head]
    for row in join([("", results)], [replay]):
        one = row.accuracy
        if one.configuration != DENSE:
            label = describe(results.header.configurations[one.configuration] or {})
            score = f"{one.score:.3f} of {one.dense_score:.3f}"
            cells = [one.configuration, label, score, str(one.pairs), *_speeds(row)]
            lines.append(cells)
    return markdown_table(lines) + f"\nSpeed-up at {target_of([replay])}.\n"


def confirmed(rounds: list[EvalResults], replays: list[Replay], describe: Describe) -> str:
    """Return the confirmation's table: every length, then all of them together if several.

    Scores are of the `answerable` tasks; the counts that were replayed are of all.
    """
    head = ["tokens", "settings", "score", "loss", "loss below", "speed-up", "own shape"]
    head += ["n", "kept", "difference", "95% interval"]
    lines = [head]
    found = points(rounds, replays)
    for point in found:
        kept = f"{fmean(pair.kept for pair in point.pairs):.0%}"
        lines.append([f"{point.length // 1024}K", *_cells(point, kept)])
    several = len({point.length for point in found}) > 1
    for name in dict.fromkeys(point.configuration for point in found if several):
        of_name = [point for point in found if point.configuration == name]
        together = Point(name, 0, [pair for point in of_name for pair in point.pairs], None)
        ran = f"sparse in {fmean(pair.ran_sparse for pair in together.pairs):.0%} of samples"
        lines.append(["all", *_cells(together, ran)])
    legend = [f"- {name}: {label}" for name, label in _labels(rounds, describe).items()]
    return markdown_table(lines) + "\n".join(["", *legend]) + "\n"


def by_seed(rounds: list[EvalResults], length: int) -> str:
    """Return the losses at one length sample by sample, of what was run on several.

    Args:
        rounds: results; those of one seed are of the same sample.
        length: in tokens.
    """
    seeds: dict[int, list[EvalResults]] = defaultdict(list)
    for results in rounds:
        seeds[results.header.arguments["seed"]].append(results)
    cells: dict[str, dict[int, str]] = defaultdict(dict)
    for seed, of_seed in seeds.items():
        for point in points(of_seed, []):
            if point.length == length:
                cells[point.configuration][seed] = _loss(point.scores)
    shown = {name: found for name, found in cells.items() if len(found) > 1}
    columns = sorted({seed for found in shown.values() for seed in found})
    lines = [["settings", *(f"seed {seed}" for seed in columns)]]
    for name, found in shown.items():
        lines.append([name_of(name), *(found.get(seed, "-") for seed in columns)])
    return markdown_table(lines)


def aim(
    rounds: list[EvalResults],
    replays: list[Replay],
    configurations: Sequence[str],
    length: int,
    first_seed: int,
) -> str:
    """Return what profiles gain and lose at one length, and what all lengths together would say.

    Args:
        rounds: results of several lengths and seeds.
        replays: of those of one seed.
        configurations: which profiles.
        length: in tokens.
        first_seed: of the sample whose scores were known before the others were made.
    """
    later = [one for one in rounds if one.header.arguments["seed"] != first_seed]
    shown = f"{length // 1024}K"
    head = ["settings", f"speed-up, {shown}", f"loss, {shown}", f"loss, {shown}, later seeds"]
    lines = [[*head, "loss, all lengths together"]]
    everything = points(rounds, replays)
    for name in configurations:
        of_name = [point for point in everything if point.configuration == name]
        (at,) = (point for point in of_name if point.length == length)
        (after,) = (
            point
            for point in points(later, [])
            if (point.configuration, point.length) == (name, length)
        )
        pairs = [pair for point in of_name for pair in point.pairs]
        losses = [_loss(at.scores), _loss(after.scores), _loss([pair[:2] for pair in pairs])]
        lines.append([name_of(name), _speeds(at.times)[0], *losses])
    return markdown_table(lines)


def _loss(scores: list[tuple[float, float]]) -> str:
    """The relative loss, its bound, and the number of prompts."""
    loss = 1 - fmean(sparse for _, sparse in scores) / fmean(dense for dense, _ in scores)
    return f"{loss:+.1%}, below {relative_loss_bound(scores):+.1%} ({len(scores):,})"


class Shown(NamedTuple):
    """A model in `glance`: its results, their replays, the configurations in order."""

    rounds: list[EvalResults]
    replays: list[Replay]
    configurations: Sequence[str]

    def at(self, length: int) -> list[Point]:
        """Return what was confirmed at one length."""
        found = {
            point.configuration: point
            for point in points(self.rounds, self.replays)
            if point.length == length
        }
        return [found[name] for name in self.configurations]


def glance(models: Mapping[str, Shown], length: int) -> str:
    """Return what was confirmed at one length; "-" where nothing was timed.

    Args:
        models: by name.
        length: in tokens.
    """
    head = ["model", "settings", "score, dense", "loss", "loss below"]
    head += ["speed-up", "own shape", "prompts"]
    lines = [head]
    for model, shown in models.items():
        for point in shown.at(length):
            cells = [
                model,
                name_of(point.configuration),
                f"{point.sparse:.3f}, {point.dense:.3f}",
                f"{point.loss:.1%}",
                f"{relative_loss_bound(point.scores):.1%}",
                *_speeds(point.times),
                f"{len(point.pairs):,}",
            ]
            lines.append(cells)
    return markdown_table(lines)


class Pair(NamedTuple):
    """Scores of the same sample, the share it kept, and whether any layer ran sparse."""

    dense: float
    sparse: float
    kept: float
    ran_sparse: bool


class Point(NamedTuple):
    """A configuration at one length, or at all; `times` of one of its files that was replayed."""

    configuration: str
    length: int
    pairs: list[Pair]
    times: FrontierRow | None

    @property
    def scores(self) -> list[tuple[float, float]]:
        """Dense and sparse, of each sample."""
        return [pair[:2] for pair in self.pairs]

    @property
    def dense(self) -> float:
        """Mean dense score."""
        return fmean(pair.dense for pair in self.pairs)

    @property
    def sparse(self) -> float:
        """Mean sparse score."""
        return fmean(pair.sparse for pair in self.pairs)

    @property
    def loss(self) -> float:
        """Relative to the dense score."""
        return 1 - self.sparse / self.dense


def points(rounds: list[EvalResults], replays: list[Replay]) -> list[Point]:
    """Return what was confirmed on the answerable tasks, by length."""
    pairs: dict[tuple[int, str], list[Pair]] = defaultdict(list)
    timed: dict[tuple[int | None, str], FrontierRow] = {}
    names: dict[str, None] = {}
    for results in rounds:
        names |= dict.fromkeys(results.header.configurations)
        for row in join([("", results)], replays):
            if row.times:
                timed.setdefault((row.accuracy.length, row.accuracy.configuration), row)
        samples = answerable(results).samples
        dense = {s.key[:3]: s.score for s in samples if s.configuration == DENSE}
        for sample in samples:
            base = dense.get(sample.key[:3])
            if sample.configuration != DENSE and base is not None and sample.score is not None:
                ran_sparse = any(kept is not None for kept in sample.kept or [])
                pair = Pair(base, sample.score, kept_share(sample), ran_sparse)
                pairs[sample.length, sample.configuration].append(pair)
    order = list(names)
    return [
        Point(name, length, pairs[length, name], timed.get((length, name)))
        for length, name in sorted(pairs, key=lambda one: (one[0], order.index(one[1])))
    ]


def _cells(point: Point, kept: str) -> list[str]:
    low, high = difference_interval(point.scores)
    return [
        name_of(point.configuration),
        f"{point.sparse:.3f} of {point.dense:.3f}",
        f"{point.loss:+.1%}",
        f"{relative_loss_bound(point.scores):+.1%}",
        *_speeds(point.times),
        str(len(point.pairs)),
        kept,
        f"{point.sparse - point.dense:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
    ]


def answerable(results: EvalResults) -> EvalResults:
    """Return the results of the tasks that the dense model answers, at each length.

    A task counts where its mean dense score is at least `_ANSWERED`.
    """
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for one in results.samples:
        if one.configuration == DENSE and one.score is not None:
            scores[one.task, one.length].append(one.score)
    counting = {where for where, of in scores.items() if fmean(of) >= _ANSWERED}
    samples = tuple(one for one in results.samples if (one.task, one.length) in counting)
    return replace(results, samples=samples)


def by_task(results: EvalResults) -> str:
    """Return each configuration's score on every task and length."""
    rows = [row for row in summarise(results) if row.task and row.length and row.pairs]
    tasks = list(dict.fromkeys(row.task for row in rows if row.task))
    lines = [["tokens", "settings", *tasks]]
    for length in sorted({row.length for row in rows if row.length}):
        for configuration in results.header.configurations:
            scores = {
                row.task: f"{row.score:.2f} ({row.pairs})"
                for row in rows
                if row.length == length and row.configuration == configuration
            }
            cells = [f"{length // 1024}K", name_of(configuration)]
            cells += [scores.get(task, "-") for task in tasks]
            lines.append(cells)
    return markdown_table(lines)


def _speeds(row: FrontierRow | None) -> list[str]:
    times = (row.times, row.own_times) if row else (None, None)
    return [f"{one.speed_up:.2f}x" if one else "-" for one in times]


def name_of(configuration: str) -> str:
    """Return what the pages call a configuration."""
    return NAMES.get(configuration, configuration)


def _labels(rounds: list[EvalResults], describe: Describe) -> dict[str, str]:
    return {
        name_of(name): describe(settings or {})
        for results in rounds
        for name, settings in results.header.configurations.items()
        if name != DENSE
    }
