"""The file of `tsa capture`: a prompt's tokens, and which of them each layer and head kept."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import check_entries

SCHEMA_VERSION = 1


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

    def kept(self) -> list[int]:
        """Return how many tokens each head kept."""
        return [
            int.from_bytes(base64.b64decode(mask), "little").bit_count() for mask in self.masks
        ]


@dataclass(frozen=True)
class KeptText:
    """One prompt, and what every layer kept of it.

    Attributes:
        provenance: device, versions and commit, of `info.provenance`.
        arguments: what was asked for: the model, the settings, the question.
        tokens: the prompt's tokens as text, which together are the prompt.
        reply: what the model answered.
        layers: one entry per layer.
        version: of this format.
    """

    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    tokens: tuple[str, ...]
    reply: str
    layers: tuple[KeptLayer, ...]
    version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the file's content."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> KeptText:
        """Build a capture from the parsed content of its file.

        Raises:
            UsageError: if it is none; the message names `source` and the entry.
        """
        check_entries(content, _KINDS, source)
        if content["version"] != SCHEMA_VERSION:
            raise UsageError(
                f"{source} must have version {SCHEMA_VERSION}, got {content['version']!r}"
            )
        tokens = content["tokens"]
        if not tokens or not all(isinstance(token, str) for token in tokens):
            raise UsageError(f"{source}: tokens must be one or more strings")
        layers = tuple(
            _read_layer(layer, len(tokens), f"{source}: layers[{index}]")
            for index, layer in enumerate(content["layers"])
        )
        fields = {**content, "tokens": tuple(tokens), "layers": layers}
        return cls(**fields)


_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "provenance": (dict,),
    "arguments": (dict,),
    "tokens": (list,),
    "reply": (str,),
    "layers": (list,),
}
_LAYER_KINDS: dict[str, tuple[type, ...]] = {
    "masks": (list,),
    "dense_reason": (str, NoneType),
    "beside_window": (bool,),
}


def _read_layer(content: Any, num_tokens: int, where: str) -> KeptLayer:
    if not isinstance(content, dict):
        raise UsageError(f"{where} must be an object, got {content!r}")
    content = {"beside_window": False, **content}  # older files do not have it
    check_entries(content, _LAYER_KINDS, where)
    masks, reason = content["masks"], content["dense_reason"]
    if bool(masks) == (reason is not None):
        raise UsageError(f"{where} must have either masks or a dense_reason")
    for head, mask in enumerate(masks):
        try:
            bits = base64.b64decode(mask, validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise UsageError(f"{where}: masks[{head}] is not base64: {error}") from error
        surplus = int.from_bytes(bits, "little") >> num_tokens
        if len(bits) != -(-num_tokens // 8) or surplus:
            raise UsageError(
                f"{where}: masks[{head}] must hold a bit for each of {num_tokens} tokens, "
                f"got {len(bits)} bytes"
            )
    return KeptLayer(tuple(masks), reason, content["beside_window"])
