"""Prompts made from text, of several shapes, with the answers whose tokens are compared.

Every prompt is `length` tokens of real text, less what is asked about it. What is asked lies in
the text, so that nobody needs to label anything.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from token_sparse_attention.errors import UsageError

CONTINUE, RECALL, RECALL_FIRST = "continue", "recall", "recall-first"
LOOKUP, SECOND_TURN = "lookup", "second-turn"
SHAPES = {
    CONTINUE: "the text goes on",
    RECALL: "a definition's signature, or the line after a given one; asked last",
    RECALL_FIRST: "the same, asked before the text",
    LOOKUP: "a UUID in the text, by its name",
    SECOND_TURN: "another one, asked on the cache after that",
}
CONTINUED = 256  # tokens of the text that go on
SHORTEST = 256  # tokens of a prompt
_ANSWER = 64  # most tokens of a line that is asked for
_ASKED = 96  # tokens that a question takes at most
_KEYS, _TOKENS_PER_KEY = 12, 128
_REMEMBERED = 8  # texts whose tokens are kept
_SPAN = 0.05, 0.9  # of a prompt: where what is asked for lies
_NAMES = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jetty"),
    *("knoll", "lagoon", "maple", "nectar", "otter", "prairie", "quartz", "ridge", "spruce"),
    *("tundra", "umber", "valley", "willow", "yarrow"),
)
_SIGNATURE = re.compile(
    r"^[ \t]*((?:\w+ )*(?:def|fn|func|function) (\w{4,})\([^()\n]{8,100}\)[^\n]{0,60})$", re.M
)


class Part(NamedTuple):
    """The tokens of what follows a prompt that are one answer.

    Attributes:
        shape: one of `SHAPES`.
        begin: the first token.
        end: behind the last one.
    """

    shape: str
    begin: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """What is prefilled, and what is then run on the cache in one pass.

    Attributes:
        length: tokens of the prompt, as asked for.
        index: which of the prompts of that length.
        source: name of the text.
        ids: the prompt's tokens.
        follow: the tokens that follow.
        parts: which of these are answers.
    """

    length: int
    index: int
    source: str
    ids: list[int]
    follow: list[int]
    parts: tuple[Part, ...]


class _Source(NamedTuple):
    """Text that prompts are cut from, and where its tokens begin."""

    name: str
    text: str
    starts: list[int]


class PromptMaker:
    """Makes prompts from texts.

    Args:
        tokenizer: the model's, a fast one; a token that it begins texts with begins prompts.
        texts: name -> text; short ones are read one after the other.
        seed: of what is asked.

    Raises:
        UsageError: if the tokenizer does not say which characters a token is.
    """

    def __init__(self, tokenizer: Any, texts: Mapping[str, str], seed: int = 0) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError("the tokenizer must be a fast one, which knows tokens' characters")
        self._tokenizer, self._seed = tokenizer, seed
        # Every shape reads a piece of text, and some read it several times.
        self._coded = functools.lru_cache(maxsize=_REMEMBERED)(self._encode)
        first = tokenizer("a")["input_ids"][:1]
        self._begin: list[int] = first if first == [tokenizer.bos_token_id] else []
        self._texts = [_Source(name, text, self._starts(text)) for name, text in texts.items()]

    def make(self, length: int, count: int, shapes: Sequence[str]) -> list[Prompt]:
        """Return the prompts of one length; those that share a cache are one.

        Args:
            length: tokens of each prompt.
            count: pieces of text, which are cut from the texts in turn; a prompt of every shape
                is made from each.
            shapes: of `SHAPES`.

        Raises:
            UsageError: if the texts are too short, or have nothing to ask for.
        """
        need = length + CONTINUED + length // 16 + 64
        sources = self._joined(need)
        made = []
        for index in range(count):
            source = sources[index % len(sources)]
            pieces = len(range(index % len(sources), count, len(sources)))
            room = len(source.starts) - need
            if pieces > room + 1:
                raise UsageError(
                    f"--pieces must be at most {(room + 1) * len(sources)} where {source.name} is "
                    f"cut into {length:,} tokens, got {count}"
                )
            start = (index // len(sources)) * room // max(pieces - 1, 1)
            piece = _Piece(self, source.name, length, index)
            made += piece.prompts(source.text, source.starts[start : start + need], shapes)
        return made

    def ids(self, text: str) -> list[int]:
        """Return a text's tokens, without any that begins texts."""
        return list(self._coded(text)[0])

    def cut(self, text: str, tokens: int) -> tuple[list[int], str]:
        """Return so many of a text's first tokens, as tokens and as text."""
        ids, spans = self._coded(text)
        return ids[:tokens], text[: spans[tokens - 1][1] if tokens <= len(ids) else None]

    def started(self, ids: list[int]) -> list[int]:
        """Return a prompt's tokens with the one that begins texts."""
        return self._begin + ids

    def random(self, *about: object) -> random.Random:
        """Return what draws, for one purpose."""
        return random.Random(f"{self._seed} {about}")

    def _starts(self, text: str) -> list[int]:
        return [start for start, _ in self._encode(text)[1]]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and which characters each of them is."""
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return coded["input_ids"], coded["offset_mapping"]

    def _joined(self, need: int) -> list[_Source]:
        """Return the texts, joined with the next until each has so many tokens."""
        joined: list[_Source] = []
        held: _Source | None = None
        for source in self._texts:
            if held is not None:
                text = f"{held.text}\n\n{source.text}"
                source = _Source(f"{held.name} ...", text, self._starts(text))
            held = source
            if len(source.starts) >= need:
                joined.append(source)
                held = None
        if not joined:
            found = 0 if held is None else len(held.starts)
            raise UsageError(
                f"--text must hold at least {need:,} tokens for these --lengths, but holds "
                f"{found:,}; take more text or shorter prompts"
            )
        return joined


@dataclass(frozen=True)
class _Piece:
    """A piece of text, from which a prompt of every shape is made."""

    maker: PromptMaker
    source: str
    length: int
    index: int

    def prompts(self, whole: str, starts: list[int], shapes: Sequence[str]) -> list[Prompt]:
        """Return the prompts of some shapes."""
        begin = starts[0]
        if begin:  # a line's begin, if it is near
            line = whole.find("\n", begin, starts[len(starts) // 32]) + 1
            begin = line or begin
        text = whole[begin : starts[-1]]
        made = []
        if CONTINUE in shapes:
            made.append(self._continue(text))
        if RECALL in shapes or RECALL_FIRST in shapes:
            made += self._recall(text, shapes)
        if LOOKUP in shapes or SECOND_TURN in shapes:
            made.append(self._lookup(text, shapes))
        return made

    def _continue(self, text: str) -> Prompt:
        ids = self.maker.started(self.maker.ids(text))
        follow = ids[self.length : self.length + CONTINUED]
        return self._prompt(ids[: self.length], follow, [Part(CONTINUE, 0, len(follow))])

    def _recall(self, text: str, shapes: Sequence[str]) -> list[Prompt]:
        maker = self.maker
        draw = maker.random(RECALL, self.length, self.index)
        question, line = ask_for_line(
            _within(maker.cut(text, self.length - _ASKED)[1]), text, draw
        )
        answer = maker.ids(line)[:_ANSWER]
        made = []
        for shape in (RECALL, RECALL_FIRST):
            if shape not in shapes:
                continue
            if shape == RECALL:
                ids = self._filled("", text, f"\n\nQuestion: {question}\nAnswer:\n")
            else:
                head = f"Question about the text below: {question}\n\n"
                ids = self._filled(head, text, "\n\nAnswer to the question:\n")
            made.append(self._prompt(ids, answer, [Part(shape, 0, len(answer))]))
        return made

    def _lookup(self, text: str, shapes: Sequence[str]) -> Prompt:
        maker = self.maker
        draw = maker.random(LOOKUP, self.length, self.index)
        names = draw.sample(_NAMES, max(min(_KEYS, self.length // _TOKENS_PER_KEY), 2))
        keys = {name: str(uuid.UUID(int=draw.getrandbits(128), version=4)) for name in names}
        comment = "# " if _SIGNATURE.search(text) else ""
        facts = [f"{comment}The registration key of {n} is {key}." for n, key in keys.items()]
        room = self.length - _ASKED - len(maker.ids("\n".join(facts)))
        kept, lines = len(maker.cut(text, max(room, 1))[1].splitlines()), text.splitlines()
        low, high = _SPAN
        for number, fact in reversed([*enumerate(facts)]):
            depth = low + (high - low) * (number + draw.random()) / len(facts)
            lines.insert(int(depth * kept), fact)
        text = "\n".join(lines)
        span = maker.cut(text, self.length - _ASKED)[1]
        there = [name for name, fact in zip(names, facts) if fact in span]
        if len(there) < 2:
            raise UsageError(
                f"--lengths must leave room for two lines with a key; leave out {LOOKUP} and "
                f"{SECOND_TURN} of --shapes, or {self.length}"
            )
        first, second = draw.sample(there, 2)
        ids = self._filled("", text, f"\n\n{_ask_for_key(first)}")
        answer, again = maker.ids(f" {keys[first]}"), maker.ids(f" {keys[second]}")
        parts = [Part(LOOKUP, 0, len(answer))] if LOOKUP in shapes else []
        follow = list(answer)
        if SECOND_TURN in shapes:
            follow += maker.ids(f".\n\n{_ask_for_key(second)}")
            parts.append(Part(SECOND_TURN, len(follow), len(follow) + len(again)))
            follow += again
        return self._prompt(ids, follow, parts)

    def _filled(self, head: str, text: str, tail: str) -> list[int]:
        """Return a prompt of the length: as much of the text as fits between head and tail."""
        before = self.maker.started(self.maker.ids(head) if head else [])
        after = self.maker.ids(tail)
        room = self.length - len(before) - len(after)
        return before + self.maker.cut(text, room)[0] + after

    def _prompt(self, ids: list[int], follow: list[int], parts: list[Part]) -> Prompt:
        return Prompt(self.length, self.index, self.source, ids, follow, tuple(parts))


def _ask_for_key(name: str) -> str:
    return (
        f"Question: What is the registration key of {name}?\n"
        f"Answer: The registration key of {name} is"
    )


def _within(text: str) -> str:
    """Return the part of a prompt's text in which what is asked for lies."""
    low, high = (int(len(text) * share) for share in _SPAN)
    return text[low:high]


def ask_for_line(span: str, text: str, draw: random.Random) -> tuple[str, str]:
    """Return a question about a line, and the line that answers it.

    Args:
        span: the part of the text to ask about.
        text: all of it, in which the question has one answer.
        draw: chooses.

    Raises:
        UsageError: if there is no such line.
    """
    defined = [(m[1], m[2]) for m in _SIGNATURE.finditer(span)]
    defined = [(line, name) for line, name in defined if text.count(f" {name}(") == 1]
    if defined:
        line, name = draw.choice(defined)
        return f"Which line of the text defines `{name}`?", line
    lines = [line.strip() for line in span.splitlines()[1:-1] if line.strip()]
    pairs = [(one[:100], other) for one, other in itertools.pairwise(lines) if len(other) >= 12]
    long = [pair for pair in pairs if len(pair[0]) >= 24]
    draw.shuffle(long)
    for begins, other in long:
        if text.count(begins) == 1:
            return f"Which line of the text follows the one that begins so?\n{begins}", other
    raise UsageError(
        f"--text must have lines that are there once, of 24 characters and more, to ask for what "
        f"follows; leave out {RECALL} and {RECALL_FIRST} of --shapes"
    )
