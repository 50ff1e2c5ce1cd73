"""Prepared samples: prompts, how to generate, and the documents that replies are scored by.

They travel in a file of their own, because the machine that generates need not have lm-eval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from token_sparse_attention.checks import check_unicode
from token_sparse_attention.errors import UsageError
from token_sparse_attention.records import (
    Versioned,
    convert,
    encode,
    parse_object,
    read_lines,
    save_lines,
)

_SLICE = "prompt_slice"
_SHORTEST_SLICE = 200  # characters; shorter texts are not worth a reference


@dataclass(frozen=True)
class Sample:
    """One prompt, and what its reply is scored by.

    Attributes:
        task: lm-eval's name of the task.
        length: the length the task was built for, in tokens; 0 if the task sets none.
        index: which of the task's samples of that length.
        prompt: what the model reads.
        until: texts that end a reply and are no part of it.
        max_new_tokens: the longest reply.
        doc: lm-eval's document as `pack_doc` gives it.
    """

    task: str
    length: int
    index: int
    prompt: str
    until: list[str]
    max_new_tokens: int
    doc: dict[str, Any]

    def __post_init__(self) -> None:
        check_unicode("prompt", self.prompt)

    def unpack_doc(self) -> dict[str, Any]:
        """Return lm-eval's document."""
        return {name: self._unpack(value) for name, value in self.doc.items()}

    def _unpack(self, value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {_SLICE}:
            first, end = value[_SLICE]
            return self.prompt[first:end]
        return value


def pack_doc(doc: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Return a document whose long texts refer to the prompt where they occur in it.

    Example:
        >>> pack_doc({"context": "ab" * 200, "answer": "7"}, "Read: " + "ab" * 200)
        {'context': {'prompt_slice': [6, 406]}, 'answer': '7'}
    """
    packed: dict[str, Any] = {}
    for name, value in doc.items():
        at = -1
        if isinstance(value, str) and len(value) >= _SHORTEST_SLICE:
            at = prompt.find(value)
        packed[name] = value if at < 0 else {_SLICE: [at, at + len(value)]}
    return packed


@dataclass(frozen=True)
class SampleHeader(Versioned):
    """Where samples come from.

    Attributes:
        lm_eval: version of lm-eval that made them.
        tokenizer: whose tokens the lengths count.
        chat_template: whether prompts went through the tokenizer's chat template.
        seed: which of the possible samples were drawn.
        lengths: what was asked for.
        limit: samples per task and length, at most.
        tasks: task -> its version.
    """

    lm_eval: str
    tokenizer: str
    chat_template: bool
    seed: int
    lengths: list[int]
    limit: int
    tasks: dict[str, Any]


@dataclass(frozen=True)
class SampleSet(SampleHeader):
    """Samples, and where they come from, as in `SampleHeader`.

    Attributes:
        samples: shortest lengths first.
    """

    samples: Sequence[Sample] = field(repr=False)

    def digest(self) -> str:
        """Return a hash of all content, by which a result names the samples it is about."""
        hashed = hashlib.sha256()
        for line in self._lines():
            hashed.update(line.encode() + b"\n")
        return hashed.hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, compressed; the same samples give the same bytes.

        Raises:
            UsageError: if it cannot be written.
        """
        save_lines(path, self._lines(), f"--samples {path}", pack=True)

    def _lines(self) -> Iterator[str]:
        header = self.to_dict()
        samples = header.pop("samples")
        yield encode(header)
        yield from map(encode, samples)

    @classmethod
    def load(cls, path: Path) -> SampleSet:
        """Read a file that `save` wrote.

        Raises:
            UsageError: if it cannot be read or is none; the message names the line.
        """
        lines = read_lines(path, f"--samples {path}")
        where, line = next(lines, ("", None))
        if line is None:
            raise UsageError(f"--samples {path} must begin with a header, but is empty")
        header = SampleHeader.from_dict(parse_object(where, line), where)
        entries = {entry.name: getattr(header, entry.name) for entry in fields(header)}
        samples = [convert(parse_object(where, text), Sample, where) for where, text in lines]
        return cls(**entries, samples=samples)
