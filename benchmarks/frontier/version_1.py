"""Results of settings that no method has any more, read as plain data.

Result files keep two things of the library's version 1: settings that gave the dropped queries of
token selection sinks, landmarks or samples behind their window, under the field names of their
time; and ``arguments.variants``, what code that is gone changed in some points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from token_sparse_attention.evaluation import summary
from token_sparse_attention.evaluation.record import EvalResults
from token_sparse_attention.profile import convert_settings, is_old

# Numbers of keys behind the window, and what they are called beside today's names.
_BEHIND = {
    "fallback_sinks": "sink_size",
    "fallback_landmarks": "landmarks",
    "fallback_samples": "num_samples",
}
_VARIANTS = {
    "landmarks": "{} landmarks",
    "spread": "{} of the scoring queries spread",
    "neighbours": "{} neighbours on each side selected too",
    "landmarks_by": "chosen by {} spread queries",
    "own_landmarks": "{} of them by the last queries",
    "samples": "{} samples, one of each part",
    "drawn": "{} sampled keys",
    "dense_last": "last {} queries dense",
    "pooled": "means of blocks of {}",
}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under today's names; those without a config keep all of their entries.

    Args:
        settings: a config or a profile as JSON, of any version.

    Example:
        >>> old = {"drop_mass": 0.4, "fallback_window": 64, "fallback_landmarks": 9}
        >>> renamed(old)["sliding_window"], renamed(old)["landmarks"]
        (64, 9)
    """
    if not is_old(settings) or "version" in settings:
        return dict(settings)
    behind = {name: settings.get(old, 0) for old, name in _BEHIND.items()}
    return convert_settings({**settings, **dict.fromkeys(_BEHIND, 0)}) | behind


def summarise(results: EvalResults) -> tuple[summary.Row, ...]:
    """Return `summary.summarise` of results whose settings may have no config.

    Version 1 counted the keys behind a dropped query's window as if they were one window more:
    an upper bound. So the work of such settings is that of token selection with a window of
    that width.
    """
    readable = {
        name: _stand_in(settings) if settings and is_old(settings) else settings
        for name, settings in results.header.configurations.items()
    }
    header = replace(results.header, configurations=readable)
    return summary.summarise(replace(results, header=header))


def _stand_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = renamed(settings)
    behind = sum(fields.pop(name) for name in _BEHIND.values())
    return fields | {"sliding_window": fields["sliding_window"] + behind}


def variant_words(settings: Mapping[str, Any], variant: Mapping[str, Any]) -> list[str]:
    """Say in words how a point differed from what its settings say.

    Args:
        settings: of the point, `renamed`.
        variant: its entry in ``arguments.variants``.
    """
    numbers = {"landmarks": settings.get("landmarks", 0)}
    numbers |= {name: value for name, value in variant.items() if value}
    parts = [text.format(numbers[name]) for name, text in _VARIANTS.items() if numbers.get(name)]
    if variant.get("pooled") and variant["pooled_for"] != "both":
        parts.append(f"for {variant['pooled_for']} queries only")
    if variant.get("segments", 1) > 1:
        parts.append(f"in each of {variant['segments']} segments")
    flags = {
        ("value_norm", True): "scores times the values' norms",
        ("union", True): "selected queries see their window too",
        ("selected", "others"): "selected queries like the others",
        ("selected", "dense"): "selected queries dense",
        ("fallback", "dense"): "unselected queries dense",
        ("fallback", "keys"): "all queries see the window and the selected keys",
    }
    return parts + [text for (name, value), text in flags.items() if variant.get(name) == value]
