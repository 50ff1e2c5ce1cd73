"""Guesses at how a reply goes on, so that one forward pass can confirm many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NGRAMS = (4, 3, 2)  # how many of the last tokens are looked up, longest first
_LOOKED_UP = 24  # tokens copied from where they were found


def propose(tokens: Sequence[int], drafts: Sequence[Sequence[int]], prompt: Tensor) -> list[int]:
    """Return tokens that may follow: of a draft with the same start, else copied from the prompt.

    Models that answer from a long prompt copy much of it, right or wrong; looking the last
    tokens up there guesses that (prompt lookup decoding).

    Args:
        tokens: the reply so far, at least one.
        drafts: replies that may be right.
        prompt: ``[S]`` token ids on the CPU.
    """
    for draft in drafts:
        if len(draft) > len(tokens) and list(draft[: len(tokens)]) == list(tokens):
            return list(draft[len(tokens) :])
    text = torch.cat((prompt, torch.tensor(tokens, dtype=prompt.dtype)))
    for size in _NGRAMS:
        if len(text) <= size:
            continue
        # The last occurrence before the text's own end.
        windows = text[:-1].unfold(0, size, 1)
        found = (windows == text[-size:]).all(1).nonzero()
        if len(found):
            begin = int(found[-1]) + size
            copied: list[int] = text[begin : begin + _LOOKED_UP].tolist()
            return copied
    return []
