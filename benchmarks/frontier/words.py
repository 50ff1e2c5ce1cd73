"""In words what a point of a result file ran: settings, layer profiles and variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.frontier.calibrated import dense_heads
from benchmarks.frontier.version_1 import renamed, variant_words

from token_sparse_attention.config import KVSamplingConfig, TokenSelectionConfig

_NUMBERS = {
    "pool_size": "scores of {} neighbours pooled",
    "sink_size": "{} sinks",
    "num_samples": "{} sampled keys",
}
_PLAIN = TokenSelectionConfig()  # what goes without saying


def describe(settings: Mapping[str, Any], variant: Mapping[str, Any] | None = None) -> str:
    """Say in words what a point runs.

    Args:
        settings: a config or a profile as JSON, of any version.
        variant: what else the point changed, see `version_1.variant_words`.
    """
    settings = renamed(settings)
    if "layers" in settings:
        return _describe_profile(settings)
    layers = settings["sparse_layers"]
    named = "all layers" if layers is None else _name_layers(layers)
    return ", ".join([named, *_differences(settings, variant or {})])


def _differences(settings: Mapping[str, Any], variant: Mapping[str, Any]) -> list[str]:
    samples = settings["method"] == KVSamplingConfig.method
    parts = [] if samples else [f"drop mass {settings['drop_mass']:g}"]
    if settings.get("fallback") == "zero":
        parts.append("zeros")
    elif settings["sliding_window"] != _PLAIN.sliding_window:
        parts.append(f"window {settings['sliding_window']}")
    if settings["budget"] == "per_head":
        parts.append("budget per head")
    probes = settings["num_probes" if samples else "observation_window"]
    if probes != _PLAIN.observation_window:
        parts.append(f"scored by {probes} queries")
    for field, text in _NUMBERS.items():
        value = settings.get(field)
        if value and (field, value) != ("pool_size", _PLAIN.pool_size):
            parts.append(text.format(value))
    parts += variant_words(settings, variant)
    if settings.get("dense_queries"):
        parts.append(f"last {settings['dense_queries']} queries dense")
    parts += dense_heads(settings)
    if samples:
        parts.append("no queries dropped")
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
