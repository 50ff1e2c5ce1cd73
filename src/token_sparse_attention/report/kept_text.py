"""The file of `tsa capture`: a prompt's tokens, and which of them each layer and head kept."""

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
        masks: one bitmap per head in base64: token i is bit ``i % 8``, from the lowest, of
            byte ``i // 8``. Empty where the layer ran dense.
        dense_reason: why it ran dense, None where it did not.
        beside_window: whether these are the tokens that every query sees besides its window,
            in a layer that selects no queries.
    """

    masks: tuple[str, ...]
    dense_reason: str | None
    beside_window: bool = False

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
        provenance: device, versions and commit, of `info.provenance`.
        arguments: what was asked for: the model, the settings, the question.
        tokens: the prompt's tokens as text, which together are the prompt.
        reply: what the model answered.
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
