"""Attention backends as text: the name of a dense kernel, or a pattern with its settings.

A pattern's settings that are not its defaults follow its name as JSON:
``xattention:{"stride":16}``. So a backend fits into a command line, a result file and the
arguments of PyTorch's operator.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Sequence

import torch

from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.records import parse_object

BACKENDS = ("auto", "fa4", "flash", "cudnn", "efficient", "math")


def parse_backend(backend: str | PatternConfig) -> str:
    """Return a backend's one string form.

    Args:
        backend: a dense kernel's name, a pattern's name, that name with settings as JSON after
            a colon, or the settings themselves.

    Raises:
        TypeError: if it is neither text nor settings of a pattern, or a setting has the wrong
            type.
        ValueError: if the name or a setting is unknown, or out of range. Where torch.compile
            traces the call, text is checked when the operator runs.

    Example:
        >>> from token_sparse_attention.attention.patterns.xattention import XAttentionConfig
        >>> parse_backend(XAttentionConfig(stride=16))
        'xattention:{"stride":16}'
        >>> parse_backend('xattention:{"stride": 8}')
        'xattention'
    """
    if torch.compiler.is_compiling():  # which cannot trace JSON: the operator parses when it runs
        if not isinstance(backend, str):
            raise TypeError(
                "attention_backend must be text where torch.compile traces it; make it of the "
                "settings before, by parse_backend(settings)"
            )
        return backend
    return _canonical(backend) if isinstance(backend, str) else _text(backend)


def pattern_config(backend: str) -> PatternConfig | None:
    """Return the settings of the pattern that a string form names, None for a dense kernel."""
    return None if backend in BACKENDS else _read(backend)


@functools.lru_cache(maxsize=1024)
def backend_of_layer(backend: str, layer: int, num_layers: int) -> str:
    """Return what a backend is in one of a model's layers.

    Settings that name layers give that layer's; any other backend is the same in all.

    Args:
        backend: a string form.
        layer: the layer's number, from 0.
        num_layers: how many layers the model has.

    Raises:
        ValueError: if the settings name another number of layers.
    """
    config = pattern_config(backend)
    if config is None:
        return backend
    return _text(PATTERNS[pattern_name(config)].of_layer(config, layer, num_layers))


def backends_of_layers(backend: str, num_layers: int, num_heads: int) -> tuple[str, ...]:
    """Return `backend_of_layer` for each layer, checked against the number of query heads.

    Raises:
        ValueError: if the settings name another number of layers, or of heads in some layer.
    """
    backends = tuple(backend_of_layer(backend, layer, num_layers) for layer in range(num_layers))
    for layer, text in enumerate(backends):
        config = pattern_config(text)
        if config is not None:
            name = pattern_name(config)
            try:
                PATTERNS[name].of_heads(config, range(num_heads), num_heads)
            except ValueError as error:
                raise ValueError(f"attention_backend {name!r}, layer {layer}: {error}") from error
    return backends


def _text(config: PatternConfig) -> str:
    name = pattern_name(config)
    plain = PATTERNS[name].config()
    changed = {
        field: value
        for field, value in dataclasses.asdict(config).items()
        if value != getattr(plain, field)
    }
    if not changed:
        return name
    return f"{name}:{json.dumps(changed, sort_keys=True, separators=(',', ':'))}"


def pattern_name(config: PatternConfig) -> str:
    """Return the name of the pattern that settings are of; TypeError if there is none."""
    for name, pattern in PATTERNS.items():
        if type(config) is pattern.config:
            return name
    raise TypeError(
        "attention_backend must be a name or the settings of a pattern, got "
        f"{type(config).__name__}"
    )


@functools.lru_cache(maxsize=256)
def _canonical(text: str) -> str:
    return text if text in BACKENDS or text in PATTERNS else _text(_read(text))


@functools.lru_cache(maxsize=256)
def _read(text: str) -> PatternConfig:
    name, colon, settings = text.partition(":")
    if name not in PATTERNS:
        known = (*BACKENDS, *PATTERNS)
        raise ValueError(
            f"attention_backend must be one of {', '.join(known)}; got {text!r}"
            f"{_did_you_mean(name, known)}"
        )
    config = PATTERNS[name].config
    if not colon:
        return config()
    fields = parse_object(f"attention_backend {name!r}", settings)
    known = tuple(field.name for field in dataclasses.fields(config))
    for field in fields:
        if field not in known:
            near = _did_you_mean(field, known) or f"; expected {', '.join(known)}"
            raise ValueError(f"attention_backend {name!r} has no setting {field!r}{near}")
    try:
        return config(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"attention_backend {name!r}: {error}") from error
    except OSError as error:
        raise ValueError(f"attention_backend {name!r}: {error}") from error


def _did_you_mean(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
