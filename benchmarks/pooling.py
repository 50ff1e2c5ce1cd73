"""Result files of `tsa eval`: a folder of them, and several as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from token_sparse_attention.evaluation.record import EvalResults, load_results


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
