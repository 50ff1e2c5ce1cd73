"""From recorded token counts to speed: replays the results of ``tsa eval``, and their file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from benchmarks.replay.layers import (
    LayerRun,
    Replayer,
    ReplayOptions,
    ReplayPoint,
    Shape,
)

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import (
    PATTERN,
    EvalResults,
    SampleResult,
)
from token_sparse_attention.evaluation.summary import chosen_samples, layer_shares
from token_sparse_attention.records import JsonFile, check_choice

SUITE = "replay"


class Part(NamedTuple):
    """Some of a layer's runs: their share, and which of the points was measured for them."""

    share: float
    point: int


@dataclass(frozen=True)
class ReplayRow:
    """One configuration at one length and shape.

    Attributes:
        configuration: name of the configuration.
        length: what the samples were built for.
        digest: of the counts that were replayed, of `counts_digest`.
        samples: how many samples they are from.
        own_shape: whether this is the shape of the model that was evaluated.
        reused: how many parts of layers took the measurement of others nearly the same.
        layers: for every layer its parts, whose shares add up to 1.
    """

    configuration: str
    length: int
    digest: str
    samples: int
    own_shape: bool
    reused: int
    layers: tuple[tuple[Part, ...], ...]


class Times(NamedTuple):
    """Attention of all layers together, in milliseconds: dense and as configured."""

    dense_ms: float
    sparse_ms: float

    @property
    def speed_up(self) -> float:
        """How many times as fast as dense attention."""
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True)
class Replay(JsonFile):
    """What one run replayed, and where.

    Attributes:
        provenance: device, versions and commit when the measurement began.
        arguments: what the command was asked for.
        points: the measurements.
        rows: which measurements make up which configuration.
        suite: ``"replay"``.
    """

    ROWS: ClassVar = ("points", "rows")
    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    points: tuple[ReplayPoint, ...] = field(repr=False)
    rows: tuple[ReplayRow, ...]
    suite: str = SUITE

    def __post_init__(self) -> None:
        check_choice("suite", self.suite, (SUITE,))
        for number, row in enumerate(self.rows):
            if not row.layers:
                raise ValueError(f"rows[{number}].layers must not be empty")
            for layer in row.layers:
                if not _is_layer(layer, len(self.points)):
                    raise ValueError(
                        f"rows[{number}].layers must hold pairs of a share and the number of a "
                        f"point, below {len(self.points)}; got {layer!r}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the version and the fields, points and rows last."""
        content = super().to_dict()
        return {"version": content.pop("version"), "suite": content.pop("suite"), **content}

    @property
    def failures(self) -> list[ReplayPoint]:
        """The measurements whose check failed, or that could not be made."""
        return [point for point in self.points if not point.passed]

    def row_points(self, row: ReplayRow) -> list[ReplayPoint]:
        """Return the measurements that a row rests on."""
        return [self.points[part.point] for layer in row.layers for part in layer]

    def times(self, row: ReplayRow) -> Times | None:
        """Return a row's times; None if a measurement is missing or its check failed."""
        dense_ms = sparse_ms = 0.0
        for layer in row.layers:
            for share, number in layer:
                point = self.points[number]
                if not point.passed or point.dense_ms is None or point.median_ms is None:
                    return None
                dense_ms += share * point.dense_ms
                sparse_ms += share * point.median_ms
        return Times(dense_ms, sparse_ms)


def replay(
    evaluations: Sequence[tuple[str, EvalResults]],
    options: ReplayOptions,
    target: Shape,
    *,
    own_shape: bool = False,
    lengths: Sequence[int] = (),
    report: Callable[[str], object] = lambda _: None,
) -> Iterator[tuple[list[ReplayPoint], list[ReplayRow]]]:
    """Replay every configuration at every length; yield all points and rows after each.

    Layers that select no queries have no counts to replay, and are timed as they are.
    Configurations with a block-sparse pattern are left out: inputs are random, and which blocks
    a pattern takes depends on them.

    Args:
        evaluations: results, each with the name it goes by.
        options: how to measure.
        target: the shape to measure at; recorded heads are repeated to fit it.
        own_shape: whether to also measure at the evaluated model's own shape.
        lengths: only these lengths; all if empty.
        report: is told what is being measured.

    Raises:
        UsageError: if results cannot be replayed, or there are none.
    """
    points: list[ReplayPoint] = []
    rows: list[ReplayRow] = []
    for seq_len, shape, own, jobs in _jobs(evaluations, target, own_shape, lengths):
        report(f"{seq_len:,} tokens, {shape.num_heads} heads: dense")
        replayer = Replayer(options, shape, seq_len)
        numbers: dict[int, int] = {}  # of this replayer's points, by identity
        for name, results, configuration, length in jobs:
            chosen = chosen_samples(results, configuration, length)
            layers, reused = [], 0
            for layer, runs in enumerate(layer_runs(results, configuration, chosen)):
                report(
                    f"{seq_len:,} tokens, {shape.num_heads} heads: {name}, {configuration}, "
                    f"layer {layer}"
                )
                parts = []
                for share, run in runs:
                    point = replayer.point(run)
                    reused += point is not replayer.dense and id(point) in numbers
                    if id(point) not in numbers:
                        numbers[id(point)] = len(points)
                        points.append(point)
                    parts.append(Part(share, numbers[id(point)]))
                layers.append(tuple(parts))
            digest = counts_digest(results, configuration, length)
            rows.append(
                ReplayRow(configuration, length, digest, len(chosen), own, reused, tuple(layers))
            )
            yield points, rows
        del replayer


Job = tuple[str, EvalResults, str, int]


def _jobs(
    evaluations: Sequence[tuple[str, EvalResults]],
    target: Shape,
    own_shape: bool,
    lengths: Sequence[int],
) -> list[tuple[int, Shape, bool, list[Job]]]:
    """Group what is to be replayed by the tensors that it needs."""
    groups: dict[tuple[int, Shape, bool], list[Job]] = {}
    for name, results in evaluations:
        model = results.header.model
        own = Shape(model["num_heads"], model["num_kv_heads"], model["head_dim"])
        for length in sorted({sample.length for sample in results.samples}):
            if lengths and length not in lengths:
                continue
            for configuration, settings in results.header.configurations.items():
                if PATTERN in (settings or {}):
                    continue
                chosen = chosen_samples(results, configuration, length)
                if not chosen:
                    continue
                # Tasks that set no length are replayed at their prompts' mean length.
                seq_len = length or round(fmean(sample.prompt_tokens for sample in chosen))
                job = (name, results, configuration, length)
                for shape, is_own in ((target, False), *([(own, True)] if own_shape else [])):
                    groups.setdefault((seq_len, shape, is_own), []).append(job)
    if not groups:
        raise UsageError("there are no results to replay, or none of the lengths asked for")
    return [(*key, jobs) for key, jobs in sorted(groups.items(), key=lambda item: item[0])]


def counts_digest(results: EvalResults, configuration: str, length: int) -> str:
    """Return a hash of settings and recorded counts, by which a replay names what it replayed."""
    chosen = chosen_samples(results, configuration, length)
    counts = sorted((s.task, s.index, s.prompt_tokens, json.dumps(s.kept)) for s in chosen)
    settings = results.header.configurations[configuration]
    hashed = json.dumps([settings, counts], sort_keys=True).encode()
    return hashlib.sha256(hashed).hexdigest()


def layer_runs(
    results: EvalResults, configuration: str, samples: Sequence[SampleResult]
) -> list[list[tuple[float, LayerRun | None]]]:
    """Return what each layer did: runs with the share of the samples that they stand for.

    Samples in which a layer ran dense are a part of their own. For the others the root of the
    mean square of a head's shares stands, because attention's time goes with the square: so
    the selected tokens' work is as recorded. Layers that select no queries are timed whatever
    their shares.

    Args:
        results: the evaluation.
        configuration: whose results.
        samples: the results, at least one.

    Raises:
        UsageError: if the settings are none of Token Sparse Attention, or do not list a layer
            that ran sparse.
    """
    num_layers = results.header.model["num_layers"]
    configs = results.header.layer_configs(configuration)
    runs = []
    for layer in range(num_layers):
        recorded = [
            layer_shares(sample.kept[layer], sample.prompt_tokens)
            for sample in samples
            if sample.kept is not None and sample.kept[layer] is not None
        ]
        config = configs.get(layer)
        parts: list[tuple[float, LayerRun | None]] = []
        if recorded:
            if config is None:
                raise UsageError(
                    f"configuration {configuration!r} ran layer {layer} sparse, but does not "
                    "list it"
                )
            parts.append((len(recorded) / len(samples), LayerRun(config, _mean(recorded))))
        dense = len(samples) - len(recorded)
        if dense:
            parts.append((dense / len(samples), None if config is None else LayerRun(config, ())))
        runs.append(parts)
    return runs


def _mean(recorded: Sequence[Sequence[float]]) -> tuple[float, ...]:
    heads = max(map(len, recorded))
    full = [shares if len(shares) == heads else [*shares] * heads for shares in recorded]
    return tuple(math.sqrt(fmean(share**2 for share in head)) for head in zip(*full))


def _is_layer(layer: Sequence[Part], num_points: int) -> bool:
    in_range = all(0 <= part.point < num_points for part in layer)
    return in_range and math.isclose(sum(part.share for part in layer), 1, rel_tol=1e-6)
