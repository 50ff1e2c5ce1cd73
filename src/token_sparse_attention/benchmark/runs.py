"""Looking measurements up, and what may be said about two of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from token_sparse_attention.benchmark.record import KERNEL_KINDS, Record, ResultFile

NOT_MEASURED, CHECK_FAILED = "not measured", "check failed"
FIRST_DENSE = "dense/fa4"
MAIN_KEPT = 0.5


class NoFigureError(Exception):
    """A figure cannot be given; the message says why in two words."""


class Run:
    """One result file's records, found by what was measured."""

    def __init__(self, name: str, result: ResultFile) -> None:
        self.name, self.result = name, result
        self._found: dict[tuple[str, str, int, float | None, float | None], Record] = {}
        for record in result.records:
            key = (record.name, record.kind, record.seq_len, record.kept, record.drop_mass)
            self._found.setdefault(key, record)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a result file; the run is called like it."""
        return cls(path.stem, ResultFile.load(path))

    def find(
        self,
        name: str,
        seq_len: int,
        kept: float | None = None,
        kinds: Sequence[str] = KERNEL_KINDS,
    ) -> Record | None:
        """Return what was measured, of the first kind there is, or None."""
        found = (self._found.get((name, kind, seq_len, kept, None)) for kind in kinds)
        return next((record for record in found if record), None)

    def need(
        self,
        name: str,
        seq_len: int,
        kept: float | None = None,
        kinds: Sequence[str] = KERNEL_KINDS,
        *,
        checked: bool = True,
    ) -> Record:
        """Return what `find` does, if a claim may rest on it.

        Raises:
            NoFigureError: if it was not measured, or `checked` and its check did not pass.
        """
        record = self.find(name, seq_len, kept, kinds)
        if record is None:
            raise NoFigureError(NOT_MEASURED)
        if checked and not record.passed:
            raise NoFigureError("not checked" if record.passed is None else CHECK_FAILED)
        return record

    def lengths(self, *names: str) -> list[int]:
        """Return the lengths at which any of these was measured, ascending."""
        return sorted({r.seq_len for r in self.result.records if r.name in names})

    def names(self, prefix: str) -> list[str]:
        """Return the names of what was measured that begin so, in order."""
        found = (r.name for r in self.result.records if r.name.startswith(prefix))
        return list(dict.fromkeys(found))

    def dense(self, seq_len: int) -> Record:
        """Return what sparse is compared with: flash-attn-4, else the fastest dense kernel.

        Raises:
            NoFigureError: if there is none whose check passed.
        """
        first = self.find(FIRST_DENSE, seq_len)
        if first is not None:
            return self.need(FIRST_DENSE, seq_len)
        found = [self.find(name, seq_len) for name in self.names("dense/")]
        passed = [record for record in found if record and record.passed]
        if not passed:
            raise NoFigureError(CHECK_FAILED if any(found) else NOT_MEASURED)
        return min(passed, key=milliseconds)


def milliseconds(record: Record) -> float:
    """Return the median time.

    Raises:
        NoFigureError: if the record holds no time.
    """
    if record.median_ms is None:
        raise NoFigureError(NOT_MEASURED)
    return record.median_ms


def tokens(count: int) -> str:
    """Return a length as people write it.

    Example:
        >>> tokens(131072), tokens(1280)
        ('128K', '1,280')
    """
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"
