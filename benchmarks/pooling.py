"""Result files of `tsa eval`: a folder of them, several as one, and scores side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from token_sparse_attention.evaluation.record import EvalResults, Key, SampleResult, load_results


def load_folder(folder: Path) -> dict[str, EvalResults]:
    """Return the results in a folder by their file's name, in the order of names."""
    files = {path.name.partition(".jsonl")[0]: path for path in folder.glob("*.jsonl*")}
    return {name: load_results(files[name]) for name in sorted(files)}


def pooled(rounds: Sequence[EvalResults]) -> EvalResults:
    """Return results that shared the samples, or went on with more, as one.

    The header is that of the first.

    Raises:
        ValueError: if they are of other configurations or models, or have a reply twice.
    """
    first = rounds[0].header
    for one in rounds[1:]:
        for field in ("model", "configurations"):
            if getattr(one.header, field) != getattr(first, field):
                raise ValueError(f"results to pool must agree in {field}")
    samples = [sample for one in rounds for sample in one.samples]
    if len({sample.key for sample in samples}) != len(samples):
        raise ValueError("results to pool must not have the same sample and configuration twice")
    return replace(rounds[0], samples=tuple(samples))


def beside(rounds: Sequence[EvalResults]) -> EvalResults:
    """Return results of the same samples under different configurations as one.

    Later ones began with the dense replies of the first (``tsa eval --dense-from``).

    Raises:
        ValueError: if they are of other models or samples, or have a reply twice that differs.
    """
    first = rounds[0].header
    configurations = dict(first.configurations)
    samples: dict[Key, SampleResult] = {}
    for one in rounds:
        if one.header.model != first.model or _samples_of(one) != _samples_of(rounds[0]):
            raise ValueError("results side by side must be of the same model and samples")
        for name, settings in one.header.configurations.items():
            if configurations.setdefault(name, settings) != settings:
                raise ValueError(f"results side by side differ in what {name} is")
        for sample in one.samples:
            if samples.setdefault(sample.key, sample) != sample:
                raise ValueError(f"results side by side differ in {sample.key}")
    header = replace(first, configurations=configurations)
    return replace(rounds[0], header=header, samples=tuple(samples.values()))


def _samples_of(results: EvalResults) -> object:
    return results.header.arguments["samples_sha256"]


def paired_scores(
    results: EvalResults, length: int, base: str, other: str
) -> list[tuple[float, float]]:
    """Return two configurations' scores of every sample of a length that has both."""
    scores = {sample.key: sample.score for sample in results.samples}
    return [
        (score, its)
        for key, score in scores.items()
        if key[1] == length and key[3] == base and score is not None
        if (its := scores.get((*key[:3], other))) is not None
    ]
