"""What every command is: options that are its arguments, an example, and what it does."""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, Self

from token_sparse_attention.errors import did_you_mean, one_line
from token_sparse_attention.options import HIDDEN

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_TABLE_WIDTH = 80  # columns that tables have at least
_INTERVAL = 10.0  # seconds between two lines of progress in a log
_WRONG_WORD = re.compile(r"(?:invalid choice: '|unrecognized arguments: (?=-))([\w-]+)")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Do something.

    Attributes:
        json: print one JSON object instead
        asked: every argument's value, JSON-ready, as result files record it.
    """

    name: ClassVar[str]
    example: ClassVar[str]
    json: bool = False
    asked: Annotated[Mapping[str, Any], HIDDEN] = field(default_factory=dict)

    def run(self) -> bool:
        """Do it; return whether the job succeeded.

        Raises:
            UsageError: if something that was given cannot be used.
            JobFailedError: if the job failed.
        """
        raise NotImplementedError

    def asked_but(self, *names: str) -> dict[str, Any]:
        """Return `asked` without some arguments."""
        return {name: value for name, value in self.asked.items() if name not in (*names, "json")}


class Parser(argparse.ArgumentParser):
    """Reads arguments; an error is one line, with the nearest word to a wrong one."""

    def __init__(self, *, example: str, **settings: Any) -> None:
        lines = "\n  ".join(example.splitlines())
        super().__init__(
            epilog=f"example:\n  {lines}\n\n"
            "exit codes: 0 success, 1 the job failed, 2 bad arguments or input, 130 interrupted\n"
            "Errors are text on stderr, with --json too.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read all arguments; none may be unknown."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write a message; argparse says nothing where a help cannot be written."""
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line on standard error."""
        wrong = _WRONG_WORD.search(message)
        words = re.findall(r"[\w-]+", message.partition("choose from")[2] or self.format_usage())
        hint = did_you_mean(wrong[1], words) if wrong else ""
        said = one_line(f"{self.prog}: {message}{hint} (usage: {self.prog} --help)")
        self.exit(2, f"{said}\n")


def output() -> Console:
    """Return standard output; in a narrow terminal, lines wrap but tables keep their content."""
    from rich.console import Console

    return Console(width=max(Console().width, _TABLE_WIDTH))


def _terminal() -> Console | None:
    """Return standard error as a terminal; None without rich, or if no line can change in it."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _text(message: str) -> Text:
    """Return a message in which nothing is markup."""
    from rich.text import Text

    return Text(message)


class Progress:
    """Says on standard error what takes a while: in one line that changes on a terminal.

    Elsewhere, as in a log, each message takes a line, at most one in `_INTERVAL` seconds.
    """

    def __init__(self, message: str) -> None:
        console = _terminal()
        self._status = None if console is None else console.status(_text(message))
        self._message = message
        self._shown_at = -_INTERVAL
        self._timer: threading.Timer | None = None

    def update(self, message: str) -> None:
        """Say what is done now."""
        if self._status is not None:
            self._status.update(_text(message))
            return
        self._message = message
        wait = self._shown_at + _INTERVAL - time.monotonic()
        if wait <= 0:
            self._show()
        elif self._timer is None:
            self._timer = threading.Timer(wait, self._show_late)
            self._timer.daemon = True
            self._timer.start()

    def _show(self) -> None:
        self._shown_at, self._timer = time.monotonic(), None
        tell(self._message)

    def _show_late(self) -> None:
        with suppress(BrokenPipeError):  # the next message raises it where it can be told
            self._show()

    def __enter__(self) -> Self:
        if self._status is None:
            self._show()
        else:
            self._status.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._status is not None:
            self._status.stop()
        elif self._timer is not None:
            self._timer.cancel()


def working(message: str) -> Progress:
    """Return a context that says on standard error that something takes a while."""
    return Progress(message)


@contextmanager
def counting(total: int) -> Iterator[Callable[[str, int], None]]:
    """Show how many of `total` are done: a bar on a terminal, lines as `Progress` elsewhere.

    Yields:
        Takes what is done now, and how many are done.
    """
    console = _terminal()
    if console is None:
        with working(f"0 of {total}: starting") as lines:
            yield lambda what, done: lines.update(f"{done} of {total}: {what}")
        return
    from rich import progress as rich

    text = rich.TextColumn("{task.description}", markup=False)
    columns = (text, rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def tell(message: str) -> None:
    """Say something on standard error; a full disk under a log is no reason to stop.

    Raises:
        BrokenPipeError: if nobody reads it, which ends a command.
    """
    try:
        print(f"tsa: {one_line(message)}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        return


def warn(message: str) -> None:
    """Say on standard error what the user should know."""
    tell(f"warning: {message}")


def note(message: str) -> None:
    """Say on standard error what was decided for the user; ``--dtype`` and such override it."""
    tell(f"note: {message}")


def print_json(content: Mapping[str, Any]) -> None:
    """Print what ``--json`` asks for."""
    print(json.dumps(content, indent=2))
