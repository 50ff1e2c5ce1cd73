"""Worker processes that keep the training fed with batches of equally long rows."""

from __future__ import annotations

import multiprocessing as mp
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from . import counting, questions, samples, tracking
from .samples import Pieces, Row

_MAKERS = {
    "retrieval": questions.retrieval,
    "variables": tracking.variables,
    "frequent": counting.frequent,
    "common": counting.common,
    "table": samples.table,
    "repeats": samples.repeats,
    "language": samples.language,
}
TASKS = tuple(_MAKERS)
LONGEST = 140_000
"""How far the positions of a short row are spread at most."""


@dataclass
class Batch:
    """Rows of equal length."""

    tokens: np.ndarray
    """Token ids, int32 [rows, length]."""
    classes: np.ndarray
    """Loss class of each token, uint8 [rows, length]."""
    positions: np.ndarray
    """Positions for RoPE, int32 [rows, length]."""
    tasks: np.ndarray
    """Index into ``TASKS``, one per row."""


def shares(length: int) -> list[float]:
    """How often each task is sampled for rows of this length, in the order of ``TASKS``."""
    if length <= 512:
        return [0.37, 0.03, 0.0, 0.0, 0.25, 0.25, 0.10]
    if length <= 2048:
        return [0.57, 0.09, 0.04, 0.05, 0.08, 0.10, 0.07]
    return [0.61, 0.13, 0.05, 0.06, 0.03, 0.06, 0.06]


def make_row(task: str, length: int, pieces: Pieces, rng: Generator) -> Row:
    """One row of exactly ``length`` tokens."""
    row = Row(length)
    _MAKERS[task](row, pieces, rng)
    del row.tokens[length:], row.classes[length:]
    return row


def make_batch(pieces: Pieces, rng: Generator, length: int, tokens: int) -> Batch:
    """A batch of ``tokens`` tokens."""
    chosen = rng.choice(len(TASKS), size=tokens // length, p=shares(length))
    rows = [make_row(TASKS[task], length, pieces, rng) for task in chosen]
    share = 0.3 if length <= 512 else 0.6
    return Batch(
        np.array([row.tokens for row in rows], dtype=np.int32),
        np.array([row.classes for row in rows], dtype=np.uint8),
        np.stack([samples.positions(rng, length, share, LONGEST) for _ in rows]),
        chosen.astype(np.uint8),
    )


def sample_length(rng: Generator, length: int) -> int:
    """Mostly the stage's length; at times a shorter one, so that nothing is forgotten."""
    if length >= 1024 and rng.random() < 0.25:
        return int(512 << rng.integers(0, int(np.log2(length // 512)) + 1))
    return length


def _work(data: Path, tokens: int, seed: int, length: Any, queue: Any, stop: Event) -> None:
    pieces = Pieces(data)
    rng = np.random.default_rng(seed)
    while not stop.is_set():
        queue.put(make_batch(pieces, rng, sample_length(rng, length.value), tokens))


class Feed:
    """Batches made by worker processes."""

    def __init__(self, data: Path, tokens: int, workers: int, seed: int, length: int) -> None:
        context = mp.get_context("fork")
        self._length = context.Value("i", length)
        self._queue = context.Queue(maxsize=2 * workers)
        self._stop = context.Event()
        self._workers = [
            context.Process(
                target=_work,
                args=(data, tokens, seed + n, self._length, self._queue, self._stop),
                daemon=True,
            )
            for n in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def set_length(self, length: int) -> None:
        """Ask for rows of another length from now on."""
        self._length.value = length

    @property
    def waiting(self) -> int:
        """How many batches are ready."""
        return int(self._queue.qsize())

    def next(self) -> Batch:
        """The next batch."""
        batch: Batch = self._queue.get(timeout=120)
        return batch

    def close(self) -> None:
        """End the workers."""
        self._stop.set()
        for worker in self._workers:
            worker.terminate()
