"""The file of `tsa capture`: the tokens of a prompt, and which of them each head kept."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from token_sparse_attention.records import JsonFile, encode


@dataclass(frozen=True)
class KeptLayer:
    """What one layer kept.

    Attributes:
        masks: one bitmap per head in base64; token i is bit ``i % 8``, from the lowest, of
            byte ``i // 8``. Empty if the layer ran dense.
        dense_reason: why the layer ran dense, None if it ran sparse.
        beyond_window: whether the layer drops no query, so that these are the keys that every
            query attends to beyond its sliding window.
    """

    masks: tuple[str, ...]
    dense_reason: str | None
    beyond_window: bool = False

    def __post_init__(self) -> None:
        if bool(self.masks) == (self.dense_reason is not None):
            raise ValueError("a layer must have either masks or a dense_reason")

    def kept(self) -> list[int]:
        """Return how many tokens each head kept."""
        return [
            int.from_bytes(base64.b64decode(mask), "little").bit_count() for mask in self.masks
        ]


@dataclass(frozen=True)
class KeptText(JsonFile):
    """One prompt, and what every layer kept of it.

    Attributes:
        provenance: device, versions and commit, from `info.provenance`.
        arguments: the model, the settings and the question of the run.
        tokens: the text of each token; joined, they are the prompt.
        reply: the model's answer.
        layers: one entry per layer.
    """

    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    tokens: Annotated[tuple[str, ...], Meta(min_length=1)]
    reply: str
    layers: tuple[KeptLayer, ...]

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            for head, mask in enumerate(layer.masks):
                _check_mask(mask, len(self.tokens), f"layers[{number}].masks[{head}]")

    def to_json(self) -> str:
        """Return the file's content, on one line."""
        return encode(self) + "\n"


def _check_mask(mask: str, num_tokens: int, where: str) -> None:
    try:
        bits = base64.b64decode(mask, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{where} is not base64: {error}") from error
    surplus = int.from_bytes(bits, "little") >> num_tokens
    if len(bits) != -(-num_tokens // 8) or surplus:
        raise ValueError(
            f"{where} must hold a bit for each of {num_tokens} tokens, got {len(bits)} bytes"
        )
