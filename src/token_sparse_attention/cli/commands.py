"""All commands of `tsa`, one module each, and the parser of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
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
