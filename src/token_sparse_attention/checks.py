"""Checks of what a command is given, before anything long runs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from token_sparse_attention.errors import UsageError


def check_unicode(name: str, text: str) -> None:
    """Raise UsageError, which begins with `name`, if a text holds half of a character.

    JSON can write such halves (surrogates), and arguments that are not UTF-8 are read as some;
    no tokenizer takes them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UsageError(
            f"{name} must be Unicode text, but holds half a character, {half!r}"
        ) from error


def check_apart(outputs: Mapping[str, Path | None], inputs: Iterable[str | Path]) -> None:
    """Raise before a job if a file that it reads, or writes already, would be replaced.

    Args:
        outputs: option -> the file that it has written, None for none.
        inputs: the files that are read.

    Raises:
        UsageError: if one is an input or another output.
    """
    taken = {os.path.realpath(path): "is read" for path in inputs}
    for option, path in outputs.items():
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue  # a device has room for all
        place = os.path.realpath(path)
        if place in taken:
            raise UsageError(f"{option} {path} must be another file: this one {taken[place]}")
        taken[place] = f"is for {option}"


def check_writable(path: Path, name: str) -> None:
    """Make the folder of a file; raise before a long job if its result could not be written.

    Raises:
        UsageError: if the file cannot be written; the message begins with `name`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        exists = path.exists()
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise UsageError(f"{name} cannot be written: it is a folder")
    if exists and not path.is_file():  # a device or a pipe
        if not os.access(path, os.W_OK):
            raise UsageError(f"{name} cannot be written: no permission")
        return
    trial = Path(os.path.realpath(path)).with_name(f".{secrets.token_hex(8)}.part")
    try:  # whoever may do everything may not write everywhere
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}") from error
