"""Means over prompts with bootstrap intervals: rows of the tables."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from token_sparse_attention.evaluation.record import DENSE
from token_sparse_attention.evaluation.summary import attention_work, kept_share
from token_sparse_attention.fidelity.prompts import SHAPES
from token_sparse_attention.fidelity.record import AnswerResult, FidelityResults

Interval = tuple[float, float] | None
_RESAMPLES = 2000
_TAIL = 0.95


@dataclass(frozen=True)
class Row:
    """One configuration's prompts of one length and shape, compared with dense.

    Means are over prompts, and a prompt's value is the mean over its answer's tokens. Intervals
    are of 95%, by resampling the pieces of text that prompts were made from; None with one.

    Attributes:
        length: tokens of the prompts.
        shape: one of `prompts.SHAPES`; None for all of them together.
        configuration: name of the configuration.
        prompts: how many.
        tokens: of all answers.
        divergence: KL(dense || sparse) per token, in nats.
        divergence_interval: of `divergence`.
        answer_divergence: the sum over an answer's tokens, mean over prompts.
        agreement: share of tokens to which both give the highest probability.
        agreement_interval: of `agreement`.
        loss_change: mean change of a token's negative log-likelihood, sparse minus dense.
        loss_change_interval: of `loss_change`.
        tail: 95% of all tokens diverge by less.
        worst: the largest divergence of a prompt, per token.
        worst_index: that prompt's number.
        ratio: `divergence` over that of the first configuration, on the same prompts; None
            where that is 0.
        ratio_interval: of `ratio`; both take the same resampled pieces.
        kept_share: see `evaluation.summary.Row`.
        work: see `evaluation.summary.Row`.
        work_is_bound: see `evaluation.summary.Row`.
        seconds: mean time to the first token.
        dense_seconds: the same, prefilled densely.
    """

    length: int
    shape: str | None
    configuration: str
    prompts: int
    tokens: int
    divergence: float
    divergence_interval: Interval
    answer_divergence: float
    agreement: float
    agreement_interval: Interval
    loss_change: float
    loss_change_interval: Interval
    tail: float
    worst: float
    worst_index: int
    ratio: float | None
    ratio_interval: Interval
    kept_share: float
    work: float
    work_is_bound: bool
    seconds: float
    dense_seconds: float


def summarise(results: FidelityResults) -> tuple[Row, ...]:
    """Return the rows of each length: all shapes together, then each shape.

    The dense configuration has none. A configuration counts with the prompts that are done.
    """
    by_key = {answer.key: answer for answer in results.answers}
    names = [name for name in results.header.configurations if name != DENSE]
    rows = []
    for length, shape in _groups(results.answers):
        for name in names:
            chosen = [
                (answer, by_key[dense_key], by_key.get((*answer.key[:3], names[0])))
                for answer in results.answers
                if (answer.length, answer.configuration) == (length, name)
                and shape in (None, answer.shape)
                and (dense_key := (*answer.key[:3], DENSE)) in by_key
            ]
            if chosen:
                rows.append(_row(results, shape, name, chosen))
    return tuple(rows)


def _groups(answers: Sequence[AnswerResult]) -> Iterator[tuple[int, str | None]]:
    for length in sorted({answer.length for answer in answers}):
        there = {answer.shape for answer in answers if answer.length == length}
        yield length, None
        yield from ((length, shape) for shape in SHAPES if shape in there)


def _row(
    results: FidelityResults,
    shape: str | None,
    name: str,
    chosen: Sequence[tuple[AnswerResult, AnswerResult, AnswerResult | None]],
) -> Row:
    """Return a row of answers, each with the dense one and the first configuration's."""
    own = [answer for answer, _, _ in chosen]
    configs = results.header.layer_configs(name)
    divergence = [fmean(answer.divergence) for answer in own]
    agreement = [fmean(answer.agreement) for answer in own]
    change = [fmean(answer.loss) - fmean(dense.loss) for answer, dense, _ in chosen]
    resample = Resample([answer.index for answer in own])
    tokens = torch.tensor([value for answer in own for value in answer.divergence])
    worst = max(range(len(own)), key=divergence.__getitem__)
    firsts = [0.0 if first is None else fmean(first.divergence) for *_, first in chosen]
    comparable = all(first is not None for *_, first in chosen) and sum(firsts) > 0
    return Row(
        length=own[0].length,
        shape=shape,
        configuration=name,
        prompts=len(own),
        tokens=len(tokens),
        divergence=fmean(divergence),
        divergence_interval=resample.interval(divergence),
        answer_divergence=fmean(sum(answer.divergence) for answer in own),
        agreement=fmean(agreement),
        agreement_interval=resample.interval(agreement),
        loss_change=fmean(change),
        loss_change_interval=resample.interval(change),
        tail=float(tokens.double().quantile(_TAIL)),
        worst=divergence[worst],
        worst_index=own[worst].index,
        ratio=sum(divergence) / sum(firsts) if comparable else None,
        ratio_interval=resample.interval(divergence, firsts) if comparable else None,
        kept_share=fmean(map(kept_share, own)),
        work=fmean(attention_work(answer, configs) for answer in own),
        work_is_bound=results.header.skips_blocks(name),
        seconds=fmean(answer.seconds for answer in own),
        dense_seconds=fmean(dense.seconds for _, dense, _ in chosen),
    )


class Resample:
    """Draws pieces of text with replacement; the prompts of a piece go together.

    Args:
        pieces: which piece each value of `interval` is of.
    """

    def __init__(self, pieces: Sequence[int]) -> None:
        self._pieces, self._names = pieces, sorted(set(pieces))
        # Every run takes the same resampled pieces.
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self._names).encode()))
        size = (_RESAMPLES, len(self._names))
        self._drawn = torch.randint(len(self._names), size, generator=generator)

    def interval(self, values: Sequence[float], over: Sequence[float] | None = None) -> Interval:
        """Return the 95% interval of a mean, or of a ratio of means; None with one piece."""
        if len(self._names) < 2:
            return None
        below = [1.0] * len(values) if over is None else over
        means = self._sums(values) / self._sums(below)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    def _sums(self, values: Sequence[float]) -> Tensor:
        """Return the sum of the values in each resample."""
        of_piece = dict.fromkeys(self._names, 0.0)
        for piece, value in zip(self._pieces, values):
            of_piece[piece] += value
        totals = torch.tensor(list(of_piece.values()), dtype=torch.float64)
        return totals[self._drawn].sum(1)
