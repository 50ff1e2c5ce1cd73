"""What the studies' commands share: arguments, exit codes, records with a progress line.

Exit codes: 0 success, 1 a check failed, 2 bad arguments or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import EMPTY, Table, build
from token_sparse_attention.benchmark.measuring import collect
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.errors import UsageError
from token_sparse_attention.info import provenance

DTYPES = ("bfloat16", "float16", "float32")
Measure = Callable[[Callable[[str], object]], Iterator[Record]]


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m NAME``, whose module's docstring holds an example."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(
    parser: argparse.ArgumentParser,
    handler: Callable[[argparse.Namespace], bool],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command and return its exit code; `handler` says whether every check passed."""
    args = parser.parse_args(argv)
    try:
        return 0 if handler(args) else 1
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def positive(text: str) -> int:
    """Read an argument that is a number from 1."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return what reads an argument of values between commas."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(",") if part.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be numbers, got {text!r}") from error

    return read


def add_lists(
    parser: argparse.ArgumentParser,
    lists: Mapping[str, tuple[Callable[[str], Any], tuple[Any, ...], str]],
) -> None:
    """Add arguments of values between commas: how one is read, the default, what they are."""
    for name, (kind, default, what) in lists.items():
        shown = ",".join(map(str, default)) or "none"
        parser.add_argument(
            f"--{name}",
            type=list_of(kind),
            default=default,
            metavar="LIST",
            help=f"{what} (default: {shown})",
        )


def add_measuring_arguments(parser: argparse.ArgumentParser, budget: float) -> None:
    """Add device, shape, time and output; `budget` is the default one, in seconds."""
    parser.add_argument("--device", default="auto", help="torch device (default: auto)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the inputs (default: bfloat16)"
    )
    for option, name, default, what in (
        ("--heads", "num_heads", 32, "query heads"),
        ("--kv-heads", "num_kv_heads", 8, "KV heads"),
        ("--head-dim", "head_dim", 128, "head size"),
    ):
        parser.add_argument(
            option,
            dest=name,
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=budget,
        metavar="S",
        help=f"to spend on each time, as far as a few samples allow (default: {budget:g})",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the results")


def op_options(args: argparse.Namespace) -> OpOptions:
    """Return the shape, device and time that `add_measuring_arguments` and ``--lengths`` read."""
    return OpOptions(
        device=args.device,
        dtype=args.dtype,
        lengths=args.lengths,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        budget_seconds=args.budget_seconds,
    )


def measured(
    args: argparse.Namespace, command: str, measure: Measure, tables: Mapping[str, Table]
) -> bool:
    """Measure, keep what there is after each length, and print tables; whether checks passed.

    Args:
        args: what was asked for; its `device` and `out` are read here.
        command: what the result file is to call the command.
        measure: yields the records, and tells its argument what it is doing.
        tables: what to print, by name.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    asked = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(args).items()}
    asked = {"command": command} | {n: v for n, v in asked.items() if n != "out"}
    about = provenance(str(args.device))
    with Console(stderr=True).status("starting") as status:
        result = collect(measure(status.update), about, asked, args.out)
    console = Console()
    for name in tables:
        table = build(name, [Run("this run", result)], tables)
        if table.strip() != EMPTY:
            console.print(f"[bold]{name}[/]", Markdown(table))
    for failed in result.failures:
        console.print(f"[red]check failed[/]: {failed.name} at {failed.seq_len:,}: {failed.note}")
    return not result.failures
