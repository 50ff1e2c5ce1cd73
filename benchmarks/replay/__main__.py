"""Time attention with the numbers of tokens that the results of ``tsa eval`` kept.

python -m benchmarks.replay result.jsonl --own-shape --out replay.json
python -m benchmarks.replay result.jsonl --table replay.json   (measures nothing)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.command import (
    add_lists,
    add_measuring_arguments,
    make_parser,
    positive,
    run_command,
)
from benchmarks.replay.accuracy import frontier_table, join, target_of, to_dict
from benchmarks.replay.layers import ReplayOptions, Shape
from benchmarks.replay.results import Replay, replay
from rich.console import Console
from rich.markdown import Markdown

from token_sparse_attention.attention.names import BACKENDS
from token_sparse_attention.benchmark.measuring import device_named
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import EvalResults, load_results
from token_sparse_attention.info import provenance

_TABLE_WIDTH = 130
_NOT_ARGUMENTS = ("json", "out", "table")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or show what the command line names."""
    parser = make_parser("benchmarks.replay", __doc__)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="results of tsa eval"
    )
    parser.add_argument(
        "--table",
        nargs="+",
        type=Path,
        metavar="REPLAY",
        help="measure nothing: show accuracy beside the speed-up that these files hold",
    )
    add_lists(parser, {"lengths": (positive, (), "only these of the lengths in the results")})
    parser.add_argument(
        "--own-shape", action="store_true", help="measure at the evaluated model's shape too"
    )
    parser.add_argument(
        "--attention-backend",
        default="auto",
        choices=BACKENDS,
        help="which dense kernel attends (default: auto)",
    )
    parser.add_argument(
        "--share-within",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="layers share a measurement where no head's number of tokens differs by more "
        "than this share (default: 0.01)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_measuring_arguments(parser, 0.2)
    return run_command(parser, run_replay, argv)


def run_replay(args: argparse.Namespace) -> bool:
    """Measure or show a replay; return whether every check passed.

    Raises:
        UsageError: if something that was given cannot be used.
    """
    evaluations = _load(args.results)
    if args.table:
        if args.out:
            raise UsageError("--out is for a new replay; with --table nothing is measured")
        return _show(args, evaluations, [Replay.load(path) for path in args.table])
    if not args.out:
        raise UsageError("--out FILE is needed, for the measurements")
    device = device_named(args.device)
    options = ReplayOptions(
        device=device,
        dtype=getattr(torch, args.dtype),
        attention_backend=args.attention_backend,
        share_within=args.share_within,
        budget_seconds=args.budget_seconds,
    )
    about = provenance(str(device))
    asked = {name: _plain(v) for name, v in vars(args).items() if name not in _NOT_ARGUMENTS}
    asked = {"command": "benchmarks.replay", **asked}
    with Console(stderr=True).status("starting") as status:
        for points, rows in replay(
            evaluations,
            options,
            Shape(args.num_heads, args.num_kv_heads, args.head_dim),
            own_shape=args.own_shape,
            lengths=args.lengths,
            report=status.update,
        ):
            done = Replay(about, asked, tuple(points), tuple(rows))
            # After each row, so that what is cut off is not lost.
            done.save(args.out, f"--out {args.out}")
    return _show(args, evaluations, [done])


def _load(paths: Sequence[Path]) -> list[tuple[str, EvalResults]]:
    """Read results; each goes by its file's name, or by its path where names repeat."""
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return [(name, load_results(path)) for name, path in zip(names, paths)]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.name if isinstance(value, Path) else value


def _show(
    args: argparse.Namespace,
    evaluations: Sequence[tuple[str, EvalResults]],
    replays: Sequence[Replay],
) -> bool:
    rows = join(evaluations, replays)
    failures = [point for replay in replays for point in replay.failures]
    if args.json:
        content = {
            "target": target_of(replays),
            "failed_checks": len(failures),
            "rows": [to_dict(row) for row in rows],
        }
        print(json.dumps(content, indent=2))
        return not failures
    # Files and narrow terminals get whole lines.
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    console.print(f"attention of all layers at {target_of(replays)}", highlight=False)
    console.print(Markdown(frontier_table(rows)))
    for point in failures:
        console.print(
            f"[red]check failed[/]: {point.seq_len:,} tokens, kept {point.kept}: {point.note}",
            highlight=False,
        )
    return not failures


if __name__ == "__main__":
    sys.exit(main())
