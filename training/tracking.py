"""Two more tasks of RULER: variable tracking and the most frequent coded words."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.random import Generator

from .questions import NOISE
from .samples import ANSWER, SENTENCE, Pieces, Row, fill, prose
from .tokenizer import END_ID

_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def _names(rng: Generator, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(_LETTERS, size=5))] = None
    return list(names)


def variables(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Chains of assignments; the question asks for all the variables of one chain."""
    text = pieces.text
    newline = text("\n")
    chains = 1 if rng.random() < 0.6 else int(rng.integers(2, 5))
    hops = 4 if rng.random() < 0.6 else int(rng.integers(1, 5))
    if row.size <= 512:
        hops = min(hops, 2)
    lines: list[list[int]] = []
    order: list[int] = []
    questions = []
    for chain in range(chains):
        names = [pieces.encode(" " + name) for name in _names(rng, hops + 1)]
        digits = str(rng.integers(10000, 100000))
        source = pieces.number(digits)
        steps = []
        for name in names:
            steps.append([*text("VAR"), *name, *text(" ="), *source])
            source = [*text(" VAR"), *name]
        lines += steps
        order += [chain] * len(steps)
        values = pieces.join([list(name) for name in names])
        ask = [*text("Question: Find all variables that are assigned the value")]
        ask += [*pieces.number(digits), *text(" in the text above.")]
        start = text(
            " Answer: According to the chain(s) of variable assignment in the text above,"
            f" {len(names)} variables are assgined the value"
        )
        start = (*start, *pieces.number(digits), *text(", they are:"))
        questions.append((ask, start, values))
    mixed = rng.permutation(order)
    at = [0] * chains
    starts = [order.index(chain) for chain in range(chains)]
    sequence = []
    for chain in mixed.tolist():
        sequence.append(lines[starts[chain] + at[chain]])
        at[chain] += 1
    row.add(
        text(
            "Memorize and track the chain(s) of variable assignment hidden in the following"
            " text.\n\n"
        )
    )
    kept = [questions[i] for i in rng.permutation(len(questions))]
    tail = sum(len(part) for question in kept for part in question) + 4 * len(kept)
    budget = row.room - tail - sum(len(line) + 1 for line in sequence)
    row.add(_hide(pieces, rng, sequence, budget))
    for ask, start, value in kept:
        if row.room < len(ask) + len(start) + len(value) + 3:
            continue
        row.add([*newline, *ask])
        row.add(start, SENTENCE)
        row.add(value, ANSWER)
        row.add([END_ID], SENTENCE)
    fill(row, pieces, rng)


def _hide(pieces: Pieces, rng: Generator, lines: list[list[int]], budget: int) -> list[int]:
    """The lines, each on its own, in the noise sentence or between sentences of prose."""
    newline = pieces.text("\n")
    out: list[int] = []
    if rng.random() < 0.6:
        noise = pieces.text(NOISE)
        count = max(0, budget // (len(noise) + 1))
        spots = np.sort(rng.integers(0, count + 1, size=len(lines))).tolist()
        parts = [[*noise, *newline] for _ in range(count)] + [[]]
    else:
        text, cuts = prose(pieces, rng, max(16, budget - 2 * len(lines)))
        inner = [offset for offset, after_newline in cuts[1:-1] if not after_newline]
        spots = np.sort(rng.integers(0, len(inner) + 1, size=len(lines))).tolist()
        bounds = [0, *inner, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
        parts = [*parts, []]
    at = 0
    for place, part in enumerate(parts):
        while at < len(lines) and spots[at] == place:
            if out and out[-1] != newline[0]:
                out += newline
            out += [*lines[at], *newline]
            at += 1
        out += part
    while out and out[-1] in (newline[0], pieces.text("\n\n")[0]):
        out.pop()
    return out


def frequent(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Coded words drawn from a steep distribution; the question asks for the top three."""
    text = pieces.text
    row.add(
        text(
            "Read the following coded text and track the frequency of each coded word. Find the"
            " three most frequently appeared coded words."
        )
    )
    ask = text(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the"
        " three most frequently appeared words in the above coded text?"
    )
    start = text(
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    names = ["".join(rng.choice(_LETTERS, size=6)).lower() for _ in range(40)]
    words = [list(pieces.encode(" " + name)) for name in names]
    shares = 1.0 / np.arange(1, 41) ** 2.0
    room = row.room - len(ask) - len(start) - 40
    drawn = rng.choice(40, size=max(3, room // 3), p=shares / shares.sum()).tolist()
    counts = [0] * 40
    for word in drawn:
        if room < len(words[word]):
            break
        row.add(words[word])
        room -= len(words[word])
        counts[word] += 1
    top = sorted(range(40), key=lambda word: -counts[word])[:3]
    row.add(ask)
    row.add(start, SENTENCE)
    row.add(pieces.join([words[word] for word in top]), ANSWER)
    row.add([*text("."), END_ID], SENTENCE)
    fill(row, pieces, rng)
