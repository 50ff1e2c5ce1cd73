"""Held-out questions as text, written independently of the training samples."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from .questions import NOISE

_ASK_ONE = "What is the special magic {kind} for {key} mentioned in the provided text?"
_SAY_ONE = "The special magic {kind} for {key} mentioned in the provided text is"
_ASK_ALL = "What are all the special magic {kind} for {key} mentioned in the provided text?"
_SAY_ALL = "The special magic {kind} for {key} mentioned in the provided text are"
_INTRO_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n"
)
_INTRO_ALL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n"
)


@dataclass(frozen=True)
class Probe:
    """A prompt and the continuation that counts as right."""

    prompt: str
    answer: str
    ends: bool = False
    """Whether the end-of-text token has to follow the answer."""


@dataclass(frozen=True)
class Material:
    """What probes are made from."""

    paragraphs: list[str]
    adjectives: list[str]
    nouns: list[str]
    count: Callable[[str], int]
    """Number of tokens of a text."""


class Maker:
    """Makes probes of about one context length."""

    def __init__(self, material: Material, tokens: int, seed: int) -> None:
        self.material, self.tokens = material, tokens
        self.rng = random.Random(seed)

    def _key(self) -> str:
        material = self.material
        return f"{self.rng.choice(material.adjectives)}-{self.rng.choice(material.nouns)}"

    def _keys(self, count: int) -> list[str]:
        keys: dict[str, None] = {}
        while len(keys) < count:
            keys[self._key()] = None
        return list(keys)

    def _number(self) -> str:
        return str(self.rng.randint(1000000, 9999999))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def _prose(self, room: int) -> list[str]:
        """Paragraphs in the order of the held-out text, up to ``room`` tokens."""
        paragraphs = self.material.paragraphs
        taken: list[str] = []
        at = self.rng.randrange(len(paragraphs))
        while True:
            text = paragraphs[at % len(paragraphs)]
            room -= self.material.count(text) + 1
            if room < 0:
                return taken
            taken.append(text)
            at += 1

    def _insert(self, parts: list[str], lines: list[str]) -> list[str]:
        spots = sorted(self.rng.randint(0, len(parts)) for _ in lines)
        out = list(parts)
        for place in range(len(lines) - 1, -1, -1):
            out.insert(spots[place], lines[place])
        return out

    @staticmethod
    def _needle(kind: str, key: str, value: str) -> str:
        return f"One of the special magic {kind} for {key} is: {value}."

    def _hay(self, lines: list[str], noise: bool = False) -> str:
        room = self.tokens - 110 - sum(self.material.count(line) + 1 for line in lines)
        if noise:
            count = max(1, room // (self.material.count(NOISE) + 1))
            return "\n".join(self._insert([NOISE] * count, lines))
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(self._prose(room)))
        return " ".join(self._insert(sentences, lines))

    def _one(self, kind: str, key: str, value: str, hay: str, intro: str = _INTRO_ONE) -> Probe:
        single = kind[:-1]
        ask = _ASK_ONE.format(kind=single, key=key) + " " + _SAY_ONE.format(kind=single, key=key)
        noun = single if intro is _INTRO_ONE else kind
        return Probe(f"{intro.format(kind=noun)}{hay}\n{ask}", f" {value}")

    def marked(self) -> Probe:
        """Six marked lines between paragraphs; the whole answer sentence and its end count."""
        keys = self._keys(6)
        values = [self._number() for _ in keys]
        lines = [
            f"[needle {place}] {self._needle('numbers', key, value)}"
            for place, (key, value) in enumerate(zip(keys, values, strict=True), start=1)
        ]
        room = self.tokens - 80 - sum(self.material.count(line) + 1 for line in lines)
        document = "\n\n".join(self._insert(self._prose(room), lines))
        wanted = self.rng.randrange(6)
        question = _ASK_ONE.format(kind="number", key=keys[wanted])
        said = _SAY_ONE.format(kind="number", key=keys[wanted])
        return Probe(f"{document}\n\n{question}\n", f"{said} {values[wanted]}.", ends=True)

    def single_1(self) -> Probe:
        """One needle in the repeated noise sentence."""
        key, value = self._key(), self._number()
        hay = self._hay([self._needle("numbers", key, value)], noise=True)
        return self._one("numbers", key, value, hay)

    def single_2(self) -> Probe:
        """One needle in prose."""
        key, value = self._key(), self._number()
        return self._one("numbers", key, value, self._hay([self._needle("numbers", key, value)]))

    def single_3(self) -> Probe:
        """One needle in prose, the value a UUID."""
        key, value = self._key(), self._uuid()
        return self._one("uuids", key, value, self._hay([self._needle("uuids", key, value)]))

    def multikey_1(self) -> Probe:
        """Four needles in prose, one asked for."""
        keys = self._keys(4)
        values = [self._number() for _ in keys]
        lines = [self._needle("numbers", k, v) for k, v in zip(keys, values, strict=True)]
        return self._one("numbers", keys[0], values[0], self._hay(self._shuffled(lines)))

    def _shuffled(self, lines: list[str]) -> list[str]:
        return self.rng.sample(lines, len(lines))

    def _all_needles(self, kind: str, key: Callable[[], str], value: Callable[[], str]) -> Probe:
        pairs: dict[str, str] = {}
        lines: list[str] = []
        room = self.tokens - 160
        while room > 0:
            name = key()
            if name in pairs:
                continue
            pairs[name] = value()
            lines.append(self._needle(kind, name, pairs[name]))
            room -= self.material.count(lines[-1]) + 1
        wanted = self.rng.choice(list(pairs))
        return self._one(kind, wanted, pairs[wanted], "\n".join(lines))

    def multikey_2(self) -> Probe:
        """A haystack made of needles only."""
        return self._all_needles("numbers", self._key, self._number)

    def multikey_3(self) -> Probe:
        """A haystack made of needles only, keys and values UUIDs."""
        return self._all_needles("uuids", self._uuid, self._uuid)

    def multivalue(self) -> Probe:
        """One key with four values, all asked for, in the order of the text."""
        key = self._key()
        values = [self._number() for _ in range(4)]
        hay = self._hay([self._needle("numbers", key, value) for value in values])
        return self._several([key], values, hay)

    def multiquery(self) -> Probe:
        """Four keys asked for at once."""
        keys = self._keys(4)
        values = [self._number() for _ in keys]
        lines = [self._needle("numbers", k, v) for k, v in zip(keys, values, strict=True)]
        return self._several(keys, values, self._hay(self._shuffled(lines)))

    @staticmethod
    def _listed(items: list[str]) -> str:
        return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"

    def _several(self, keys: list[str], values: list[str], hay: str) -> Probe:
        names = self._listed(keys)
        ask = _ASK_ALL.format(kind="numbers", key=names)
        said = _SAY_ALL.format(kind="numbers", key=names)
        prompt = f"{_INTRO_ALL.format(kind='numbers')}{hay}\n{ask} {said}"
        return Probe(prompt, f" {self._listed(values)}")

    def tracking(self) -> Probe:
        """A chain of five variables in the noise sentence."""
        names = ["".join(self.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
        value = str(self.rng.randint(10000, 99999))
        sources = [value, *(f"VAR {name}" for name in names)]
        lines = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
        prompt = (
            "Memorize and track the chain(s) of variable assignment hidden in the following"
            f" text.\n\n{self._hay(lines, noise=True)}\nQuestion: Find all variables that are"
            f" assigned the value {value} in the text above. Answer: According to the chain(s)"
            " of variable assignment in the text above, 5 variables are assgined the value"
            f" {value}, they are:"
        )
        return Probe(prompt, f" {self._listed(names)}")


TASKS = (
    "marked",
    "single_1",
    "single_2",
    "single_3",
    "multikey_1",
    "multikey_2",
    "multikey_3",
    "multivalue",
    "multiquery",
    "tracking",
)
