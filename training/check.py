"""Check that rows joined from token pieces equal the tokens of the joined text."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .batches import TASKS, make_row
from .samples import Pieces
from .tokenizer import END_ID

_LENGTHS = (256, 512, 2048, 4096)
_UNCHECKED = {"repeats", "language"}
"""Tasks whose rows may start or stop inside a word."""


def count_differences(pieces: Pieces, rows: int, seed: int) -> tuple[int, int]:
    """Texts that encode to other tokens than their row has, and texts in all.

    A row is compared up to its last end-of-text token; the prose that fills it is cut off.
    """
    rng = np.random.default_rng(seed)
    different, texts = 0, 0
    for length in _LENGTHS:
        for task in TASKS:
            if task in _UNCHECKED:
                continue
            for _ in range(rows):
                tokens = np.array(make_row(task, length, pieces, rng).tokens)
                ends = np.flatnonzero(tokens == END_ID)
                for part in np.split(tokens, ends)[:-1]:
                    wanted = part[part != END_ID].tolist()
                    got = pieces.tokenizer.encode(pieces.tokenizer.decode(wanted)).ids
                    different += got != wanted
                    texts += 1
    return different, texts


def main() -> None:
    """Compare, and fail if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m training.check",
        description="Check that training rows equal the tokens of their text.",
        epilog="example: python -m training.check --data build/model/data",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared data")
    parser.add_argument("--rows", type=int, default=50, help="rows per task and length")
    args = parser.parse_args()
    different, texts = count_differences(Pieces(args.data), args.rows, seed=5)
    print(f"{different} of {texts} texts differ")
    raise SystemExit(int(different > 0))


if __name__ == "__main__":
    main()
