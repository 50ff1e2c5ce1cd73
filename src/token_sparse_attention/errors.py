"""Errors that a command reports in one line, without a traceback, and what turns into them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOADING_ERRORS = (
    OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError,
    ImportError,
)  # fmt: skip
_LOADERS = ("huggingface_hub", "safetensors", "tokenizers")  # have errors of their own kinds
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST, _END = 2000, 500  # characters of a message, and of its end
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
    except Exception as error:
        own = type(error).__module__.partition(".")[0] in _LOADERS or type(error) is Exception
        if not (own or isinstance(error, _LOADING_ERRORS)):
            raise
        raise UsageError(f"{name} cannot be loaded: {error}") from error


@contextmanager
def tokenizing(what: str = "the tokenizer") -> Iterator[None]:
    """Turn whatever a checkpoint's tokenizer or chat template raises into bad input.

    Raises:
        UsageError: if the block raises anything.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what} failed: {error}") from error


@contextmanager
def running(name: str, doing: str) -> Iterator[None]:
    """Turn what goes wrong in running a model into bad input, or into a failed job.

    Args:
        name: the model.
        doing: what is done with it: ``"run sparse"``.

    Raises:
        UsageError: if the block finds that its arguments do not fit.
        JobFailedError: if the block fails on its way.
    """
    try:
        yield
    except (UsageError, BrokenPipeError):
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} cannot be {doing}: {error}") from error
    except (RuntimeError, LookupError, OSError) as error:
        raise JobFailedError(f"{name} could not be {doing}: {error}") from error


@contextmanager
def resumable(job: str, out: Path | None) -> Iterator[None]:
    """Say of a job that fails, or is interrupted, where the same command goes on.

    Args:
        job: what it is: ``"the evaluation"``.
        out: the file of its results, None for none.

    Raises:
        JobFailedError: if the block fails on its way.
    """
    keeps = f"{out} keeps what was finished, and the same command goes on from there"
    try:
        yield
    except BrokenPipeError:
        raise
    except (RuntimeError, LookupError, OSError) as error:
        raise JobFailedError(f"{job} failed: {error}{f'; {keeps}' if out else ''}") from error
    except KeyboardInterrupt as interrupt:
        if out is not None:
            interrupt.add_note(keeps)
        raise


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


def one_line(message: object) -> str:
    """Return a message without line breaks and control characters; of a very long one both ends.

    Example:
        >>> one_line("not found:\\n  no such file\\n")
        'not found: no such file'
    """
    line = " ".join(str(message).split())
    line = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", line)  # no colours, no bells
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST - _END]} ... {line[-_END:]}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a question to end a message with, or nothing.

    Example:
        >>> did_you_mean("publishd", ["default", "published"])
        "; did you mean 'published'?"
    """
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
