"""What makes a sparse prefill's answers likely again: more samples, dense layers, dense heads.

Tables of `screen --answers`, whose points differ in little and are compared with one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.markdown import markdown_table, mean_cell, numbered
from benchmarks.pooling import paired_scores

from token_sparse_attention.evaluation.record import DENSE, EvalResults
from token_sparse_attention.evaluation.summary import difference_interval, summarise

_MUCH = 0.5


def table(results: EvalResults, base: str, points: Sequence[str] | None = None) -> str:
    """Return by how many nats points' right answers are less likely than those of another one.

    Args:
        results: of points whose replies are negative log-likelihoods, of prompts of one length.
        base: the point to compare with.
        points: which ones to show, all others if not given.
    """
    nats: dict[str, dict[tuple[str, int, int], float]] = defaultdict(dict)
    for sample in results.samples:
        nats[sample.configuration][sample.key[:3]] = float(sample.reply)
    length = results.samples[0].length
    work = {row.configuration: row.work for row in summarise(results) if row.task}
    head = [
        "what is attended to",
        "nats",
        f"worse by {_MUCH}",
        "probability",
        "95% interval",
        "work",
    ]
    lines = [head]
    for name in points or [name for name in results.header.configurations if name != base]:
        more = [its - nats[base][key] for key, its in nats[name].items() if key in nats[base]]
        pairs = paired_scores(results, length, base, name)
        low, high = difference_interval(pairs)
        lines.append(
            [
                differs(results.header.configurations[name], results.header.model["num_layers"]),
                mean_cell(more),
                f"{sum(one > _MUCH for one in more)} of {len(more)}",
                f"{fmean(its - score for score, its in pairs):+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                f"{work[name]:.0%}",
            ]
        )
    return markdown_table(lines)


def differs(settings: Mapping[str, Any] | None, num_layers: int) -> str:
    """Say what is dense in a point, or has other samples than its other layers.

    Args:
        settings: a configuration or a layer profile; None is dense.
        num_layers: of the model.
    """
    if settings is None:
        return DENSE
    if "layers" not in settings:
        window = settings["sliding_window"]
        of_window = "" if window == 2048 else f", window {window:,}"
        return f"{settings['num_samples']:,} samples{of_window}"
    dense = [layer for layer in range(num_layers) if str(layer) not in settings["layers"]]
    parts = [f"{numbered('layer', dense)} dense"] if dense else []
    samples: dict[int, list[int]] = defaultdict(list)
    for layer, changes in settings["layers"].items():
        if heads := changes.get("dense_heads"):
            parts.append(f"{numbered('head', heads)} of layer {layer} dense")
        if count := changes.get("num_samples"):
            samples[count].append(int(layer))
    parts += [f"{count:,} samples in {numbered('layer', of)}" for count, of in samples.items()]
    return ", ".join(parts)
