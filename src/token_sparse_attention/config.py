"""Settings of the method: one frozen dataclass, and a per-layer profile of them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

PROFILE_VERSION = 1
PROFILE_FILE = "token_sparse_profile.json"  # a model folder may ship its own settings
PUBLISHED_DROP_MASS = 0.005


class DenseReason(str, Enum):
    """Why a sequence, or a whole layer, ran dense instead of sparse."""

    SHORT_CONTEXT = "context not longer than min_tokens + window_size"
    SHORT_CHUNK = "fewer queries than window_size"
    ZERO_DROP_MASS = "drop_mass is 0"
    NOTHING_TO_DROP = "no token's mass fits under drop_mass, or the scores are not finite"
    CROSSOVER_LENGTH = "context too short for sparse to be faster (crossover)"
    CROSSOVER_KEPT = "too few tokens would be dropped for sparse to be faster (crossover)"
    LAYER_NOT_SELECTED = "layer is not among the sparse layers"
    DECODE = "decode step"
    NOT_CAUSAL = "layer is not causal self-attention"
    SLIDING_WINDOW = "layer attends within a sliding window"
    SOFT_CAP = "layer caps its attention logits"
    ATTENTION_SINKS = "layer has learned attention sinks"
    GRADIENTS = "gradients are being recorded (use torch.no_grad())"
    DROPOUT = "attention dropout is active"
    ATTENTION_WEIGHTS = "attention weights were asked for"
    MASK = "attention mask is not causal with one run of real tokens per row"
    HEAD_DIM = "value and key head sizes differ"
    DTYPES = "query, key and value have different dtypes"
    UNKNOWN_ARGUMENT = "layer passes an attention argument the sparse path does not know"
    ALIBI = "layer adds ALiBi to its attention logits"
    SHARED_CACHE = "layer reads another layer's cache"
    QUANTISED_CACHE = "cache is quantised"
    CACHE_LAYOUT = "layout of the cache is not understood"

    def __str__(self) -> str:
        return self.value


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _numbers(name: str, given: object, what: str) -> tuple[int, ...]:
    """Return the numbers of layers or heads in order, each once."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be {what} numbers, got {given!r}")
    numbers = tuple(given)
    for number in numbers:
        _check_int(name, number, 0)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} must not repeat a {what}, got {numbers}")
    return tuple(sorted(numbers))


def _check_keys(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(known)}"
            raise ValueError(f"{what} has an unknown entry {key!r}{hint}")


def _parse_object(what: str, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(parsed).__name__}")
    return parsed


@dataclass(frozen=True)
class TokenSparseConfig:
    """Settings of Token Sparse Attention (arXiv 2602.03216), and of what goes past it.

    The defaults drop no queries: every query attends to its window, the first tokens, and
    tokens drawn by its head's scores that stand for all others, the last queries to every
    token. With `drop_mass` queries are dropped too, as published. See docs/frontier.md.

    Args:
        drop_mass: share of the attention mass that the dropped tokens may hold together,
            the paper's tau; in ``[0, 1)``, 0 means dense. None, the default, where queries
            are not selected; 0.005 if they are and it is not given.
        window_size: how many of the last queries score the tokens; these are always kept.
        pool_size: width of the average pooling that smooths the scores, in tokens; odd.
        min_tokens: never keep fewer scored tokens than this.
        budget: ``"shared"`` gives all heads of a sequence the same number of tokens (the
            paper's Dynamic Token Coverage), ``"per_head"`` applies the rule to each head, and
            shares out ``fallback_samples`` by need.
        select_queries: whether queries are selected too, as published; None, the default,
            means if ``drop_mass`` is given. If not, only keys and values are compressed: every
            query gets what the windowed fallback gives, and ``pool_size`` has no effect.
        dense_queries: how many of the last queries attend to every key, whatever is selected.
        dense_heads: query heads of the layer whose queries all attend to every key. Only where
            queries are not selected.
        fallback: what a query that was not selected receives: ``"zero"``, as published, or
            ``"window"``, causal sliding-window attention over the uncompressed tokens.
        fallback_window: width of that sliding window in tokens, the query itself included.
        fallback_sinks: how many of the first tokens such a query attends to besides.
        fallback_landmarks: how many of its head's best-scored tokens it attends to besides.
        fallback_samples: how many of its head's tokens, drawn by score, stand for all that the
            window leaves behind; with ``budget="per_head"`` the mean over the heads.
        crossover: ``"auto"`` also runs dense where sparse would not be faster, by a measured
            break-even of lengths and kept tokens; ``"off"`` only where the method says so.
        sparse_layers: layers that may run sparse, None for all. Only integrations read it.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a field is out of range, or fields contradict each other.

    Example:
        >>> TokenSparseConfig(fallback_samples=1024, sparse_layers=(3, 1)).sparse_layers
        (1, 3)
        >>> TokenSparseConfig().select_queries, TokenSparseConfig(drop_mass=0.05).select_queries
        (False, True)
    """

    drop_mass: float | None = None
    window_size: int = 128
    pool_size: int = 7
    min_tokens: int = 1024
    budget: str = "shared"
    select_queries: bool | None = None
    dense_queries: int = 128
    dense_heads: tuple[int, ...] = ()
    fallback: str = "window"
    fallback_window: int = 2048
    fallback_sinks: int = 4
    fallback_landmarks: int = 0
    fallback_samples: int = 4096
    crossover: str = "auto"
    sparse_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._settle_selection()
        _check_int("window_size", self.window_size, 1)
        _check_int("pool_size", self.pool_size, 1)
        if self.pool_size % 2 == 0:
            raise ValueError(f"pool_size must be odd, got {self.pool_size}")
        _check_int("min_tokens", self.min_tokens, 0)
        _check_choice("budget", self.budget, ("shared", "per_head"))
        _check_choice("fallback", self.fallback, ("zero", "window"))
        _check_int("fallback_window", self.fallback_window, 1)
        _check_int("fallback_sinks", self.fallback_sinks, 0)
        _check_int("fallback_landmarks", self.fallback_landmarks, 0)
        _check_int("fallback_samples", self.fallback_samples, 0)
        _check_int("dense_queries", self.dense_queries, 0)
        if not self.select_queries and self.fallback != "window":
            raise ValueError(
                f"select_queries=False needs fallback='window', got {self.fallback!r}"
            )
        _check_choice("crossover", self.crossover, ("off", "auto"))
        object.__setattr__(self, "dense_heads", _numbers("dense_heads", self.dense_heads, "head"))
        if self.dense_heads and self.select_queries:
            raise ValueError(
                "dense_heads needs queries that are not selected: drop_mass None, got "
                f"{self.drop_mass}"
            )
        if self.sparse_layers is not None:
            layers = _numbers("sparse_layers", self.sparse_layers, "layer")
            object.__setattr__(self, "sparse_layers", layers)

    def _settle_selection(self) -> None:
        """Check `drop_mass` and `select_queries`, and give each what follows from the other."""
        mass, select = self.drop_mass, self.select_queries
        if not (select is None or isinstance(select, bool)):
            raise TypeError(f"select_queries must be True, False or None, got {select!r}")
        if mass is not None:
            if isinstance(mass, bool) or not isinstance(mass, (int, float)):
                raise TypeError(f"drop_mass must be a number or None, got {mass!r}")
            if not (math.isfinite(mass) and 0 <= mass < 1):
                raise ValueError(f"drop_mass must be in [0, 1), got {mass}")
            if select is False:
                raise ValueError(
                    f"drop_mass must be None where select_queries is False, got {mass}"
                )
        if select is None:
            object.__setattr__(self, "select_queries", mass is not None)
        elif select and mass is None:
            object.__setattr__(self, "drop_mass", PUBLISHED_DROP_MASS)

    @classmethod
    def published(cls, **changes: Any) -> TokenSparseConfig:
        """Return the operator settings that the paper's published code uses by default.

        Args:
            **changes: fields to set otherwise.

        Raises:
            TypeError: if a field has the wrong type, or there is none of that name.
            ValueError: if a field is out of range, or fields contradict each other.

        Example:
            >>> TokenSparseConfig.published(drop_mass=0.05).fallback
            'zero'
        """
        fields: dict[str, Any] = {
            "drop_mass": PUBLISHED_DROP_MASS,
            "window_size": 128,
            "pool_size": 7,
            "min_tokens": 1024,
            "budget": "shared",
            "select_queries": True,
            "dense_queries": 0,
            "fallback": "zero",
            "fallback_window": 512,
            "fallback_sinks": 0,
            "fallback_landmarks": 0,
            "fallback_samples": 0,
            "crossover": "off",
        }
        return cls(**{**fields, **changes})

    def dense_reason(self, query_len: int, kv_len: int) -> DenseReason | None:
        """Return why lengths alone make a sequence run dense, or None if they do not.

        Args:
            query_len: real queries of the sequence.
            kv_len: real keys of the sequence.
        """
        if query_len < self.window_size:
            return DenseReason.SHORT_CHUNK
        if kv_len <= self.min_tokens + self.window_size:
            return DenseReason.SHORT_CONTEXT
        if self.drop_mass == 0:
            return DenseReason.ZERO_DROP_MASS
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        fields = dataclasses.asdict(self)
        fields["dense_heads"] = list(self.dense_heads)
        if self.sparse_layers is not None:
            fields["sparse_layers"] = list(self.sparse_layers)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TokenSparseConfig:
        """Build a config from `to_dict` values; absent fields take their defaults."""
        _check_keys("config", fields, tuple(f.name for f in dataclasses.fields(cls)))
        return cls(**fields)

    def to_json(self) -> str:
        """Return the config as a JSON object.

        Example:
            >>> TokenSparseConfig.from_json(TokenSparseConfig().to_json()) == TokenSparseConfig()
            True
        """
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TokenSparseConfig:
        """Build a config from a JSON object.

        Raises:
            ValueError: if the text is no JSON object, or has an unknown entry or bad value.
            TypeError: if an entry has the wrong type.
        """
        return cls.from_dict(_parse_object("config", text))


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
        >>> profile = LayerProfile(layers={3: {}, 4: {"drop_mass": 0.05}})
        >>> profile.layer_configs(num_layers=8)[4].drop_mass
        0.05
    """

    base: TokenSparseConfig = field(default_factory=TokenSparseConfig)
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.base, TokenSparseConfig):
            raise TypeError(f"base must be a TokenSparseConfig, got {self.base!r}")
        if self.base.sparse_layers is not None:
            raise ValueError(
                "base.sparse_layers must be None in a profile, whose layers entry lists them; "
                f"got {self.base.sparse_layers}"
            )
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must map layer numbers to overrides, got {self.layers!r}")
        for layer, overrides in self.layers.items():
            _check_int("layers", layer, 0)
            if not isinstance(overrides, Mapping):
                raise TypeError(f"layers[{layer}] must map fields to values, got {overrides!r}")
            if "sparse_layers" in overrides:
                raise ValueError(f"layers[{layer}] must not override sparse_layers")
            self._layer_config(overrides)

    def _layer_config(self, overrides: Mapping[str, Any]) -> TokenSparseConfig:
        fields = self.base.to_dict()
        # What follows from the other in the base is free where a layer sets only one of them.
        if "drop_mass" in overrides:
            fields["select_queries"] = None
        elif overrides.get("select_queries") is False:
            fields["drop_mass"] = None
        return TokenSparseConfig.from_dict({**fields, **overrides})

    def layer_configs(self, num_layers: int) -> dict[int, TokenSparseConfig]:
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
        content = _parse_object("profile", text)
        _check_keys("profile", content, ("version", "base", "layers"))
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
        return cls(base=TokenSparseConfig.from_dict(content.get("base", {})), layers=layers)


def _check_layer_range(name: str, layers: Any, num_layers: int) -> None:
    outside = sorted(layer for layer in layers if layer >= num_layers)
    if outside:
        raise ValueError(
            f"{name} must be below {num_layers}, the model's number of layers; got {outside}"
        )


def layer_configs(
    config: TokenSparseConfig | LayerProfile, num_layers: int
) -> dict[int, TokenSparseConfig]:
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
    if not isinstance(config, TokenSparseConfig):
        raise TypeError(f"config must be a TokenSparseConfig or a LayerProfile, got {config!r}")
    layers = config.sparse_layers
    if layers is None:
        layers = tuple(range(num_layers))
    _check_layer_range("sparse_layers", layers, num_layers)
    layer_config = dataclasses.replace(config, sparse_layers=None)
    return dict.fromkeys(layers, layer_config)


def without_crossover(
    config: TokenSparseConfig | LayerProfile,
) -> TokenSparseConfig | LayerProfile:
    """Return the settings with ``crossover="off"`` everywhere."""
    if isinstance(config, TokenSparseConfig):
        return dataclasses.replace(config, crossover="off")
    layers = {
        layer: {name: value for name, value in changes.items() if name != "crossover"}
        for layer, changes in config.layers.items()
    }
    return LayerProfile(dataclasses.replace(config.base, crossover="off"), layers)


def load_config(path: str | Path) -> TokenSparseConfig | LayerProfile:
    """Read a config or a profile from a JSON file; a profile is told by its version entry.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is neither.
        TypeError: if an entry has the wrong type.
    """
    text = Path(path).read_text(encoding="utf-8")
    if "version" in _parse_object(str(path), text):
        return LayerProfile.from_json(text)
    return TokenSparseConfig.from_json(text)
