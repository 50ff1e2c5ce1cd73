"""Several result files of `tsa fidelity` as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from token_sparse_attention.fidelity.record import AnswerResult, FidelityResults, Key

_SAME = ("model", "texts")
_ASKED = ("model", "dtype", "pieces", "seed")


def joined(parts: Sequence[FidelityResults]) -> FidelityResults:
    """Return results about the same prompts as one; the first of equal results counts.

    Only pieces of text count that the first part finished, so that all configurations are
    compared on prompts that its own configurations read too.

    Raises:
        ValueError: if the parts are about other prompts or models, or give one name to two
            configurations.
    """
    first = parts[0].header
    configurations: dict[str, object] = {}
    for part in parts:
        for name in _SAME:
            if getattr(part.header, name) != getattr(first, name):
                raise ValueError(f"results to join must agree in {name}")
        for name in _ASKED:
            if part.header.arguments.get(name) != first.arguments.get(name):
                raise ValueError(f"results to join must agree in {name}")
        for name, settings in part.header.configurations.items():
            if configurations.setdefault(name, settings) != settings:
                raise ValueError(f"two configurations of results to join are called {name!r}")
    answers: dict[Key, AnswerResult] = {}
    for part in parts:
        for answer in part.answers:
            answers.setdefault(answer.key, answer)
    whole = _finished(parts[0])
    chosen = tuple(a for a in answers.values() if (a.length, a.index) in whole)
    return FidelityResults(replace(first, configurations=configurations), chosen)


def _finished(results: FidelityResults) -> set[tuple[int, int]]:
    """Return the pieces, by length and number, that every configuration read in every shape."""
    counts: dict[tuple[int, int], int] = {}
    for answer in results.answers:
        piece = answer.length, answer.index
        counts[piece] = counts.get(piece, 0) + 1
    return {piece for piece, count in counts.items() if count == max(counts.values())}
