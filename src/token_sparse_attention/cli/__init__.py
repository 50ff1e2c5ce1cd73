"""The `tsa` command: how it begins and how it ends; `commands` has what it does.

Little is imported before `main` can tell an error or an interrupt in one line.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from token_sparse_attention.cli import interrupts
from token_sparse_attention.errors import JobFailedError, UsageError, one_line

TRACEBACK = "TSA_TRACEBACK"  # environment variable: let unforeseen errors end in a traceback
SUCCESS, FAILED, BAD_INPUT = 0, 1, 2  # exit codes
BROKEN_PIPE, INTERRUPTED = 141, 130  # those of processes that SIGPIPE and SIGINT end
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of files that are not saved


def script() -> NoReturn:
    """Be the process `tsa`: `main`, which signals end at any moment."""
    interrupts.install()
    try:
        code = main()
    except KeyboardInterrupt as late:  # while the end was told
        code = _told(late)
    finally:
        interrupts.leave_at_once()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except (OSError, ValueError):  # was told, or cannot be told
                _discard(stream)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Every error is one line on standard error. What no code foresaw is one too, and with the
    environment variable ``TSA_TRACEBACK`` a traceback.
    """
    try:
        _prepare_streams()
        try:
            from token_sparse_attention.cli.commands import parse

            succeeded = parse(argv).run()
        finally:  # after a help too, while an error can be told
            sys.stdout.flush()
    except SystemExit as error:  # of argparse, or of rich where nobody reads
        if isinstance(error.__context__, BrokenPipeError):
            return BROKEN_PIPE
        raise
    except (Exception, KeyboardInterrupt) as error:
        return _told(error)
    return SUCCESS if succeeded else FAILED


def _told(error: BaseException) -> int:
    """Say what ended a command; return the exit code."""
    signalled = interrupts.exit_code()
    if signalled or isinstance(error, KeyboardInterrupt):  # libraries may have turned it
        said = "; ".join(["interrupted", *getattr(error, "__notes__", ())])
        return _say(said, signalled or INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # whoever read the output has read enough
        _discard(sys.stdout)
        return BROKEN_PIPE
    if isinstance(error, (UsageError, JobFailedError)):
        return _say(error, BAD_INPUT if isinstance(error, UsageError) else FAILED)
    if os.environ.get(TRACEBACK):
        raise error
    if isinstance(error, OSError) and error.errno in _UNWRITTEN:
        _discard(sys.stdout)
        return _say(f"standard output cannot be written: {error.strerror}", FAILED)
    said = f"unexpected {type(error).__name__}: {error} (with {TRACEBACK}=1 a traceback)"
    return _say(said, FAILED)


def _prepare_streams() -> None:
    """See that all output can be written, in an encoding without some characters as well."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # for as long as the process lives  # noqa: SIM115
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(message: object, code: int) -> int:
    with suppress(OSError):  # nobody can be told
        print(f"tsa: {one_line(message)}", file=sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Let what is still to be written go nowhere, so that the interpreter's end is quiet."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
