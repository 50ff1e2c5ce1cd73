"""Reading and writing of all files: JSON and JSON Lines, checked against dataclasses.

`json` reads the text, as its errors say line and column, and msgspec checks it against a type.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import re
import reprlib
import secrets
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    NoReturn,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from token_sparse_attention.errors import UsageError, did_you_mean

MAX_BYTES = 1 << 28  # of a file, decompressed; of JSON Lines, which may be longer, of a line
Count = Annotated[int, msgspec.Meta(ge=0)]
Decoded = TypeVar("Decoded")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_EXPECTED = re.compile(r"Expected (.+?)(?:, got .*)?")
_MESSAGE = re.compile(r"(.*?)(?: - at `(?:key` in `)?\$(.*)`)?", re.DOTALL)
_STEPS = re.compile(r"\.(\w+)|\[(\d+)\]")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def check_keys(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise UsageError, which begins with `what`, unless all given names are known."""
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) or f"; expected {', '.join(known)}"
            raise UsageError(f"{what} has an unknown entry {key!r}{hint}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise UsageError unless `value`, which the error calls `name`, is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def parse(where: str, text: str) -> Any:
    """Return the content of JSON text, with finite numbers, and no name twice in an object.

    Raises:
        UsageError: if it is none; the message begins with `where`.
    """
    try:
        return json.loads(
            text,
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_distinct,
        )
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from error


def parse_object(where: str, text: str) -> dict[str, Any]:
    """Return the entries of a JSON object.

    Raises:
        UsageError: if the text is none; the message begins with `where`.

    Example:
        >>> parse_object("config", '{"num_samples": 1024}')
        {'num_samples': 1024}
    """
    content = parse(where, text)
    if not isinstance(content, dict):
        raise UsageError(f"{where} must be a JSON object, got {_short.repr(content)}")
    return content


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the entry {twice[:80]!r} is there twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def convert(content: Any, kind: type[Decoded], where: str) -> Decoded:
    """Return parsed JSON as a value of a type.

    Args:
        content: what `parse` returns.
        kind: a dataclass, or another type that msgspec supports. Checks of a dataclass's own
            belong into its ``__post_init__``.
        where: the name of the source, with which errors begin.

    Raises:
        UsageError: if entries are unknown, missing or wrong; the message names the entry.
    """
    _check_known(content, kind, where, "")
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise UsageError(_explain(content, str(error), where)) from error
    except UnicodeEncodeError as error:  # msgspec reads no key or choice that is no UTF-8
        half = error.object[error.start]
        raise UsageError(f"{where} must hold whole characters, got {half!r}") from error


def _check_known(content: Any, kind: Any, where: str, path: str) -> None:
    """Refuse unknown entries of dataclasses at any depth, which msgspec ignores."""
    if not _holds_records(kind):
        return
    if dataclasses.is_dataclass(kind):
        if isinstance(content, dict):
            fields = _fields_of(kind)
            check_keys(_place(where, path), content, fields)
            for name, value in content.items():
                _check_known(value, fields[name], where, f"{path}.{name}")
    elif get_origin(kind) in (Annotated, Union, UnionType):
        for part in get_args(kind):
            _check_known(content, part, where, path)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            _check_known(value, get_args(kind)[0], where, f"{path}[{index}]")


@functools.cache
def _holds_records(kind: Any) -> bool:
    inner = get_args(kind)
    return dataclasses.is_dataclass(kind) or (Any not in inner and any(map(_holds_records, inner)))


def _read_fields(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


_fields_of: Callable[[Any], dict[str, Any]] = functools.cache(_read_fields)


def _place(where: str, path: str) -> str:
    return f"{where}: {path.removeprefix('.')}" if path else where


def _explain(content: Any, message: str, where: str) -> str:
    """Return msgspec's message with the name of the source, and with what was found."""
    match = _MESSAGE.fullmatch(message)
    assert match is not None, "everything matches"
    problem, path = match[1], match[2] or ""
    place, found = _place(where, path), content
    for name, index in _STEPS.findall(path.partition("[...]")[0]):
        found = found[name or int(index)]
    if missing := _MISSING.fullmatch(problem):
        return f"{place} has no entry {missing[1]!r}{did_you_mean(missing[1], found)}"
    if expected := _EXPECTED.fullmatch(problem):
        wanted = expected[1].replace("`", "").replace(" | ", " or ")
        shown = "" if "[...]" in path else f", got {_short.repr(found)}"
        return f"{place} must be {wanted}{shown}"
    return f"{place}: {problem}"


def encode(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON; dataclasses become objects.

    Raises:
        ValueError: if a number is not finite.
        UsageError: if it is nested too deeply.
    """
    try:
        return json.dumps(value, default=_plain, indent=indent, allow_nan=False)
    except RecursionError as error:
        raise UsageError("what is to be written is nested too deeply") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Versioned):
        return value.to_dict()
    if hasattr(value, "to_json"):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value):
        return _entries(value)
    return dict(value)  # a mapping; anything else is refused


def _entries(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


@dataclasses.dataclass(frozen=True)
class Versioned:
    """Base of dataclasses that are an object of a file, with the version of its format.

    Attributes:
        VERSIONS: that are read; the last is written.
        OPTIONAL: entries that a file need not have, because older versions did not.
    """

    VERSIONS: ClassVar[tuple[int, ...]] = (1,)
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the version and the fields."""
        return {"version": self.VERSIONS[-1], **_entries(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "file") -> Self:
        """Build the object from parsed JSON, or raise UsageError that names `source` and entry."""
        entries = dict(content)
        version = entries.pop("version", None)
        if type(version) is not int or version not in cls.VERSIONS:
            raise UsageError(f"{source} must have version {cls.VERSIONS[-1]}, got {version!r}")
        for name in _fields_of(cls):
            if name not in entries and name not in cls.OPTIONAL:
                raise UsageError(f"{source} has no entry {name!r}{did_you_mean(name, entries)}")
        return convert(entries, cls, source)


@dataclasses.dataclass(frozen=True)
class JsonFile(Versioned):
    """Base of dataclasses that are the whole of a JSON file.

    Attributes:
        ROWS: the last fields, lists of which each entry takes a line.
    """

    ROWS: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> str:
        """Return the file's content."""
        content, lists = self.to_dict(), ""
        for name in self.ROWS:
            lines = ",\n".join("    " + encode(entry) for entry in content.pop(name))
            lists += f',\n  "{name}": [\n{lines}\n  ]'
        return encode(content, indent=2).removesuffix("\n}") + lists + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "file") -> Self:
        """Build the object from `to_json`'s text; see `from_dict`."""
        return cls.from_dict(parse_object(source, text), source)

    def save(self, path: Path, name: str = "") -> None:
        """Write the file by `save`."""
        save(path, self.to_json(), name)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file, or raise UsageError if it cannot be read or is none."""
        return cls.from_json(read_text(path), str(path))


def read_text(path: Path, name: str = "") -> str:
    """Return the text of a file, decompressed if gzip compressed it.

    Raises:
        UsageError: if it cannot be read, is longer than `MAX_BYTES`, or is not UTF-8; the
            message has `name`, or else the path.
    """
    name = name or str(path)
    with _opened(path, name) as file:
        return decode(file.read(MAX_BYTES + 1), name)


def read_lines(
    path: Path, name: str = "", *, unfinished: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield each line's name and text as `read_text` does; `MAX_BYTES` limits a line.

    With `unfinished`, a last line without an end is left out: a cut-off run left it behind.
    """
    name = name or str(path)
    with _opened(path, name) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_BYTES + 1)
            if not line or (unfinished and not line.endswith(b"\n") and len(line) <= MAX_BYTES):
                return
            where = f"{name}, line {number}"
            yield where, decode(line, where)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[BufferedIOBase]:
    try:
        with path.open("rb") as file:
            packed = path.suffix == ".gz" or file.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=file) if packed else file
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{name} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return why a file cannot be read or written, in words."""
    return getattr(error, "strerror", None) or str(error)


def decode(content: bytes, name: str) -> str:
    """Return the text of UTF-8, without the mark that may begin it.

    Raises:
        UsageError: if it is longer than `MAX_BYTES`, or is not UTF-8; the message has `name`.
    """
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name} must have at most {MAX_BYTES:,} bytes, but has more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} cannot be read: it is not UTF-8: {error}") from error


def save(path: Path, content: str | bytes, name: str = "") -> None:
    """Write a file, and the folder it lies in; an old one stays until the new one is complete.

    Raises:
        UsageError: if it cannot be written; the message has `name`, or else the path.
    """
    with _replacing(path, name) as file:
        # Names may hold halves of characters, which no encoding has.
        file.write(content.encode(errors="replace") if isinstance(content, str) else content)


def save_lines(path: Path, lines: Iterable[str], name: str = "", *, pack: bool = False) -> None:
    """Write lines as `save` does; with `pack` compressed, the same lines to the same bytes."""
    encoded = (line.encode() + b"\n" for line in lines)
    with _replacing(path, name) as file:
        if pack:
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                packed.writelines(encoded)
        else:
            file.writelines(encoded)


@contextmanager
def _replacing(path: Path, name: str) -> Iterator[BufferedIOBase]:
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device or a pipe, or else refused
            with path.open("wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path))  # what a link names is replaced, not the link
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except BrokenPipeError:  # whoever read the pipe has read enough
        raise
    except OSError as error:
        raise UsageError(f"{name or path} cannot be written: {reason(error)}") from error
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink()
