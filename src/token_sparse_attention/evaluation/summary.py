"""Accuracy, its loss against dense prefill, and how much was attended: rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import Protocol

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.evaluation.record import (
    DENSE,
    EvalResults,
    Key,
    LayerKept,
    SampleResult,
)
from token_sparse_attention.methods import method_of

# Half a sample for each way that two replies can turn out: both right, one right, both wrong.
_PSEUDO_PAIRS = ((1.0, 1.0, 0.5), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5), (0.0, 0.0, 0.5))
_TWO_SIDED, _ONE_SIDED = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.95)

Pair = tuple[float, float, float]  # dense score, sparse score, weight


@dataclass(frozen=True)
class Row:
    """One configuration's results on a group of samples.

    Attributes:
        task: lm-eval's name of the task, None for all tasks together.
        length: what the task was built for, in tokens; None for all lengths together, 0 for
            tasks that set none.
        configuration: name of the configuration.
        samples: how many replies there are.
        pairs: how many samples were scored here and densely; the fields up to
            `relative_loss_upper` are about these.
        score: mean score, None if there are no pairs.
        difference: mean of the score minus the dense score of the same sample.
        difference_low: lower end of the difference's 95% confidence interval.
        difference_high: upper end.
        relative_loss: minus the difference, as a share of the dense mean score; None if that
            is 0.
        relative_loss_upper: the relative loss is below this with 95% confidence.
        kept_share: share of the prompt that the method chose for a head, mean over samples,
            layers and heads; 1 in dense layers.
        work: mean over the same of `Method.work`: attention's operations against dense.
        seconds: mean time from the start of the prefill to the first token.
        work_is_bound: whether a block-sparse pattern skips more than `work` says, which does
            not count the blocks that a pattern leaves out.
    """

    task: str | None
    length: int | None
    configuration: str
    samples: int
    pairs: int
    score: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    relative_loss: float | None
    relative_loss_upper: float | None
    kept_share: float
    work: float
    seconds: float
    work_is_bound: bool = False

    @property
    def dense_score(self) -> float | None:
        """Mean dense score of the samples that `score` is of; None if there are none."""
        return None if self.score is None else self.score - (self.difference or 0.0)

    @property
    def shown_work(self) -> str:
        """`work` as tables show it."""
        return show_work(self.work, self.work_is_bound)


def show_work(work: float, is_bound: bool) -> str:
    """Return work as tables show it."""
    return f"{'≤' if is_bound else ''}{work:.3f}"


def summarise(results: EvalResults) -> tuple[Row, ...]:
    """Return one row per configuration for every group of samples that there is.

    Groups, in this order: all samples; each length, all tasks together; each task, all
    lengths together; each task and length. A mean over tasks is a mean over samples, which is
    the mean of the tasks' means where they have equally many samples. A group that would
    repeat another one (of the only task, or the only length) is there all the same.
    """
    dense = {s.key[:3]: s for s in results.samples if s.configuration == DENSE}
    configs = {name: results.header.layer_configs(name) for name in results.header.configurations}
    # Once for each sample, which is in four groups.
    shares = {s.key: kept_share(s) for s in results.samples}
    works = {s.key: attention_work(s, configs[s.configuration]) for s in results.samples}
    rows = []
    for task, length, members in _groups(results.samples):
        for name in results.header.configurations:
            chosen = [s for s in members if s.configuration == name]
            if chosen:
                row = _row(task, length, name, chosen, dense, shares, works)
                rows.append(replace(row, work_is_bound=results.header.skips_blocks(name)))
    return tuple(rows)


def chosen_samples(results: EvalResults, configuration: str, length: int) -> list[SampleResult]:
    """Return a configuration's results of a length, all tasks together."""
    return [s for s in results.samples if (s.configuration, s.length) == (configuration, length)]


def layer_shares(kept: LayerKept, prompt_tokens: int) -> list[float]:
    """Return what share of the prompt each head of a layer kept; one number if all agree.

    For KV sampling these are its sinks and samples.
    """
    if kept is None:
        return [1.0]
    return [n / prompt_tokens for n in (kept if isinstance(kept, list) else [kept])]


class Prefilled(Protocol):
    """What a result says of its prefill: see `SampleResult`."""

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length."""

    @property
    def kept(self) -> list[LayerKept] | None:
        """What each layer kept."""


def kept_share(sample: Prefilled) -> float:
    """Return the mean of `layer_shares` over layers and heads."""
    layers = sample.kept or [None]
    return fmean(fmean(layer_shares(layer, sample.prompt_tokens)) for layer in layers)


def attention_work(sample: Prefilled, configs: Mapping[int, SparseConfig]) -> float:
    """Return the mean of `Method.work` over layers and heads; `configs` are the layers'."""
    works = []
    for layer, kept in enumerate(sample.kept or [None]):
        if kept is None:
            works.append(1.0)
            continue
        heads = kept if isinstance(kept, list) else [kept]
        method = method_of(configs[layer])
        works.append(fmean(method.work(n, sample.prompt_tokens) for n in heads))
    return fmean(works)


def difference_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return a 95% confidence interval of the mean of ``sparse - dense``.

    Args:
        pairs: ``(dense, sparse)`` scores from 0 to 1 of the same samples, at least one.

    Source:
        Normal interval after adding half a sample to each of the four outcomes (Agresti and
        Min, Statistics in Medicine 24, 2005). Without these, samples that all agree would
        give an interval of no width however few they are.
    """
    weighted = _with_pseudo_pairs(pairs)
    total = sum(weight for *_, weight in weighted)
    mean = sum(weight * (sparse - dense) for dense, sparse, weight in weighted) / total
    variance = sum(w * (sparse - dense - mean) ** 2 for dense, sparse, w in weighted) / total
    margin = _TWO_SIDED * math.sqrt(variance / total)
    return max(mean - margin, -1.0), min(mean + margin, 1.0)


def relative_loss_bound(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the one-sided 95% upper bound of ``1 - mean(sparse) / mean(dense)``.

    By the delta method for a ratio of means, with the same half samples added as in
    `difference_interval`.

    Args:
        pairs: ``(dense, sparse)`` scores from 0 to 1 of the same samples, at least one.
    """
    weighted = _with_pseudo_pairs(pairs)
    total = sum(weight for *_, weight in weighted)
    dense_mean = sum(weight * dense for dense, _, weight in weighted) / total
    loss = sum(weight * (dense - sparse) for dense, sparse, weight in weighted)
    ratio = loss / total / dense_mean
    squares = sum(w * (dense - sparse - ratio * dense) ** 2 for dense, sparse, w in weighted)
    deviation = math.sqrt(squares / total / total) / dense_mean
    return min(ratio + _ONE_SIDED * deviation, 1.0)


def _with_pseudo_pairs(pairs: Sequence[tuple[float, float]]) -> list[Pair]:
    return [*((dense, sparse, 1.0) for dense, sparse in pairs), *_PSEUDO_PAIRS]


def _groups(
    samples: Sequence[SampleResult],
) -> Iterator[tuple[str | None, int | None, list[SampleResult]]]:
    lengths = sorted({sample.length for sample in samples})
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    wanted: list[tuple[str | None, int | None]] = [
        (None, None),
        *((None, length) for length in lengths),
        *((task, None) for task in tasks),
        *((task, length) for task in tasks for length in lengths),
    ]
    for task, length in wanted:
        members = [s for s in samples if task in (None, s.task) and length in (None, s.length)]
        if members:
            yield task, length, members


def _row(
    task: str | None,
    length: int | None,
    configuration: str,
    samples: Sequence[SampleResult],
    dense: Mapping[tuple[str, int, int], SampleResult],
    shares: Mapping[Key, float],
    works: Mapping[Key, float],
) -> Row:
    pairs = []
    for sample in samples:
        base = dense.get(sample.key[:3])
        if base is not None and base.score is not None and sample.score is not None:
            pairs.append((base.score, sample.score))
    score = difference = low = high = loss = bound = None
    if pairs:
        dense_score, score = (fmean(column) for column in zip(*pairs))
        if configuration != DENSE:
            difference = score - dense_score
            low, high = difference_interval(pairs)
            if dense_score > 0:
                loss = (dense_score - score) / dense_score
                bound = relative_loss_bound(pairs)
    return Row(
        task=task,
        length=length,
        configuration=configuration,
        samples=len(samples),
        pairs=len(pairs),
        score=score,
        difference=difference,
        difference_low=low,
        difference_high=high,
        relative_loss=loss,
        relative_loss_upper=bound,
        kept_share=fmean(shares[sample.key] for sample in samples),
        work=fmean(works[sample.key] for sample in samples),
        seconds=fmean(sample.seconds for sample in samples),
    )
