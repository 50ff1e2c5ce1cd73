"""The result file of ``tsa fidelity``: a header, then a line per prompt and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import LayerKept, RunHeader, check_kept
from token_sparse_attention.fidelity.prompts import SHAPES
from token_sparse_attention.records import Count, check_choice
from token_sparse_attention.result_lines import ResultLines

Key = tuple[int, str, int, str]


@dataclass(frozen=True)
class FidelityHeader(RunHeader):
    """The header of a run's results.

    Attributes:
        texts: name -> SHA-256 of the texts that prompts were made from.
    """

    texts: Mapping[str, str]


@dataclass(frozen=True)
class AnswerResult:
    """How an answer's tokens come out after one prefill, given the answer's tokens before.

    Attributes:
        shape: one of `prompts.SHAPES`.
        length: tokens of the prompt.
        index: which piece of text.
        configuration: name of the configuration that prefilled.
        source: name of the text.
        divergence: of each token, KL(dense || this configuration) in nats.
        agreement: of each token, whether both give the same one the highest probability.
        loss: of each token, its negative log-likelihood.
        kept: see `evaluation.record.SampleResult`.
        seconds: from the start of the prefill to the first token.
    """

    shape: str
    length: Annotated[int, Meta(ge=1)]
    index: Count
    configuration: str
    source: str
    divergence: list[float]
    agreement: list[bool]
    loss: list[float]
    kept: list[LayerKept] | None
    seconds: float

    @property
    def key(self) -> Key:
        """What tells results of one file apart."""
        return self.length, self.shape, self.index, self.configuration

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length."""
        return self.length


@dataclass(frozen=True)
class FidelityResults:
    """A result file's content, finished or not."""

    header: FidelityHeader
    answers: tuple[AnswerResult, ...]


def load_results(path: str | Path) -> FidelityResults:
    """Read a result file; see `ResultLines.load`."""
    return FidelityResults(*FILES.load(Path(path)))


def _check(answer: AnswerResult, header: FidelityHeader, where: str) -> None:
    check_choice(f"{where}: shape", answer.shape, SHAPES)
    if answer.configuration not in header.configurations:
        raise UsageError(f"{where}: configuration {answer.configuration!r} is not in the header")
    sizes = {len(answer.divergence), len(answer.agreement), len(answer.loss)}
    if len(sizes) > 1 or 0 in sizes:
        raise UsageError(f"{where}: divergence, agreement and loss must have a number per token")
    if answer.kept is not None:
        check_kept(answer.kept, answer.length, header.model, where)


FILES = ResultLines("a run of tsa fidelity", FidelityHeader, AnswerResult, _check)
