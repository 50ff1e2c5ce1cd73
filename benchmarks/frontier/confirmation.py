"""The last tables of docs/frontier.md: layers' choices, profiles' speeds, the confirmation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.markdown import markdown_table, numbered
from benchmarks.replay.accuracy import FrontierRow, join, target_of
from benchmarks.replay.results import Replay

from token_sparse_attention.calibration.record import (
    CalibrationResult,
    HeadSensitivity,
    Sensitivity,
)
from token_sparse_attention.calibration.sensitivity import choose_from
from token_sparse_attention.calibration.show import of_whole_layers
from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import (
    difference_interval,
    kept_share,
    relative_loss_bound,
    summarise,
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


def calibration(path: Path, drift: Path) -> str:
    """Return each layer's divergence by its number of samples beside its drift.

    Args:
        path: what `tsa calibrate --method sensitivity --samples` measured.
        drift: what ``--method drift`` did.
    """
    result, drifts = CalibrationResult.load(path), CalibrationResult.load(drift)
    drifting = {one.layer: one.drift for one in drifts.drift}
    by_drift = drifts.choices[0].profile.layers
    chosen = result.choices[0].profile.layers
    whole = of_whole_layers(result.sensitivity)
    counts = sorted({int(row.setting.value) for row in whole})
    head = ["layer", *(f"{count:,} samples" for count in counts), "chosen", "drift", "by drift"]
    lines = [head]
    layers: dict[int, dict[int, Sensitivity]] = defaultdict(dict)
    for row in whole:
        layers[row.layer][int(row.setting.value)] = row
    for layer, rows in layers.items():
        cells = [_cost(rows[count].divergence, rows[count].standard_error) for count in counts]
        own = chosen.get(layer)
        listed = [f"{own['fallback_samples']:,}", *dense_heads(own)] if own else ["dense"]
        cells.append(", ".join(listed))
        cells += [f"{drifting[layer]:.1e}", "sparse" if layer in by_drift else "dense"]
        lines.append([str(layer), *cells])
    return markdown_table(lines)


def goals(path: Path, targets: Iterable[float]) -> str:
    """Return what the same measurements choose for other target speed-ups.

    Args:
        path: as for `calibration`.
        targets: how many times less attention work to aim at.
    """
    result = CalibrationResult.load(path)
    counts = sorted({int(row.setting.value) for row in result.sensitivity}, reverse=True)
    layers = sorted({row.layer for row in result.sensitivity})
    head = ["attention work", "dense", *(f"{count:,} samples" for count in counts)]
    head.append("sum of divergences")
    lines = [head]
    for target in targets:
        choice = choose_from(result.sensitivity, result.base, "target_speedup", target)
        chosen = choice.profile.layers
        cells = [f"1/{target:g}", _listed(str(layer) for layer in layers if layer not in chosen)]
        cells += [
            _listed(
                _layer(n, one) for n, one in chosen.items() if one["fallback_samples"] == count
            )
            for count in counts
        ]
        lines.append([*cells, f"{choice.summed_divergence:.1e}"])
    return markdown_table(lines)


def _listed(layers: Iterable[str]) -> str:
    return ", ".join(layers) or "-"


def _layer(number: int, changes: Mapping[str, Any]) -> str:
    return " ".join([str(number), *(f"({heads})" for heads in dense_heads(changes))])


def dense_heads(settings: Mapping[str, Any]) -> list[str]:
    """Say which heads the settings leave dense, as in "heads 0, 5 dense"; nothing if none."""
    heads = settings.get("dense_heads") or ()
    return [f"{numbered('head', heads)} dense"] if heads else []


def single_heads(path: Path, most: int = 3) -> str:
    """Return what the costliest heads of the layers cost that were measured head by head.

    Args:
        path: as for `goals`.
        most: how many heads of a layer to name; the others' costs are added up.
    """
    result = CalibrationResult.load(path)
    layers: dict[int, list[HeadSensitivity]] = defaultdict(list)
    for one in result.heads:
        layers[one.layer].append(one)
    lines = [["layer", "samples", "costliest heads", "all others"]]
    for layer, heads in layers.items():
        heads.sort(key=lambda one: -one.divergence)
        named = [f"{one.head}: {_cost(one.divergence, one.standard_error)}" for one in heads]
        others = fsum(one.divergence for one in heads[most:])
        samples = f"{int(heads[0].setting.value):,}"
        lines.append([str(layer), samples, "; ".join(named[:most]), f"{others:.1e}"])
    return markdown_table(lines)


def _cost(divergence: float, error: float | None) -> str:
    return f"{divergence:.1e}" if error is None else f"{divergence:.1e} ± {error:.0e}"


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
    points = _points(rounds, replays)
    for point in points:
        kept = f"{fmean(pair.kept for pair in point.pairs):.0%}"
        lines.append([f"{point.length // 1024}K", *_cells(point, kept)])
    several = len({point.length for point in points}) > 1
    for name in dict.fromkeys(point.configuration for point in points if several):
        of_name = [point for point in points if point.configuration == name]
        together = _Point(name, 0, [pair for point in of_name for pair in point.pairs], None)
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
        for point in _points(of_seed, []):
            if point.length == length:
                bound = relative_loss_bound(point.scores)
                cell = f"{point.loss:+.1%}, below {bound:+.1%} ({len(point.pairs)})"
                cells[point.configuration][seed] = cell
    shown = {name: found for name, found in cells.items() if len(found) > 1}
    columns = sorted({seed for found in shown.values() for seed in found})
    lines = [["settings", *(f"seed {seed}" for seed in columns)]]
    for name, found in shown.items():
        lines.append([_name(name), *(found.get(seed, "-") for seed in columns)])
    return markdown_table(lines)


class Shown(NamedTuple):
    """A model in `glance`: its results, their replays, the configurations in order."""

    rounds: list[EvalResults]
    replays: list[Replay]
    configurations: Sequence[str]


def glance(models: Mapping[str, Shown], length: int) -> str:
    """Return the README's table: what was confirmed at one length; "-" where nothing was timed.

    Args:
        models: by name.
        length: in tokens.
    """
    head = ["model", "settings", "score, dense", "loss", "loss below", "speed-up", "prompts"]
    lines = [head]
    for model, shown in models.items():
        points = {
            point.configuration: point
            for point in _points(shown.rounds, shown.replays)
            if point.length == length
        }
        for point in (points[name] for name in shown.configurations):
            cells = [
                model,
                _name(point.configuration),
                f"{point.sparse:.3f}, {point.dense:.3f}",
                f"{point.loss:.1%}",
                f"{relative_loss_bound(point.scores):.1%}",
                _speeds(point.times)[0],
                str(len(point.pairs)),
            ]
            lines.append(cells)
    return markdown_table(lines)


class _Pair(NamedTuple):
    """Scores of the same sample, the share it kept, and whether any layer ran sparse."""

    dense: float
    sparse: float
    kept: float
    ran_sparse: bool


class _Point(NamedTuple):
    """A configuration at one length, or at all; `times` of one of its files that was replayed."""

    configuration: str
    length: int
    pairs: list[_Pair]
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


def _points(rounds: list[EvalResults], replays: list[Replay]) -> list[_Point]:
    """Return what was confirmed on the answerable tasks, by length."""
    pairs: dict[tuple[int, str], list[_Pair]] = defaultdict(list)
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
                pair = _Pair(base, sample.score, kept_share(sample), ran_sparse)
                pairs[sample.length, sample.configuration].append(pair)
    order = list(names)
    return [
        _Point(name, length, pairs[length, name], timed.get((length, name)))
        for length, name in sorted(pairs, key=lambda one: (one[0], order.index(one[1])))
    ]


def _cells(point: _Point, kept: str) -> list[str]:
    low, high = difference_interval(point.scores)
    return [
        _name(point.configuration),
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
            cells = [f"{length // 1024}K", _name(configuration)]
            cells += [scores.get(task, "-") for task in tasks]
            lines.append(cells)
    return markdown_table(lines)


def _speeds(row: FrontierRow | None) -> list[str]:
    times = (row.times, row.own_times) if row else (None, None)
    return [f"{one.speed_up:.2f}x" if one else "-" for one in times]


def _name(configuration: str) -> str:
    return NAMES.get(configuration, configuration)


def _labels(rounds: list[EvalResults], describe: Describe) -> dict[str, str]:
    return {
        _name(name): describe(settings or {})
        for results in rounds
        for name, settings in results.header.configurations.items()
        if name != DENSE
    }
