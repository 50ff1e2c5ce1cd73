"""Causal attention by any backend: the dense kernels, or a block-sparse pattern in their place.

A backend travels as one string. A dense kernel is its name; a pattern is its name, and after a
colon the settings that are not its defaults, as JSON: ``xattention:{"stride":16}``. Patterns
read lengths on the host.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from token_sparse_attention.attention import dense
from token_sparse_attention.attention.backends import BACKENDS, choose_backend
from token_sparse_attention.attention.block_mask import BLOCK_SIZE
from token_sparse_attention.attention.dense import Attended
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.inputs import RealTokens


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
    return _text(PATTERNS[_name_of(config)].of_layer(config, layer, num_layers))


def backends_of_layers(backend: str, num_layers: int, num_heads: int) -> tuple[str, ...]:
    """Return `backend_of_layer` for each layer, checked against the number of query heads.

    Raises:
        ValueError: if the settings name another number of layers, or of heads in some layer.
    """
    backends = tuple(backend_of_layer(backend, layer, num_layers) for layer in range(num_layers))
    for layer, text in enumerate(backends):
        config = pattern_config(text)
        if config is not None:
            name = _name_of(config)
            try:
                PATTERNS[name].of_heads(config, range(num_heads), num_heads)
            except ValueError as error:
                raise ValueError(f"attention_backend {name!r}, layer {layer}: {error}") from error
    return backends


def _text(config: PatternConfig) -> str:
    name = _name_of(config)
    plain = PATTERNS[name].config()
    changed = {
        field: value
        for field, value in dataclasses.asdict(config).items()
        if value != getattr(plain, field)
    }
    if not changed:
        return name
    return f"{name}:{json.dumps(changed, sort_keys=True, separators=(',', ':'))}"


def _name_of(config: PatternConfig) -> str:
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
    try:
        fields = json.loads(settings)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"attention_backend {text!r} has settings that are not valid JSON: {error}"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"attention_backend {text!r} must have a JSON object as settings")
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


def resolve_backend(backend: str, query: Tensor, key: Tensor) -> str:
    """Return the backend that runs: `choose_backend`'s choice, or the pattern as it is."""
    return choose_backend(backend, query, key).name if backend in BACKENDS else backend


def dense_backend(backend: str) -> str:
    """Return the dense backend to use beside `backend`: ``"auto"`` beside a pattern."""
    return backend if backend in BACKENDS else "auto"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    backend: str = "auto",
    want_lse: bool = False,
) -> Attended:
    """`dense.attend` without a window, by any backend in its string form."""
    config = pattern_config(backend)
    if config is None:
        return dense.attend(query, key, value, scale=scale, backend=backend, want_lse=want_lse)
    return _run(config, query, key, value, scale, want_lse)


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    tokens: RealTokens,
    into: Attended,
    *,
    scale: float,
    backend: str,
) -> None:
    """`dense.attend_rows` without a window, by any backend in its string form."""
    config = pattern_config(backend)
    if config is None:
        dense.attend_rows(query, key, value, begins, tokens, into, scale=scale, backend=backend)
        return

    def run(one_query: Tensor, one_key: Tensor, one_value: Tensor) -> Attended:
        return _run(config, one_query, one_key, one_value, scale, into.lse is not None)

    dense.attend_each_row(query, key, value, begins, tokens, into, run)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    backend: str,
    heads: Sequence[int],
    num_heads: int,
    want_lse: bool = False,
) -> Attended:
    """`dense.attend_packed` by any backend in its string form.

    A pattern runs the sequences of equal lengths as the heads of one problem.

    Args:
        query: ``[T_q, D]``, see `dense.varlen_causal_attention`.
        key: ``[T_k, D]``.
        value: ``[T_k, D]``.
        cu_seqlens_q: ``[sequences + 1]`` int32.
        cu_seqlens_k: ``[sequences + 1]`` int32.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        scale: factor of the logits.
        backend: a string form.
        heads: the query head of each sequence.
        num_heads: how many query heads the model has.
        want_lse: whether the log-sum-exp is wanted.
    """
    config = pattern_config(backend)
    if config is None:
        return dense.attend_packed(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale=scale,
            backend=backend,
            want_lse=want_lse,
        )
    begins_q, begins_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    alike: dict[tuple[int, int], list[int]] = {}
    for number in range(len(heads)):
        lengths = tuple(ends[number + 1] - ends[number] for ends in (begins_q, begins_k))
        alike.setdefault((lengths[0], lengths[1]), []).append(number)
    of_heads = PATTERNS[_name_of(config)].of_heads
    out = torch.empty_like(query)
    lse = query.new_empty(len(query), dtype=torch.float32) if want_lse else None
    for (query_len, kv_len), numbers in alike.items():
        if query_len == 0:
            continue
        queries = [slice(begins_q[n], begins_q[n] + query_len) for n in numbers]
        keys = [slice(begins_k[n], begins_k[n] + kv_len) for n in numbers]
        one = _run(
            of_heads(config, [heads[n] for n in numbers], num_heads),
            _as_heads(query, queries),
            _as_heads(key, keys),
            _as_heads(value, keys),
            scale,
            want_lse,
        )
        for head, place in enumerate(queries):
            out[place] = one.out[0, head]
            if lse is not None and one.lse is not None:
                lse[place] = one.lse[0, head]
    return Attended(out, lse)


def _as_heads(packed: Tensor, places: Sequence[slice]) -> Tensor:
    """Sequences of one length as ``[1, sequences, S, D]``; a view if they lie side by side."""
    first, last = places[0], places[-1]
    if last.stop - first.start == len(places) * (first.stop - first.start):
        return packed[first.start : last.stop].view(1, len(places), -1, packed.shape[-1])
    return torch.stack([packed[place] for place in places])[None]


def _run(
    config: PatternConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    want_lse: bool,
) -> Attended:
    """Attend by a pattern; which executor runs its blocks is chosen by itself."""
    return PATTERNS[_name_of(config)].run(
        query,
        key,
        value,
        config,
        scale=scale,
        backend="auto",
        block_size=BLOCK_SIZE,
        want_lse=want_lse,
    )
