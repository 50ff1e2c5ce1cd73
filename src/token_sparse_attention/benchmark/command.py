"""The ``tsa bench`` commands: arguments, progress, output. Exit codes are those of `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from token_sparse_attention.benchmark import op
from token_sparse_attention.benchmark.measuring import collect, device_named
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.benchmark.show import show
from token_sparse_attention.errors import UsageError
from token_sparse_attention.info import provenance

MakeCommand = Callable[[Any, str, str, str], argparse.ArgumentParser]  # as `cli` makes commands
_CPU_BACKENDS, _CUDA_BACKENDS = ("flash", "math"), ("fa4", "cudnn", "flash", "flex")
_PREFILL_LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)
_PREFILL_KEPT, _PREFILL_SAMPLES = (0.5, 0.35), (4096,)


def add_commands(commands: Any, make: MakeCommand) -> None:
    """Add the commands below ``tsa bench``; `make` adds one of name, summary and example."""
    operator = make(
        commands,
        "op",
        "time the operator stage by stage and against its peers",
        "tsa bench op --out benchmarks/results/op.json\n"
        "  tsa bench op --lengths 131072 --kept 0.5 --crossover-lengths ''",
    )
    prefill = make(
        commands,
        "prefill",
        "time the first token of a Llama-shaped model with random weights, dense and sparse",
        "tsa bench prefill --out benchmarks/results/prefill.json",
    )
    _add_op_arguments(operator)
    _add_prefill_arguments(prefill)
    for command, budget in ((operator, 0.2), (prefill, 5.0)):
        add_measuring_arguments(command, budget)
    operator.set_defaults(bench=_op)
    prefill.set_defaults(bench=_prefill)


DTYPES = ("bfloat16", "float16", "float32")


def add_measuring_arguments(command: argparse.ArgumentParser, budget: float) -> None:
    """Add what all commands that measure take; `budget` is the default one, in seconds."""
    command.add_argument("--device", default="auto", help="torch device (default: auto)")
    command.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of the inputs (default: bfloat16)"
    )
    heads = {
        "num_heads": ("--heads", 32, "query heads"),
        "num_kv_heads": ("--kv-heads", 8, "KV heads"),
    }
    for name, (option, default, what) in heads.items():
        command.add_argument(
            option,
            dest=name,
            type=positive,
            default=default,
            metavar="H",
            help=f"{what} (default: {default})",
        )
    command.add_argument(
        "--budget-seconds",
        type=float,
        default=budget,
        metavar="S",
        help=f"to spend on each time, as far as a few samples allow (default: {budget:g})",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="where to write the results")


def _add_op_arguments(command: argparse.ArgumentParser) -> None:
    lists: dict[str, tuple[Callable[[str], Any], tuple[Any, ...], str]] = {
        "lengths": (positive, op.LENGTHS, "prompt lengths"),
        "crossover-lengths": (
            positive,
            op.CROSSOVER_LENGTHS,
            "lengths at which the method decides, with crossover on",
        ),
        "kept": (float, op.KEPT, "shares of the tokens to keep"),
        "drop-mass": (float, op.DROP_MASS, "settings at the crossover lengths"),
    }
    _add_lists(command, lists)
    command.add_argument(
        "--head-dim", type=positive, default=128, metavar="D", help="head size (default: 128)"
    )
    command.add_argument(
        "--backends",
        type=list_of(str),
        metavar="NAMES",
        help="dense kernels, the first being the one to compare with (default: "
        f"{','.join(_CUDA_BACKENDS)}; off CUDA {','.join(_CPU_BACKENDS)})",
    )
    command.add_argument(
        "--peers-up-to",
        type=positive,
        default=131072,
        metavar="S",
        help="longest prompt for slow peers: flash, flex, eager (default: 131072)",
    )


def _add_prefill_arguments(command: argparse.ArgumentParser) -> None:
    _add_lists(
        command,
        {
            "lengths": (positive, _PREFILL_LENGTHS, "prompt lengths"),
            "kept": (float, _PREFILL_KEPT, "shares of the tokens to keep"),
            "samples": (positive, _PREFILL_SAMPLES, "numbers of samples, no queries dropped"),
        },
    )
    shape = {
        "layers": ("num_layers", 32, "layers"),
        "hidden": ("hidden_size", 4096, "hidden size"),
        "intermediate": ("intermediate_size", 14336, "hidden size of the feed-forward part"),
        "vocab": ("vocab_size", 128256, "tokens of the vocabulary"),
    }
    for name, (dest, default, what) in shape.items():
        command.add_argument(
            f"--{name}",
            dest=dest,
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} of the model (default: {default})",
        )


def _add_lists(
    command: argparse.ArgumentParser,
    lists: dict[str, tuple[Callable[[str], Any], tuple[Any, ...], str]],
) -> None:
    for name, (kind, default, what) in lists.items():
        shown = ",".join(map(str, default))
        command.add_argument(
            f"--{name}",
            type=list_of(kind),
            default=default,
            metavar="LIST",
            help=f"{what} (default: {shown})",
        )


def list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return what reads an argument of values between commas."""
    what = "numbers like 0.1,0.5" if kind is float else "whole numbers like 4096,8192"
    number = int if kind is positive else kind

    def read(text: str) -> tuple[Any, ...]:
        parts = [part for part in text.split(",") if part.strip()]
        try:
            for part in parts:
                number(part)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from error
        return tuple(kind(part) for part in parts)

    return read


def positive(text: str) -> int:
    """Read an argument that is a number from 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Read an argument that is a number from 0."""
    return _at_least(0, text)


def _at_least(minimum: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error
    if number < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
    return number


def _op(args: argparse.Namespace) -> bool:
    device = device_named(args.device)
    default = _CUDA_BACKENDS if device.type == "cuda" else _CPU_BACKENDS
    options = op.OpOptions(
        device=device,
        dtype=getattr(torch, args.dtype),
        lengths=args.lengths,
        crossover_lengths=args.crossover_lengths,
        kept=args.kept,
        drop_mass=args.drop_mass,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        backends=default if args.backends is None else args.backends,
        peers_up_to=args.peers_up_to,
        budget_seconds=args.budget_seconds,
    )
    return _measured(args, device, lambda report: op.measure(options, report))


def _prefill(args: argparse.Namespace) -> bool:
    try:
        from token_sparse_attention.benchmark import prefill
    except ImportError as error:
        raise UsageError(
            "this command needs transformers: pip install 'token-sparse-attention[transformers]'"
        ) from error
    device = device_named(args.device)
    options = prefill.PrefillOptions(
        device=device,
        dtype=getattr(torch, args.dtype),
        lengths=args.lengths,
        kept=args.kept,
        samples=args.samples,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        vocab_size=args.vocab_size,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        budget_seconds=args.budget_seconds,
    )
    return _measured(args, device, lambda report: prefill.measure(options, report))


def _measured(
    args: argparse.Namespace,
    device: torch.device,
    measure: Callable[[Callable[[str], None]], Iterator[Record]],
) -> bool:
    """Run a measurement, keeping what there is after each length, and show it."""
    about = provenance(str(device))
    left_out = ("bench", "command", "bench_command", "handler", "json", "out")
    asked = {name: value for name, value in vars(args).items() if name not in left_out}
    asked = {"command": f"tsa bench {args.bench_command}", **asked}
    asked = {name: list(v) if isinstance(v, tuple) else v for name, v in asked.items()}
    with Console(stderr=True).status("starting") as status:
        result = collect(measure(status.update), about, asked, args.out)
    if args.json:
        print(result.to_json(), end="")
    else:
        show(Run("this run", result))
    return not result.failures
