"""Checks of what a command is given, before anything long runs."""

from __future__ import annotations

import os
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
    device = exists and not path.is_file()
    if not os.access(path if device else path.parent, os.W_OK):
        raise UsageError(f"{name} cannot be written: no permission")
