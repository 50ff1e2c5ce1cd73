"""Result files that a run goes on with after it was cut off: a header, then a line per result."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from token_sparse_attention.checks import check_writable
from token_sparse_attention.errors import JobFailedError, UsageError
from token_sparse_attention.records import (
    Versioned,
    convert,
    encode,
    parse,
    parse_object,
    read_lines,
    reason,
)

_HEADER_BEGINS = '{"version":'


class LineFile:
    """JSON Lines that are written as they come, so that a cut-off run loses one at most.

    Args:
        path: is made if there is none; no other run may write it meanwhile.

    Raises:
        UsageError: if the file cannot be opened, or another run writes it.
        JobFailedError: if an entry cannot be written, as where the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {reason(error)}") from error
        _lock(self._file, path)

    def cut_to(self, size: int) -> None:
        """Leave out what follows the first bytes; of a device or a pipe, nothing."""
        if self._path.is_file():
            self._file.truncate(size)

    def write(self, entry: Any) -> None:
        """Append an entry."""
        try:
            self._file.write(encode(entry).encode() + b"\n")
            self._file.flush()
        except BrokenPipeError:  # whoever read the pipe has read enough
            raise
        except OSError as error:
            raise JobFailedError(f"{self._path} cannot be written: {reason(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, to which all entries are written."""
        with suppress(OSError):
            self._file.close()


def _lock(file: BufferedIOBase, path: Path) -> None:
    """Keep a file for this run for as long as it is open, where locks are known.

    Raises:
        UsageError: if another run has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{path} cannot be written: another run is writing it") from error
    except OSError:  # a network's file system may have no locks
        return


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a file that is there from other runs, while it is read and replaced.

    Raises:
        UsageError: if the file cannot be opened, or another run writes it.
    """
    try:
        file = path.open("r+b")
    except OSError as error:
        done = "written" if path.exists() else "read"
        raise UsageError(f"{path} cannot be {done}: {reason(error)}") from error
    with file:
        _lock(file, path)
        yield


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
        LineFile(path).close()
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
        file = LineFile(path)
        if not path.is_file() or next(read_lines(path, unfinished=True), None) is None:
            file.cut_to(0)
            file.write(header)
            return [], file
        try:
            found, entries = self.load(path)
            self._check_same_run(path, found, header)
        except UsageError:
            file.close()
            raise
        file.cut_to(path.read_bytes().rfind(b"\n") + 1)
        return list(entries), file

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
