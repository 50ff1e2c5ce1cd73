"""Result files of any kind, told apart by what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from token_sparse_attention.benchmark.record import ResultFile
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import EvalResults, load_results
from token_sparse_attention.records import parse_object, read_lines, read_text
from token_sparse_attention.report.kept_text import KeptText


@dataclass(frozen=True)
class Inputs:
    """What a report is made of; every result with the name it goes by.

    Attributes:
        evaluations: results of ``tsa eval``.
        captures: results of ``tsa capture``.
        runs: results of ``tsa bench``.
    """

    evaluations: tuple[tuple[str, EvalResults], ...]
    captures: tuple[tuple[str, KeptText], ...]
    runs: tuple[Run, ...]


def load(paths: Sequence[Path]) -> Inputs:
    """Read result files.

    Raises:
        UsageError: if one cannot be read, or is of no kind that is known here.
    """
    evaluations, captures, runs = [], [], []
    for path, name in zip(paths, _names(paths)):
        content = _first_object(path)
        if "configurations" in content and "texts" not in content:
            evaluations.append((name, load_results(path)))
        elif "records" in content:
            runs.append(Run(name, ResultFile.from_dict(content, str(path))))
        elif "tokens" in content:
            captures.append((name, KeptText.from_dict(content, str(path))))
        else:
            raise UsageError(f"{path} must be a result of tsa eval, tsa capture or tsa bench")
    return Inputs(tuple(evaluations), tuple(captures), tuple(runs))


def _first_object(path: Path) -> dict[str, Any]:
    """Return what a file holds: one object, or the first of several lines."""
    _, first = next(read_lines(path), ("", ""))
    with suppress(UsageError):
        return parse_object(str(path), first)
    text = read_text(path)
    with suppress(UsageError):
        return parse_object(str(path), text)
    return {}


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names, or their whole paths where names repeat."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
