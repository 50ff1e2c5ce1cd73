"""Training samples, built from token pieces rather than from text.

Every piece starts and ends where the tokenizer cuts (see ``tokenizer.py``), so joining pieces
gives exactly the tokens of the joined text, thousands of times faster than encoding it.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from tokenizers import Tokenizer

from .tokenizer import END_ID, load

TEXT, SENTENCE, REPEAT, ANSWER = 0, 1, 2, 3
"""Loss classes of a token: running text, answer sentence, repeated segment, answer."""

Ids = Sequence[int]


class Pieces:
    """The prose and the words, encoded once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Tokenizer = load(folder)
        self.prose = np.load(folder / "prose.npy", mmap_mode="r")
        cuts = np.load(folder / "cuts.npy")
        self.cuts = cuts[:, 0]
        self.after_newline = cuts[:, 1].astype(bool)
        words = json.loads((folder / "words.json").read_text("utf-8"))
        self.adjectives: list[str] = words["adjectives"]
        self.nouns: list[str] = words["nouns"]
        self.text = functools.lru_cache(maxsize=200_000)(self.encode)
        self.space = self.text(" ")
        self.digits = [self.text(str(d))[0] for d in range(10)]

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that is not worth keeping; ``text`` keeps what it encodes."""
        return tuple(self.tokenizer.encode(text).ids)

    def number(self, digits: str) -> list[int]:
        """A number with the space before it."""
        return [*self.space, *(self.digits[int(d)] for d in digits)]

    def join(self, items: Sequence[Ids]) -> list[int]:
        """Items as in "a, b, and c"; each item carries the space before it."""
        out = list(items[0])
        for place, item in enumerate(items[1:], start=2):
            out += self.text(",")
            if place == len(items):
                out += self.text(" and")
            out += item
        return out


@dataclass
class Row:
    """One training row while it grows."""

    size: int
    tokens: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def add(self, ids: Ids, kind: int = TEXT) -> None:
        """Append tokens of one loss class."""
        self.tokens.extend(ids)
        self.classes.extend([kind] * len(ids))

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.size - len(self.tokens)


def random_number(rng: Generator, digits: int = 7) -> str:
    """A number without a leading zero."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def random_uuid(rng: Generator) -> str:
    """A version 4 UUID."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def random_keys(pieces: Pieces, rng: Generator, count: int) -> list[str]:
    """Distinct adjective-noun keys; in a third of the rows many share a word."""
    adjectives, nouns = pieces.adjectives, pieces.nouns
    keys: dict[str, None] = {}
    small = rng.random() < 0.33
    side = int(np.ceil(np.sqrt(count))) + 3
    some_a = [adjectives[i] for i in rng.integers(len(adjectives), size=side)]
    some_n = [nouns[i] for i in rng.integers(len(nouns), size=side)]
    while len(keys) < count:
        if small and rng.random() < 0.7:
            keys[f"{some_a[rng.integers(side)]}-{some_n[rng.integers(side)]}"] = None
        else:
            first = adjectives[rng.integers(len(adjectives))]
            keys[f"{first}-{nouns[rng.integers(len(nouns))]}"] = None
    return list(keys)


def key_ids(pieces: Pieces, key: str) -> list[int]:
    """A key with the space before it."""
    if len(key) == 36 and key.count("-") == 4:
        return list(pieces.encode(" " + key))
    first, second = key.split("-")
    return [*pieces.text(" " + first), *pieces.text("-"), *pieces.text(second)]


def prose(pieces: Pieces, rng: Generator, size: int) -> tuple[list[int], list[tuple[int, bool]]]:
    """At most ``size`` tokens of prose between two cuts, and the cuts inside.

    A cut is (offset, whether a newline stands before it).
    """
    last = int(np.searchsorted(pieces.cuts, len(pieces.prose) - size - 1))
    first = int(rng.integers(last))
    start = int(pieces.cuts[first])
    stop = int(np.searchsorted(pieces.cuts, start + size, side="right")) - 1
    stop = max(stop, first)
    tokens = pieces.prose[start : int(pieces.cuts[stop])].tolist()
    offsets = (pieces.cuts[first : stop + 1] - start).tolist()
    return tokens, list(zip(offsets, pieces.after_newline[first : stop + 1].tolist(), strict=True))


def fill(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Fill the rest of a row with prose, the last sentence cut off."""
    if row.room <= 0:
        del row.tokens[row.size :], row.classes[row.size :]
        return
    start = int(pieces.cuts[rng.integers(len(pieces.cuts) - 4000)])
    row.add(pieces.prose[start : start + row.room].tolist())


def repeats(row: Row, pieces: Pieces, rng: Generator) -> None:
    """A segment, something else, and the segment again, as often as it fits."""
    vocabulary = pieces.tokenizer.get_vocab_size()
    while row.room > 40:
        length = int(rng.integers(12, max(14, min(row.room // 3, 400))))
        if rng.random() < 0.4:
            segment = rng.integers(2, vocabulary, size=length).tolist()
        else:
            start = int(rng.integers(len(pieces.prose) - length))
            segment = pieces.prose[start : start + length].tolist()
        between = int(rng.integers(0, row.room - 2 * length + 1))
        other = int(rng.integers(len(pieces.prose) - between))
        row.add(segment)
        row.add(pieces.prose[other : other + between].tolist())
        row.add(segment[:4])
        row.add(segment[4:], REPEAT)
        if rng.random() < 0.3:
            break
    fill(row, pieces, rng)


def table(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Lines of "key: number", then the same lines in another order."""
    count = max(2, row.size // 36)
    digits = int(rng.integers(3, 8))
    newline, colon = pieces.text("\n"), pieces.text(":")
    entries: list[tuple[list[int], list[int]]] = []
    for key in random_keys(pieces, rng, count):
        key_piece = key_ids(pieces, key)
        value = pieces.number(random_number(rng, digits))
        if row.room < (len(key_piece) + len(value) + 2) * (len(entries) + 2):
            break
        entries.append((key_piece, value))
    for key_piece, value in entries:
        row.add([*key_piece, *colon, *value, *newline])
    for place in rng.permutation(len(entries)):
        key_piece, value = entries[place]
        if row.room < len(key_piece) + len(value) + 2:
            break
        row.add([*key_piece, *colon])
        row.add(value, ANSWER)
        row.add(newline)
    row.add([END_ID])
    fill(row, pieces, rng)


def language(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Plain prose."""
    fill(row, pieces, rng)


def positions(rng: Generator, size: int, share: float, longest: int) -> np.ndarray:
    """Positions of a row; in ``share`` of the rows with jumps, up to ``longest`` in all."""
    steps = np.ones(size, dtype=np.int64)
    steps[0] = 0
    if rng.random() < share and longest > size:
        extra = int(np.exp(rng.uniform(np.log(size), np.log(longest)))) - size // 2
        jumps = int(np.exp(rng.uniform(0, np.log(32))))
        places = rng.integers(1, size, size=jumps)
        np.add.at(steps, places, (rng.dirichlet(np.ones(jumps)) * extra).astype(np.int64))
    return np.cumsum(steps).astype(np.int32)
