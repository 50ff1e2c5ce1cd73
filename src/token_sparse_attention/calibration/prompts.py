"""Calibration prompts: pieces of text, or prompts with the replies that should follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention.checks import check_unicode
from token_sparse_attention.errors import UsageError
from token_sparse_attention.records import convert, parse_object, read_lines
from token_sparse_attention.run import encode_prompt


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and what it then says.

    Attributes:
        ids: ``[1, S]`` token ids.
        continuation: ``[1, N]`` token ids; None for the model's own reply.
    """

    ids: Tensor
    continuation: Tensor | None = None

    @property
    def read_ids(self) -> Tensor:
        """All that the model reads: ``[1, S + N]`` token ids, N = 0 without a continuation."""
        parts = (self.ids,) if self.continuation is None else (self.ids, self.continuation)
        return torch.cat(parts, dim=1)


def text_prompts(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> list[Prompt]:
    """Cut texts into prompts of one length, taking the texts in turn.

    The pieces of a text start at equal distances, so that they overlap only where it is too
    short for all of them; a piece that reaches the end of its text goes on at its beginning.

    Args:
        tokenizer: the model's tokenizer; a token that it begins texts with begins every piece.
        texts: what to cut.
        length: tokens of each prompt.
        count: how many prompts.

    Raises:
        UsageError: if a text has no tokens.
    """
    prompts = []
    for index, text in enumerate(texts[:count]):
        with_special = tokenizer(text)["input_ids"]
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise UsageError(f"text {index + 1} must hold at least one token, but has none")
        begin = [] if with_special[0] == tokens[0] else with_special[:1]
        pieces = len(range(index, count, len(texts)))
        for piece in range(pieces):
            start = piece * len(tokens) // pieces
            own = length - len(begin)
            ids = begin + [tokens[(start + i) % len(tokens)] for i in range(own)]
            prompts.append((piece, index, Prompt(torch.tensor([ids[:length]]))))
    return [prompt for *_, prompt in sorted(prompts, key=lambda entry: entry[:2])]


def file_prompts(tokenizer: Any, path: Path, count: int | None) -> list[Prompt]:
    """Read prompts from a file with one JSON object a line.

    Each has ``"prompt"``, encoded as `run.encode_prompt` does, through the chat template if
    there is one, and may have ``"continuation"``, the text of the reply.

    Args:
        tokenizer: the model's tokenizer.
        path: the file.
        count: read this many at most; None for all.

    Raises:
        UsageError: if the file cannot be read, a line is no such object, or there is
            none.
    """
    prompts: list[Prompt] = []
    for where, line in read_lines(path, f"--prompts {path}"):
        if len(prompts) == count:
            break
        if line.strip():
            entry = convert(parse_object(where, line), _PromptLine, where)
            prompts.append(_encode(tokenizer, entry))
    if not prompts:
        raise UsageError(f"--prompts {path} must hold at least one prompt, but is empty")
    return prompts


@dataclass(frozen=True)
class _PromptLine:
    prompt: str
    continuation: str | None = None

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("continuation", self.continuation)):
            if text is not None and not text.strip():
                raise ValueError(f"{name} must be text, got {text!r}")
            check_unicode(name, text or "")


def _encode(tokenizer: Any, entry: _PromptLine) -> Prompt:
    continuation = None
    if entry.continuation is not None:
        encoded = tokenizer(entry.continuation, add_special_tokens=False, return_tensors="pt")
        continuation = encoded["input_ids"]
    return Prompt(encode_prompt(tokenizer, entry.prompt, None), continuation)
