"""Prepared samples: prompts, how to generate, and the documents that replies are scored by.

They travel in a file of their own, because the machine that generates need not have lm-eval.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import check_entries

SCHEMA_VERSION = 1
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
class SampleSet:
    """Samples, and where they come from.

    Attributes:
        lm_eval: version of lm-eval that made them.
        tokenizer: whose tokens the lengths count.
        chat_template: whether prompts went through the tokenizer's chat template.
        seed: which of the possible samples were drawn.
        lengths: what was asked for.
        limit: samples per task and length, at most.
        tasks: task -> its version.
        samples: shortest lengths first.
        version: of this format.
    """

    lm_eval: str
    tokenizer: str
    chat_template: bool
    seed: int
    lengths: list[int]
    limit: int
    tasks: dict[str, Any]
    samples: Sequence[Sample] = field(repr=False)
    version: int = SCHEMA_VERSION

    def digest(self) -> str:
        """Return a hash of all content, by which a result names the samples it is about."""
        hashed = hashlib.sha256()
        for line in self._lines():
            hashed.update(line)
        return hashed.hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, compressed; the same samples give the same bytes.

        Raises:
            UsageError: if it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                path.open("wb") as raw,
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
            ):
                for line in self._lines():
                    file.write(line)
        except OSError as error:
            raise UsageError(f"--samples {path} cannot be written: {error}") from error

    def _lines(self) -> list[bytes]:
        header = {name: getattr(self, name) for name in _HEADER_KINDS}
        entries = [header, *(vars(sample) for sample in self.samples)]
        return [json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries]

    @classmethod
    def load(cls, path: Path) -> SampleSet:
        """Read a file that `save` wrote.

        Raises:
            UsageError: if it cannot be read or is none; the message names the line.
        """
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                entries = [json.loads(line) for line in file]
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UsageError(f"--samples {path} cannot be read: {error}") from error
        if not entries:
            raise UsageError(f"--samples {path} must begin with a header, but is empty")
        header, *rest = (_checked(entry, path, number) for number, entry in enumerate(entries, 1))
        return cls(samples=[Sample(**entry) for entry in rest], **header)


_HEADER_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "lm_eval": (str,),
    "tokenizer": (str,),
    "chat_template": (bool,),
    "seed": (int,),
    "lengths": (list,),
    "limit": (int,),
    "tasks": (dict,),
}
_SAMPLE_KINDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "length": (int,),
    "index": (int,),
    "prompt": (str,),
    "until": (list,),
    "max_new_tokens": (int,),
    "doc": (dict,),
}


def _checked(entry: Any, path: Path, number: int) -> dict[str, Any]:
    where = f"--samples {path}, line {number}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be a JSON object, got {type(entry).__name__}")
    if number == 1 and entry.get("version") != SCHEMA_VERSION:
        raise UsageError(
            f"{where}: version must be {SCHEMA_VERSION}, got {entry.get('version')!r}"
        )
    check_entries(entry, _HEADER_KINDS if number == 1 else _SAMPLE_KINDS, where)
    return entry
