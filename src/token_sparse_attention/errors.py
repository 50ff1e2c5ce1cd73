"""Errors that a command reports in one line, without a traceback, and what turns into them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
_NO_HOST_MEMORY = "DefaultCPUAllocator: "  # begins what PyTorch says where the host has none


class UsageError(ValueError):
    """Something that was given cannot be used; the message says what and why."""


class JobFailedError(Exception):
    """The input could be used, but the job failed; the message says why."""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what goes wrong in loading from a checkpoint into bad input.

    Raises:
        UsageError: if the block raises what loading raises.
    """
    try:
        yield
    except _LOADING_ERRORS as error:
        raise UsageError(f"{name} cannot be loaded: {error}") from error


@contextmanager
def within_memory(prompt_tokens: int, doing: str) -> Iterator[None]:
    """Turn a lack of memory, on a GPU or not, into one line.

    Args:
        prompt_tokens: length of the longest prompt.
        doing: what is run on it, in a word.

    Raises:
        JobFailedError: if the block runs out of memory.
    """
    import torch  # here, so that commands say what is wrong with their arguments at once

    try:
        yield
    except RuntimeError as error:
        lacking = isinstance(error, torch.OutOfMemoryError) or _NO_HOST_MEMORY in str(error)
        if not lacking:
            raise
        said = str(error).partition("\n")[0]
        raise JobFailedError(
            f"out of memory at {prompt_tokens:,} prompt tokens, {doing}: {said}"
        ) from error


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a question to end a message with, or nothing.

    Example:
        >>> did_you_mean("publishd", ["default", "published"])
        "; did you mean 'published'?"
    """
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
