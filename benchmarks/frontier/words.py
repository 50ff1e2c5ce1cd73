"""In words what a point of a result file ran: settings, layer profiles and variants.

They are read as plain data under the names that they had when they were measured. A variant is
what the library did not have then: `screen` recorded it as ``arguments.variants``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.frontier.calibrated import dense_heads


def describe(settings: Mapping[str, Any], variant: Mapping[str, Any] | None = None) -> str:
    """Say in words what a point runs."""
    if "layers" in settings:
        return _describe_profile(settings)
    layers = settings["sparse_layers"]
    named = "all layers" if layers is None else _name_layers(layers)
    return ", ".join([named, *_differences(settings, variant or {})])


def _differences(settings: Mapping[str, Any], variant: Mapping[str, Any]) -> list[str]:
    parts = []
    if settings.get("select_queries", True):
        parts.append(f"drop mass {settings['drop_mass']:g}")
    if settings["fallback"] == "zero":
        parts.append("zeros")
    elif settings["fallback_window"] != 512:
        parts.append(f"window {settings['fallback_window']}")
    if settings["budget"] == "per_head":
        parts.append("budget per head")
    if settings["window_size"] != 128:
        parts.append(f"scored by {settings['window_size']} queries")
    words = {
        "pool_size": "scores of {} neighbours pooled",
        "fallback_sinks": "{} sinks",
        "fallback_landmarks": "{} landmarks",
        "fallback_samples": "{} sampled keys",
        "landmarks": "{} landmarks",
        "spread": "{} of the scoring queries spread",
        "neighbours": "{} neighbours on each side selected too",
        "landmarks_by": "chosen by {} spread queries",
        "own_landmarks": "{} of them by the last queries",
        "samples": "{} samples, one of each part",
        "drawn": "{} sampled keys",
        "dense_last": "last {} queries dense",
        "dense_queries": "last {} queries dense",
        "pooled": "means of blocks of {}",
    }
    for field, text in words.items():
        value = settings.get(field) or variant.get(field)
        if value and (field, value) != ("pool_size", 7):
            parts.append(text.format(value))
    parts += dense_heads(settings)
    if variant.get("pooled") and variant["pooled_for"] != "both":
        parts.append(f"for {variant['pooled_for']} queries only")
    if variant.get("segments", 1) > 1:
        parts.append(f"in each of {variant['segments']} segments")
    if variant.get("value_norm"):
        parts.append("scores times the values' norms")
    if variant.get("union"):
        parts.append("selected queries see their window too")
    if settings.get("select_queries") is False:
        parts.append("no queries dropped")
    elif variant.get("selected") == "others":
        parts.append("selected queries like the others")
    if variant.get("selected") == "dense":
        parts.append("selected queries dense")
    if variant.get("fallback") == "dense":
        parts.append("unselected queries dense")
    if variant.get("fallback") == "keys":
        parts.append("all queries see the window and the selected keys")
    return parts


def _describe_profile(profile: Mapping[str, Any]) -> str:
    """Say what each layer runs, then what all of them do; layers not named are dense."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, changes in profile["layers"].items():
        parts = tuple(_differences({**profile["base"], **changes}, {}))
        groups.setdefault(parts, []).append(int(layer))
    shared = [part for part in next(iter(groups)) if all(part in parts for parts in groups)]
    each = []
    for parts, layers in groups.items():
        own = ", ".join(part for part in parts if part not in shared)
        each.append(f"{_name_layers(layers)}: {own}" if own else _name_layers(layers))
    return "; ".join([*each, f"each {', '.join(shared)}"] if shared else each)


def _name_layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    missing = sorted(set(range(layers[0], layers[-1])) - set(layers))
    without = f" without {', '.join(map(str, missing))}" if missing else ""
    span, listed = f"{layers[0]} to {layers[-1]}{without}", ", ".join(map(str, layers))
    return f"layers {listed if missing and len(listed) < len(span) else span}"
