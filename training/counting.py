"""RULER's counting tasks: the most frequent coded words, the most common listed words."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from .samples import ANSWER, SENTENCE, Pieces, Row, fill
from .tokenizer import END_ID
from .tracking import LETTERS

_ZETA_2 = np.pi**2 / 6


def frequent(row: Row, pieces: Pieces, rng: Generator) -> None:
    """Coded words, the k-th as often as 1/k^2; the first are dots, the next three the answer."""
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
    kinds = max(8, row.size // 50)
    names = ["".join(rng.choice(LETTERS, size=6)).lower() for _ in range(kinds - 1)]
    words = [list(text(" ...")), *(list(pieces.encode(" " + name)) for name in names)]
    room = row.room - len(ask) - len(start) - 40
    ranks = np.arange(1, kinds + 1)
    sizes = np.array([len(word) for word in words])
    total = room / float((sizes * ranks**-2.0).sum() / _ZETA_2)
    counts = (total * ranks**-2.0 / _ZETA_2).astype(int)
    for word in rng.permutation(np.repeat(np.arange(kinds), counts)).tolist():
        row.add(words[word])
    answer = [token for word in words[1:4] for token in word]
    row.add(ask)
    row.add(start, SENTENCE)
    row.add(answer, ANSWER)
    row.add([END_ID], SENTENCE)
    fill(row, pieces, rng)


def common(row: Row, pieces: Pieces, rng: Generator) -> None:
    """A numbered list in which ten words stand far more often; asked for in order of the list."""
    text = pieces.text
    row.add(
        text(
            "Below is a numbered list of words. In these words, some appear more often than"
            " others. Memorize the ones that appear most often.\n"
        )
    )
    ask = text("\nQuestion: What are the 10 most common words in the above list?\n\n")
    start = text("Answer: The top 10 words that appear most often in the list are:")
    often, seldom = (6, 1) if row.size < 4096 else (30, 3)
    room = row.room - len(ask) - len(start) - 100
    digits = len(str(room // 8))
    words: list[list[int]] = []
    spent = 0
    while True:
        pool = pieces.adjectives if rng.random() < 0.4 else pieces.nouns
        word = list(pieces.text(" " + pool[rng.integers(len(pool))]))
        spent += (len(word) + 2 + digits) * (often if len(words) < 10 else seldom)
        if spent > room:
            break
        if word not in words[:10]:
            words.append(word)
    listed = np.repeat(np.arange(len(words)), seldom)
    listed = np.concatenate([listed, np.repeat(np.arange(min(10, len(words))), often - seldom)])
    seen: dict[int, None] = {}
    for place, word in enumerate(rng.permutation(listed).tolist(), start=1):
        number = [pieces.digits[int(digit)] for digit in str(place)]
        row.add([*(pieces.space if place > 1 else ()), *number, *text("."), *words[word]])
        if word < 10:
            seen[word] = None
    answer: list[int] = []
    for place, word in enumerate(seen, start=1):
        answer += [*pieces.number(str(place)), *text("."), *words[word]]
    row.add(ask)
    row.add(start, SENTENCE)
    row.add(answer, ANSWER)
    row.add([END_ID], SENTENCE)
    fill(row, pieces, rng)
