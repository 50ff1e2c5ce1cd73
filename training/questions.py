"""Question-answering samples in RULER's formats: needles."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from .samples import (
    ANSWER,
    SENTENCE,
    Ids,
    Pieces,
    Row,
    fill,
    key_ids,
    prose,
    random_keys,
    random_number,
    random_uuid,
)
from .tokenizer import END_ID

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_MARKS = (
    ("[needle {}]", ""),
    ("[needle {}]", ""),
    ("[{}]", ""),
    ("({})", ""),
    ("{}.", ""),
    ("*", ""),
    ("-", ""),
    (">", ""),
    ("#", ""),
    ("NOTE:", ""),
    ("Note {}:", ""),
    ("[note]", ""),
    (">>>", " <<<"),
    ("==", " =="),
    ("**", " **"),
    ("[needle]", ""),
    ("Remember:", ""),
)


class _Needles:
    """The needles of one row: keys, their values, and how they are written."""

    def __init__(self, pieces: Pieces, rng: Generator, kind: str, several: bool) -> None:
        self.pieces, self.rng, self.kind, self.several = pieces, rng, kind, several
        self.keys: list[list[int]] = []
        self.values: list[list[list[int]]] = []
        self.lines: list[tuple[int, list[int], list[int]]] = []
        self.uuid_keys = kind == "uuids" and rng.random() < 0.5
        self.marked = rng.random() < 0.5
        self.stock: list[str] = []

    def _value(self) -> list[int]:
        if self.kind == "uuids":
            return list(self.pieces.encode(" " + random_uuid(self.rng)))
        if self.kind == "words":
            return key_ids(self.pieces, random_keys(self.pieces, self.rng, 1)[0])
        digits = 7 if self.rng.random() < 0.9 else int(self.rng.integers(4, 9))
        return self.pieces.number(random_number(self.rng, digits))

    def _key(self) -> list[int]:
        if self.uuid_keys:
            return list(self.pieces.encode(" " + random_uuid(self.rng)))
        if not self.stock:
            self.stock = random_keys(self.pieces, self.rng, 64)
            if self.keys:
                known = {tuple(key) for key in self.keys}
                self.stock = [
                    key for key in self.stock if tuple(key_ids(self.pieces, key)) not in known
                ]
        return key_ids(self.pieces, self.stock.pop())

    def grow(self) -> int:
        """Add one key with its values; the number of tokens that its lines take."""
        count = int(self.rng.integers(2, 5)) if self.several and self.rng.random() < 0.5 else 1
        self.keys.append(self._key())
        text = self.pieces.text
        size = 0
        for value in [self._value() for _ in range(count)]:
            body = [*text(f" of the special magic {self.kind} for"), *self.keys[-1]]
            body += [*text(" is"), *text(":"), *value, *text(".")]
            self.lines.append((len(self.keys) - 1, value, body))
            size += len(body) + 4
        return size

    def shuffle(self) -> list[Ids]:
        """Put the lines in a random order; answers list a key's values in that order."""
        self.lines = [self.lines[i] for i in self.rng.permutation(len(self.lines))]
        self.values = [[] for _ in self.keys]
        for key, value, _ in self.lines:
            self.values[key].append(value)
        return [body for _, _, body in self.lines]

    def at_line(self, body: Ids, newline: Ids) -> list[int]:
        """A needle as a line of its own."""
        text = self.pieces.text
        if self.marked and self.rng.random() < 0.8:
            before, after = _MARKS[self.rng.integers(len(_MARKS))]
            before = before.format(int(self.rng.integers(1, 30)))
            return [*text(before), *text(" One"), *body, *text(after), *newline]
        return [*text("One"), *body, *newline]

    def in_text(self, body: Ids) -> list[int]:
        """A needle as a sentence inside a paragraph."""
        return [*self.pieces.text(" One"), *body]

    def question(self, wanted: list[int], style: int) -> tuple[list[int], list[int], list[int]]:
        """Question, start of the answer, and the values, for some of the keys."""
        text = self.pieces.text
        names = self.pieces.join([self.keys[key] for key in wanted])
        values = [value for key in wanted for value in self.values[key]]
        one = len(values) == 1
        kind = self.kind[:-1] if one else self.kind
        verb, every = ("is", "") if one else ("are", " all")
        ask = [*text("\n" if style else "\n\n")]
        ask += [*text(f"What {verb}{every} the special magic {kind} for"), *names]
        ask += [*text(" mentioned in the provided text?"), *(() if style else text("\n"))]
        start = [*text(f"{' ' if style else ''}The special magic {kind} for"), *names]
        start += text(f" mentioned in the provided text {verb}")
        return ask, start, self.pieces.join(values)


def _ask(found: _Needles, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """The questions of a row, no key asked twice."""
    rng = found.rng
    order = rng.permutation(len(found.keys)).tolist()
    style = int(rng.random() < 0.5)
    asked: list[tuple[list[int], list[int], list[int]]] = []
    while order and len(asked) < count:
        several = 1
        if rng.random() < 0.15 and found.kind == "numbers":
            several = int(rng.integers(2, 5))
        wanted = [order.pop() for _ in range(min(several, len(order)))]
        asked.append(found.question(wanted, style))
    return asked


def retrieval(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Needles in prose, in the noise sentence, or among other needles."""
    size = row.size
    mix = [0.82, 0.1, 0.08] if size <= 2048 else [0.72, 0.22, 0.06]
    kind = str(rng.choice(["numbers", "uuids", "words"], p=mix))
    dense = 0.5 if size <= 512 or kind == "uuids" else 0.25
    hay = str(rng.choice(["needles", "prose", "noise"], p=[dense, 0.82 - dense, 0.18]))
    found = _Needles(pieces, rng, kind, several=rng.random() < 0.15)
    per_question = 120 if kind == "uuids" else 62
    most = max(1, size // (4 * per_question) if size > 512 else size // (2 * per_question))
    asked = int(rng.integers((most + 1) // 2, most + 1))
    asked = min(asked, 32 if size <= 16384 else 64)
    spent = found.grow()
    limit = size - asked * per_question - 60
    if hay == "needles":
        while spent < limit - 60:
            spent += found.grow()
    else:
        target = int(np.exp(rng.uniform(0, np.log(max(2, min(128, size // 48))))))
        while len(found.keys) < target and spent < 0.7 * limit:
            spent += found.grow()
    lines = found.shuffle()
    questions = _ask(found, asked)
    tail = sum(len(part) for question in questions for part in question) + 3 * len(questions)
    intro: tuple[int, ...] = ()
    if rng.random() < 0.5:
        plural = len(questions[0][2]) > 12 or len(found.keys) > 1
        noun = found.kind if plural else found.kind[:-1]
        intro = pieces.text(
            f"{'Some' if plural else 'A'} special magic {noun} {'are' if plural else 'is'} hidden"
            " within the following text. Make sure to memorize it. I will quiz you about the"
            f" {noun} afterwards.\n"
        )
    row.add(intro)
    row.add(_context(found, lines, hay, row.room - tail))
    for ask, start, value in questions:
        if row.room < len(ask) + len(start) + len(value) + 2:
            continue
        row.add(ask)
        row.add(start, SENTENCE)
        row.add(value, ANSWER)
        row.add([*pieces.text("."), END_ID], SENTENCE)
    fill(row, pieces, rng)


def _context(found: _Needles, lines: list[Ids], hay: str, budget: int) -> list[int]:
    """The haystack with the needle lines in it, in the given order."""
    pieces, rng = found.pieces, found.rng
    newline = pieces.text("\n")
    out: list[int] = []
    if hay == "needles":
        for body in lines:
            out += found.at_line(body, newline) if out else [*pieces.text("One"), *body, *newline]
        return out[: -len(newline)]
    written = sum(len(body) + 4 for body in lines)
    if hay == "noise":
        noise = pieces.text(NOISE)
        count = max(1, (budget - written) // (len(noise) + 1))
        spots = np.sort(rng.integers(0, count + 1, size=len(lines))).tolist()
        at = 0
        for place in range(count + 1):
            while at < len(lines) and spots[at] == place:
                out += [*pieces.text("One"), *lines[at], *newline]
                at += 1
            if place < count:
                out += [*noise, *newline]
        return out[: -len(newline)]
    text, cuts = prose(pieces, rng, max(32, budget - written))
    spots = np.sort(rng.integers(0, len(cuts), size=len(lines))).tolist()
    before = 0
    paragraph = pieces.text("\n\n")
    for body, spot in zip(lines, spots, strict=True):
        offset, after_newline = cuts[spot]
        out += text[before:offset]
        before = offset
        if after_newline or not out:
            out += found.at_line(body, paragraph)
        elif out[-1] in (newline[0], paragraph[0]):
            out += found.at_line(body, newline)
        elif rng.random() < 0.6:
            out += found.in_text(body)
        else:
            out += [*newline, *found.at_line(body, newline)]
    out += text[before:]
    while out and out[-1] in (newline[0], paragraph[0]):
        out.pop()
    return out
