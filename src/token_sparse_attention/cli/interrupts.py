"""SIGINT and SIGTERM: a command ends at once, in one line, and leaves no half-written file."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

_SAID = b"tsa: interrupted\n"
_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"  # where a spinner had hidden it
_received: int | None = None


def exit_code() -> int | None:
    """Return the exit code of the signal that arrived, None if none did."""
    return None if _received is None else 128 + _received


def install() -> None:
    """Let signals raise KeyboardInterrupt, so that files are finished or removed.

    What libraries would swallow ends the process at once: an interrupt of an import, some of
    which take every error for a missing library, and one in a finalizer. So does the second one.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as with nohup and in background jobs
            signal.signal(number, _raise)
    sys.unraisablehook = _unraisable


def leave_at_once() -> None:
    """Let signals end the process without anything else, as nothing is left to finish."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_DFL if _received is None else signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    global _received
    again, _received = _received is not None, number
    if again or _imports(frame):
        _leave()
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def _unraisable(what: Any) -> None:
    if _received is not None:
        _leave()
    sys.__unraisablehook__(what)


def _leave() -> NoReturn:
    if "multiprocessing" in sys.modules:
        import multiprocessing

        for worker in multiprocessing.active_children():
            worker.terminate()
    with suppress(OSError):
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + _SAID)
    os._exit(exit_code() or 1)
