"""Time tile choices of the block-sparse kernels, each checked against the default's result.

    python -m benchmarks.block_sparse.tune --length 131072 --only product mass

Needs a CUDA device; about 5 seconds per choice, most of it compiling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from benchmarks.block_sparse import kernel as block_sparse
from benchmarks.block_sparse.inputs import random_mask, structured_inputs
from benchmarks.command import make_parser, run_command
from torch import Tensor

from token_sparse_attention.benchmark.checks import Inputs, random_inputs
from token_sparse_attention.benchmark.timing import kernel_times
from token_sparse_attention.kernels import estimation, estimation_antidiagonal, scoring

PRODUCT = [
    estimation_antidiagonal.Tiles(*sizes)
    for sizes in (
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
    )
]
STATISTICS = scoring.Tiles(128, 64, 8, 3, 264)
MASS = [
    (STATISTICS, estimation.Tiles(*sizes))
    for sizes in ((64, 8, 2, 528), (64, 4, 2, 528), (64, 4, 3, 1056), (128, 8, 2, 528))
]
PLAIN = [block_sparse.Tiles(*sizes) for sizes in ((64, 8, 3), (64, 8, 2), (128, 8, 2), (64, 4, 3))]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per choice: milliseconds, and how far the result is from the first's."""
    parser = make_parser("benchmarks.block_sparse.tune", __doc__)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--only", nargs="*", default=["product", "mass", "plain"])
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    device = torch.device("cuda")
    inputs = structured_inputs(random_inputs(args.length, 32, 8, 128, device, torch.bfloat16))
    kinds = {"product": _products, "mass": _masses, "plain": _plain}
    for kind in args.only:
        first = None
        for name, call in kinds[kind](inputs):
            try:
                out = call().float()
                first = out if first is None else first
                apart = float((out - first).norm() / first.norm())
                taken = kernel_times([call], device, 0.2)[0]
            except Exception as error:  # a choice may not fit the device
                print(kind, name, type(error).__name__, str(error)[:100], flush=True)
                continue
            print(
                f"{kind} {name}: {taken.median_ms:.3f} ms "
                f"({taken.low_ms:.3f} to {taken.high_ms:.3f}, {taken.kind}), apart {apart:.1e}",
                flush=True,
            )
    return True


def _products(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    query, key, _ = inputs
    for tiles in PRODUCT:
        yield (
            f"stride 8, {tuple(tiles)}",
            partial(
                estimation_antidiagonal.antidiagonal_scores,
                *(query, key, 8, (128, 128), inputs.scale),
                tiles=tiles,
            ),
        )


def _masses(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for tiles in MASS:
        mass = partial(
            estimation.last_query_mass, inputs.query, inputs.key, 128, inputs.scale, tiles=tiles
        )
        yield f"128 queries, {tuple(tiles[1])}", partial(_second, mass)


def _second(call: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    return call()[1]


def _plain(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    mask, _ = random_mask(inputs, 0.2)
    lists = (mask.partial_count, mask.partial_index), (mask.full_count, mask.full_index)
    for tiles in PLAIN:
        yield (
            f"density 0.2, {tuple(tiles)}",
            partial(
                block_sparse.attend_block_lists,
                *(*inputs, *lists, mask.grid.block_size, inputs.scale),
                tiles=tiles,
            ),
        )


if __name__ == "__main__":
    sys.exit(main())
