"""Variable tracking, in RULER's words and, with a worked example before it, in lm-eval's."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.random import Generator

from .questions import NOISE
from .samples import ANSWER, SENTENCE, Pieces, Row, fill, prose
from .tokenizer import END_ID

LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_NOISE_PARTS = (
    "The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)


def _names(rng: Generator, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(LETTERS, size=5))] = None
    return list(names)


def variables(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Chains of assignments; the question asks for all the variables of one chain."""
    if row.size >= 1024 and rng.random() < 0.5:
        _with_example(row, pieces, rng)
    else:
        _plain(row, pieces, rng)


def _plain(row: Row, pieces: Pieces, rng: Generator) -> None:
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
    row.add(text(_INTRO))
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


def _example(rng: Generator) -> str:
    """A short solved task, its noise cut into sentences, as lm-eval puts it first."""
    names = ["".join(rng.choice(LETTERS, size=3)) for _ in range(5)]
    digits = str(rng.integers(10000, 100000))
    sentences = [part for _ in range(5) for part in (*_NOISE_PARTS, "\n")]
    lines = _chain(names, digits)
    spots = np.sort(rng.choice(len(sentences), size=len(lines), replace=False)).tolist()
    for place, (spot, line) in enumerate(zip(spots, lines, strict=True)):
        sentences.insert(spot + place, line)
    hay = " ".join(sentences).replace(". \n", ".\n")
    return f"{_INTRO}{hay}{_ask(digits)}{_say(digits)}  {' '.join(names)}\n\n\n\n"


def _chain(names: list[str], digits: str) -> list[str]:
    first = f"VAR {names[0]} = {digits}"
    return [first, *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]


def _ask(digits: str) -> str:
    return (
        f"\nQuestion: Find all variables that are assigned the value {digits} in the text above."
    )


def _say(digits: str) -> str:
    return (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables"
        f" are assgined the value {digits}, they are:"
    )


def _with_example(row: Row, pieces: Pieces, rng: Generator) -> None:
    """The task as lm-eval writes it: lines run on in the noise, names without commas."""
    names = _names(rng, 5)
    digits = str(rng.integers(10000, 100000))
    ask, say = pieces.encode(_ask(digits)), pieces.encode(_say(digits))
    answer = pieces.encode("".join(f" {name}" for name in names))
    row.add(pieces.encode(_example(rng) + _INTRO))
    noise = [*pieces.text(NOISE), *pieces.text("\n")]
    later = [*pieces.text(" " + NOISE), *pieces.text("\n")]
    lines = [pieces.encode(f" {line.rstrip()}") for line in _chain(names, digits)]
    spent = sum(len(line) + 3 for line in lines) + len(ask) + len(say) + len(answer) + 8
    count = max(1, (row.room - spent) // len(later))
    spots = np.sort(rng.integers(0, count + 1, size=len(lines))).tolist()
    hay: list[int] = []
    at = 0
    for place in range(count + 1):
        while at < len(lines) and spots[at] == place:
            line = lines[at] if hay else pieces.encode(pieces.tokenizer.decode(lines[at])[1:])
            hay += [*line, *(pieces.text(" ") if at else ())]
            at += 1
        if place < count:
            hay += later if hay else noise
    if hay[-1] == noise[-1]:  # newlines are one piece
        hay.pop()
        ask = pieces.encode("\n" + _ask(digits))
    row.add(hay)
    row.add(ask)
    row.add(say, SENTENCE)
    row.add(answer, ANSWER)
    row.add([END_ID], SENTENCE)
    fill(row, pieces, rng)
