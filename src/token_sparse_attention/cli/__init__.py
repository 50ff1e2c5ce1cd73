"""The `tsa` command: one module for each of its commands."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import token_sparse_attention
from token_sparse_attention.cli.bench_op import BenchOp
from token_sparse_attention.cli.bench_prefill import BenchPrefill
from token_sparse_attention.cli.calibrate import Calibrate
from token_sparse_attention.cli.capture import Capture
from token_sparse_attention.cli.command import Command, Parser
from token_sparse_attention.cli.demo import Demo
from token_sparse_attention.cli.eval import Eval
from token_sparse_attention.cli.fidelity import Fidelity
from token_sparse_attention.cli.generate import add_arguments, build
from token_sparse_attention.cli.info import Info
from token_sparse_attention.cli.report import Report
from token_sparse_attention.cli.run import Run
from token_sparse_attention.errors import JobFailedError, UsageError, one_line

TRACEBACK = "TSA_TRACEBACK"  # environment variable: let unforeseen errors end in a traceback
SUCCESS, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of files that are not saved
COMMANDS: tuple[type[Command], ...] = (
    *(Run, Demo, Fidelity, Calibrate, Eval, Report, Capture, Info),
)
BENCHMARKS: tuple[type[Command], ...] = (BenchOp, BenchPrefill)


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="tsa",
        description="Token Sparse Attention: faster long-context prefill without training.",
        example='tsa demo\ntsa run --prompt-file report.txt --question "Who signed?" --compare',
    )
    version = f"%(prog)s {token_sparse_attention.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = _subcommands(parser, COMMANDS)
    bench = commands.add_parser(
        "bench",
        help="measure the operator or the first token of a model",
        description="Measure the operator or the first token of a model.",
        example="tsa bench op --lengths 8192 --out results.json",
    )
    _subcommands(bench, BENCHMARKS)
    return parser


def _subcommands(parser: Parser, commands: Sequence[type[Command]]) -> Any:
    below = parser.add_subparsers(required=True, metavar="COMMAND", help="its --help says more")
    for command in commands:
        summary = (command.__doc__ or "").partition("\n")[0]
        made = below.add_parser(
            command.name,
            help=summary[0].lower() + summary[1:].removesuffix("."),
            description=summary,
            example=command.example,
        )
        add_arguments(made, command)
        made.set_defaults(command=command)
    return below


def parse(argv: Sequence[str] | None = None) -> Command:
    """Return the command that is asked for, with its options."""
    values = vars(build_parser().parse_args(argv))
    made: Command = build(values.pop("command"), values)
    return replace(made, asked={name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Every error is one line on standard error. What no code foresaw is one too, and with the
    environment variable ``TSA_TRACEBACK`` a traceback.
    """
    try:
        _prepare_streams()
        try:
            succeeded = parse(argv).run()
        finally:  # after a help too, while an error can be told
            sys.stdout.flush()
    except UsageError as error:
        return _say(error, BAD_INPUT)
    except JobFailedError as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has read enough
        _discard_output()
        return FAILED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        if isinstance(error, OSError) and error.errno in _UNWRITTEN:
            _discard_output()
            return _say(f"standard output cannot be written: {error.strerror}", FAILED)
        said = f"unexpected {type(error).__name__}: {error} (with {TRACEBACK}=1 a traceback)"
        return _say(said, FAILED)
    return SUCCESS if succeeded else FAILED


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
    print(f"tsa: {one_line(message)}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Let what is still to be written go nowhere, so that the interpreter's end is quiet."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
