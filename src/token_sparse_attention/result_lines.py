"""Result files that a run goes on with after it was cut off: a header, then a line per result."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from token_sparse_attention.checks import check_writable
from token_sparse_attention.errors import UsageError
from token_sparse_attention.records import (
    LineFile,
    Versioned,
    convert,
    encode,
    parse,
    parse_object,
    read_lines,
)

_HEADER_BEGINS = '{"version":'


class Entry(Protocol):
    """One result."""

    @property
    def key(self) -> Hashable:
        """What tells results of one file apart."""


H = TypeVar("H", bound=Versioned)
E = TypeVar("E", bound=Entry)


class ResultLines(NamedTuple, Generic[H, E]):
    """One kind of such files.

    Attributes:
        what: a file is the results of, for messages: ``"an evaluation"``.
        header: type of the first line.
        entry: type of the others.
        check: takes an entry, the header and the entry's place; raises UsageError.
    """

    what: str
    header: type[H]
    entry: type[E]
    check: Callable[[E, H, str], None]

    def load(self, path: Path) -> tuple[H, tuple[E, ...]]:
        """Read a file, also one that gzip compressed; a cut-off last line is left out.

        Raises:
            UsageError: if the file cannot be read or is none; the message names the line.
        """
        lines = read_lines(path, unfinished=True)
        where, line = next(lines, ("", None))
        if line is None:
            raise UsageError(f"{path} must begin with the header of {self.what}, but is empty")
        header = self.header.from_dict(parse_object(where, line), where)
        entries: dict[Hashable, E] = {}
        for where, line in lines:
            entry = convert(parse_object(where, line), self.entry, where)
            self.check(entry, header, where)
            if entry.key in entries:
                raise UsageError(f"{where} repeats the result of {entry.key}")
            entries[entry.key] = entry
        return header, tuple(entries.values())

    def check_file(self, path: Path) -> None:
        """Raise unless results can be written to a file, which may hold those of a cut-off run.

        Raises:
            UsageError: if it cannot be written, or holds something else.
        """
        if path.suffix == ".gz":
            raise UsageError(
                f"--out must not end in .gz, as results are appended to it; got {path}"
            )
        check_writable(path, f"--out {path}")
        if not path.is_file():
            return
        if next(read_lines(path, unfinished=True), None) is not None:
            self.load(path)
            return
        begun = next(read_lines(path), ("", ""))[1]
        if not _HEADER_BEGINS.startswith(begun[: len(_HEADER_BEGINS)]):
            raise UsageError(f"{path} must begin with the header of {self.what}, but does not")

    def open(self, path: Path, header: H) -> tuple[list[E], LineFile]:
        """Open a file for more results: a new one, or the one of a run that was cut off.

        Returns:
            The results that are there already, and the open file.

        Raises:
            UsageError: if the file belongs to another run; the message says what differs.
        """
        self.check_file(path)
        if not path.exists() or next(read_lines(path, unfinished=True), None) is None:
            file = LineFile(path, new=True)
            file.write(header)
            return [], file
        found, entries = self.load(path)
        self._check_same_run(path, found, header)
        return list(entries), LineFile(path, new=False)

    def _check_same_run(self, path: Path, found: H, wanted: H) -> None:
        asked = parse("", encode(wanted))
        for name, there in parse("", encode(found)).items():
            if there == asked[name]:
                continue
            if isinstance(there, dict):
                names = [*there, *(entry for entry in asked[name] if entry not in there)]
                entry = next(e for e in names if there.get(e) != asked[name].get(e))
                name, there, now = f"{name}.{entry}", there.get(entry), asked[name].get(entry)
            else:
                now = asked[name]
            another = self.what.replace("an ", "another ", 1).replace("a ", "another ", 1)
            raise UsageError(
                f"{path} holds {another}: its {name} is {there!r}, now it would be {now!r}; "
                "give another --out, or delete the file"
            )
