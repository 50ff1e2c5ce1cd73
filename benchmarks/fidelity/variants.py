"""What is compared: how each block's keys are scored, drawn and weighted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to attend in prefill; the fields' defaults are the reference of the comparisons.

    Attributes:
        name: what results call it.
        block: queries that share a draw, C; 0: one draw for the whole prompt by its last queries.
        window: keys that a query sees up to itself, w.
        probes: queries of the previous block that score, W.
        samples: keys a block and head draw, M; 0: window and sinks alone.
        share: M is this share of a block's candidates where that is not 0, between `bounds`.
        bounds: of M where `share` sets it.
        normaliser: what a probe's probabilities are shares of: ``all`` keys; ``near``, the window
            and sinks alone; ``near-capped``, the same and at most 1 each.
        per_group: the heads of a KV group share a draw, by the mean of their scores.
        budget: ``equal`` M per head, or by ``mass`` beyond the window.
        points: within the unit cells: ``golden``, ``half`` or ``random``.
        uniform: how the part that is not by score is spread: over ``position``, or over the
            ``log-distance`` from the block or the ``log-position``.
        by_score: the part of the probabilities that is by score.
        exponent: weights are p to minus this.
        value_norm: whether scores are multiplied by the norm of the value.
        estimator: ``samples``; ``top``, the best-scored without weights; ``means`` of K and V over
            runs of keys; ``top-means``, half of M each; ``control``, half samples, half means as
            a control variate.
        delta: every how many queries one is dense and corrects those after it; 0: none.
        layers: which layers are sparse: from the first to before the second; empty: all.
        dense_last: last queries of a prompt that are dense.
    """

    name: str
    block: int = 2048
    window: int = 2048
    probes: int = 32
    samples: int = 2048
    share: float = 0.0
    bounds: tuple[int, int] = (0, 0)
    normaliser: str = "all"
    per_group: bool = False
    budget: str = "equal"
    points: str = "golden"
    uniform: str = "position"
    by_score: float = 0.5
    exponent: float = 1.0
    value_norm: bool = False
    estimator: str = "samples"
    delta: int = 0
    layers: tuple[int, int] | tuple[()] = ()
    dense_last: int = 128


def _variants() -> list[Variant]:
    v = Variant
    return [
        v("window 2048", samples=0),
        v("one draw, M 4096", block=0, probes=128, samples=4096, points="half"),
        v("M 2048"),
        v("M 1024", samples=1024),
        v("M 4096", samples=4096),
        v("near", normaliser="near"),
        v("near capped", normaliser="near-capped"),
        v("per group", per_group=True),
        v("per-head budgets", budget="mass"),
        v("C 1024, w 1024, W 16", block=1024, window=1024, probes=16),
        v("C 1024, w 2048, W 16", block=1024, probes=16),
        v("C 2048, w 4096", window=4096),
        v("C 4096, w 4096", block=4096, window=4096),
        v("M n/16 in 1024-4096", share=1 / 16, bounds=(1024, 4096)),
        v("M n/8 in 1024-4096", share=1 / 8, bounds=(1024, 4096)),
        v("M n/16 in 512-4096", share=1 / 16, bounds=(512, 4096)),
        v("W 8", probes=8),
        v("W 16", probes=16),
        v("W 64", probes=64),
        v("W 128", probes=128),
        v("layers 12-23 only", layers=(12, 24)),
        v("layers 0-11 only", layers=(0, 12)),
        v("points half", points="half"),
        v("points random", points="random"),
        v("log distance", uniform="log-distance"),
        v("exponent 0.9", exponent=0.9),
        v("value norm", value_norm=True),
        v("by score 0.75", by_score=0.75),
        v("by score 0.9", by_score=0.9),
        v("best-scored", estimator="top"),
        v("means", estimator="means"),
        v("half best, half means", estimator="top-means"),
        v("control variate", estimator="control"),
        v("delta 64", delta=64),
        v("window, delta 64", samples=0, delta=64),
        v("per-head budgets, per group", budget="mass", per_group=True),
        v("per-head budgets, log distance", budget="mass", uniform="log-distance"),
        v("per-head budgets, M 1024", budget="mass", samples=1024),
        v("per group, M 4096", per_group=True, samples=4096),
        v("C 1024, w 1024, M 1024, W 16", block=1024, window=1024, probes=16, samples=1024),
        v("C 4096, w 4096, M 1024", block=4096, window=4096, samples=1024),
        v("C 2048, w 4096, M 1024", window=4096, samples=1024),
        v("n/8 in 512-4096", share=1 / 8, bounds=(512, 4096)),
        v("log position", uniform="log-position"),
    ]


VARIANTS = {variant.name: variant for variant in _variants()}
