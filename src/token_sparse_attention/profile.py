"""Which layers of one model run sparse, and how: a profile, and the files that hold settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    check_int,
    config_from_dict,
)
from token_sparse_attention.records import check_keys, parse_object

PROFILE_VERSION = 2
PROFILE_FILE = "token_sparse_profile.json"  # a model folder may ship its own settings

# Names of the fields that version 1 of the files had, by the method that they are now of.
_OLD_SHARED = {name: name for name in ("budget", "dense_queries", "crossover", "sparse_layers")}
_OLD_SAMPLING = _OLD_SHARED | {
    "fallback_window": "sliding_window",
    "fallback_sinks": "sink_size",
    "fallback_samples": "num_samples",
    "dense_heads": "dense_heads",
}
_OLD_SELECTION = _OLD_SHARED | {
    "drop_mass": "drop_mass",
    "window_size": "observation_window",
    "pool_size": "pool_size",
    "min_tokens": "min_tokens",
    "fallback": "fallback",
    "fallback_window": "sliding_window",
}
# Fields that the other method alone reads, and the values that they may have had all the same.
_OLD_UNUSED: dict[str, tuple[Any, ...]] = {
    "drop_mass": (None,),
    "fallback": ("window",),
    "fallback_landmarks": (0,),
    "fallback_samples": (0,),
    "fallback_sinks": (0,),
    "dense_heads": ([], ()),
}
# KV sampling scored keys by the last queries of a prompt; their number has no successor.
_OLD_IGNORED = ("select_queries", "pool_size", "min_tokens", "window_size")
# What version 1 took for absent fields, where the paper's config takes something else.
_OLD_DEFAULTS = {
    "fallback": "window",
    "fallback_window": 2048,
    "fallback_sinks": 4,
    "fallback_samples": 4096,
    "dense_queries": 128,
    "crossover": "auto",
}


@dataclass(frozen=True)
class LayerProfile:
    """Which layers of one model run sparse, and how: a base config plus overrides.

    Layers that are not listed run dense.

    Args:
        base: config that every listed layer starts from; its ``sparse_layers`` must be None.
        layers: layer number -> the fields of ``base`` that this layer changes.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a layer number or an override is invalid.

    Example:
        >>> profile = LayerProfile(layers={3: {}, 4: {"num_samples": 1024}})
        >>> profile.layer_configs(num_layers=8)[4].num_samples
        1024
    """

    base: SparseConfig = field(default_factory=KVSamplingConfig)
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.base, SparseConfig):
            raise TypeError(f"base must be a SparseConfig, got {self.base!r}")
        if self.base.sparse_layers is not None:
            raise ValueError(
                "base.sparse_layers must be None in a profile, whose layers entry lists them; "
                f"got {self.base.sparse_layers}"
            )
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must map layer numbers to overrides, got {self.layers!r}")
        for layer, overrides in self.layers.items():
            check_int("layers", layer, 0)
            if not isinstance(overrides, Mapping):
                raise TypeError(f"layers[{layer}] must map fields to values, got {overrides!r}")
            for name in ("sparse_layers", "method"):
                if name in overrides:
                    raise ValueError(f"layers[{layer}] must not override {name}")
            self._layer_config(overrides)

    def _layer_config(self, overrides: Mapping[str, Any]) -> SparseConfig:
        return config_from_dict({**self.base.to_dict(), **overrides})

    def layer_configs(self, num_layers: int) -> dict[int, SparseConfig]:
        """Return the config of every sparse layer of a model with `num_layers` layers.

        Raises:
            ValueError: if the profile lists a layer that the model does not have.
        """
        _check_layer_range("layers", self.layers, num_layers)
        return {layer: self._layer_config(self.layers[layer]) for layer in sorted(self.layers)}

    def to_json(self) -> str:
        """Return the profile as a JSON object with a schema version."""
        content = {
            "version": PROFILE_VERSION,
            "base": self.base.to_dict(),
            "layers": {str(layer): dict(self.layers[layer]) for layer in sorted(self.layers)},
        }
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> LayerProfile:
        """Build a profile from a JSON object.

        Raises:
            ValueError: if the text is no JSON object, has an unknown entry, an unknown
                version, a layer key that is no number, or a bad value.
            TypeError: if an entry has the wrong type.
        """
        content = parse_object("profile", text)
        check_keys("profile", content, ("version", "base", "layers"))
        if content.get("version") != PROFILE_VERSION:
            raise ValueError(
                f"profile version must be {PROFILE_VERSION}, got {content.get('version')!r}"
            )
        for part in ("base", "layers"):
            if not isinstance(content.get(part, {}), dict):
                raise TypeError(f"profile {part} must be an object, got {content[part]!r}")
        layers: dict[int, Any] = {}
        for key, overrides in content.get("layers", {}).items():
            if not (key.isascii() and key.isdigit()):
                raise ValueError(f"profile layers must have numbers as keys, got {key!r}")
            if int(key) in layers:
                raise ValueError(f"profile layers must not repeat layer {int(key)}")
            layers[int(key)] = overrides
        return cls(base=config_from_dict(content.get("base", {})), layers=layers)


def _check_layer_range(name: str, layers: Iterable[int], num_layers: int) -> None:
    outside = sorted(layer for layer in layers if layer >= num_layers)
    if outside:
        raise ValueError(
            f"{name} must be below {num_layers}, the model's number of layers; got {outside}"
        )


def layer_configs(config: SparseConfig | LayerProfile, num_layers: int) -> dict[int, SparseConfig]:
    """Return the config of every sparse layer: the one reading of configs and profiles.

    Args:
        config: a config, whose ``sparse_layers`` is honoured here, or a profile.
        num_layers: layers of the model.

    Raises:
        TypeError: if `config` is neither.
        ValueError: if it names a layer that the model does not have.
    """
    if isinstance(config, LayerProfile):
        return config.layer_configs(num_layers)
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig or a LayerProfile, got {config!r}")
    layers = config.sparse_layers
    if layers is None:
        layers = tuple(range(num_layers))
    _check_layer_range("sparse_layers", layers, num_layers)
    layer_config = dataclasses.replace(config, sparse_layers=None)
    return dict.fromkeys(layers, layer_config)


def without_crossover(config: SparseConfig | LayerProfile) -> SparseConfig | LayerProfile:
    """Return the settings with ``crossover="off"`` everywhere."""
    if isinstance(config, SparseConfig):
        return dataclasses.replace(config, crossover="off")
    layers = {
        layer: {name: value for name, value in changes.items() if name != "crossover"}
        for layer, changes in config.layers.items()
    }
    return LayerProfile(dataclasses.replace(config.base, crossover="off"), layers)


def settings_from_json(text: str, source: str = "settings") -> SparseConfig | LayerProfile:
    """Read a config or a profile, which has a version entry.

    Args:
        text: a JSON object.
        source: what errors call it.

    Raises:
        ValueError: if the text is neither; old settings are named as such, see `convert_settings`.
        TypeError: if an entry has the wrong type.
    """
    content = parse_object(source, text)
    if is_old(content):
        today = "" if "version" in content else ', or add "method": "token_selection" if it is new'
        raise ValueError(
            f"{source} has the field names of version 1; rewrite it with "
            f"token_sparse_attention.profile.convert_settings{today}"
        )
    if "version" in content:
        return LayerProfile.from_json(text)
    return config_from_dict(content)


def load_config(path: str | Path) -> SparseConfig | LayerProfile:
    """Read a config or a profile from a JSON file; a profile is told by its version entry.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is neither.
        TypeError: if an entry has the wrong type.
    """
    return settings_from_json(Path(path).read_text(encoding="utf-8-sig"), str(path))


def is_old(content: Mapping[str, Any]) -> bool:
    """Return whether a JSON object holds settings with the field names of version 1."""
    if "version" in content:
        return bool(content["version"] == 1)
    old = {*_OLD_SAMPLING, *_OLD_SELECTION, *_OLD_UNUSED, "select_queries"}
    today = {one.name for one in dataclasses.fields(KVSamplingConfig)}
    return "method" not in content and bool((old - today) & set(content))


def convert_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return version 1 settings, a config or a profile, with today's methods and field names.

    Args:
        content: the parsed JSON object.

    Returns:
        The JSON object that `settings_from_json` reads. Of KV sampling, windows, samples and
        dense heads stay, blocks and probes take their defaults.

    Raises:
        ValueError: if it sets what no method has any more, mixes methods between layers, or has
            a window that is narrower than a block.

    Example:
        >>> convert_settings({"fallback_samples": 1024})
        {'method': 'kv_sampling', 'num_samples': 1024}
    """
    converted = _convert(content)
    settings_from_json(json.dumps(converted))
    return converted


def _convert(content: Mapping[str, Any]) -> dict[str, Any]:
    if "version" not in content:
        return _convert_config(content)
    base = _convert_config(content.get("base", {}))
    selects = base["method"] == "token_selection"
    layers = {}
    for layer, overrides in content.get("layers", {}).items():
        if overrides.get("drop_mass") is not None and not selects:
            raise ValueError(f"layers[{layer}] drops queries and the base does not: two methods")
        layers[layer] = _rename(overrides, selects=selects)
    return {"version": PROFILE_VERSION, "base": base, "layers": layers}


def _convert_config(content: Mapping[str, Any]) -> dict[str, Any]:
    selects = bool(content.get("select_queries")) or content.get("drop_mass") is not None
    fields = {**(_OLD_DEFAULTS if selects else {}), **content}
    if fields.get("drop_mass", 0) is None and selects:
        del fields["drop_mass"]
    if fields.get("fallback") == "zero":  # then nothing read these
        fields |= {"fallback_sinks": 0, "fallback_samples": 0}
    method = "token_selection" if selects else "kv_sampling"
    return {"method": method, **_rename(fields, selects=selects)}


def _rename(fields: Mapping[str, Any], *, selects: bool) -> dict[str, Any]:
    names = _OLD_SELECTION if selects else _OLD_SAMPLING
    renamed = {}
    for name, value in fields.items():
        if name in names:
            renamed[names[name]] = value
        elif name not in _OLD_IGNORED and (
            name not in _OLD_UNUSED or value not in _OLD_UNUSED[name]
        ):
            method = "token_selection" if selects else "kv_sampling"
            raise ValueError(f"{name} = {value!r} has no meaning in the method {method}")
    return renamed
