"""What a user may set in an engine's options, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from token_sparse_attention.attention.names import parse_backend, pattern_config
from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.impls import check_impl
from token_sparse_attention.profile import (
    LayerProfile,
    layer_configs,
    load_config,
    settings_from_json,
)
from token_sparse_attention.records import check_keys

KEY = "token_sparse_attention"
PREFIX_CACHING = ("refuse", "allow")
ENTRIES = (
    "profile", "config", "impl", "attention_backend", "prefix_caching", "log_interval", "warm_up",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A plugin's settings, under ``"token_sparse_attention"`` in an option of the engine.

    Args:
        config: which layers run sparse, and how.
        impl: which code scores and chooses, see `Execution`.
        attention_backend: which kernel or pattern attends in sparse layers, see `Execution`.
        prefix_caching: ``"refuse"`` does not start while the engine's prefix caching is on, if a
            layer selects tokens; ``"allow"`` starts, see docs/serving.md for what that changes.
        log_interval: seconds between two lines of counters in the log, at least.
        warm_up: whether kernels are compiled while the engine starts, on a GPU.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a name is unknown or a number out of range.
    """

    config: SparseConfig | LayerProfile = field(default_factory=KVSamplingConfig)
    impl: str = "auto"
    attention_backend: str = "auto"
    prefix_caching: str = "refuse"
    log_interval: float = 10.0
    warm_up: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.config, (SparseConfig, LayerProfile)):
            raise TypeError(
                f"config must be a SparseConfig or a LayerProfile, got {self.config!r}"
            )
        check_impl(self.impl)
        object.__setattr__(self, "attention_backend", parse_backend(self.attention_backend))
        if getattr(pattern_config(self.attention_backend), "layers", None) is not None:
            raise ValueError(
                "attention_backend must be the same in all layers, got settings that name layers"
            )
        if self.prefix_caching not in PREFIX_CACHING:
            raise ValueError(
                f"prefix_caching must be one of {', '.join(PREFIX_CACHING)}; "
                f"got {self.prefix_caching!r}"
            )
        interval = self.log_interval
        if isinstance(interval, bool) or not isinstance(interval, (int, float)):
            raise TypeError(f"log_interval must be a number of seconds, got {interval!r}")
        if not (math.isfinite(interval) and interval >= 0):
            raise ValueError(f"log_interval must be at least 0 seconds, got {interval}")
        if not isinstance(self.warm_up, bool):
            raise TypeError(f"warm_up must be True or False, got {self.warm_up!r}")

    def layer_configs(self, num_layers: int) -> dict[int, SparseConfig]:
        """Return the config of every layer that may run sparse, by the layer's number.

        Raises:
            ValueError: if the settings name a layer that the model does not have.
        """
        return layer_configs(self.config, num_layers)


def read_settings(
    option: Any, name: str = "additional_config", entries: tuple[str, ...] = ENTRIES
) -> Settings | None:
    """Return the settings in an option of an engine, None if it has none.

    Args:
        option: a mapping; the entry ``"token_sparse_attention"`` has either ``"profile"``, the
            path of a config or profile in JSON, or ``"config"``, the content of such a file;
            and the other fields of `Settings`.
        name: of the option, for errors.
        entries: that the engine's plugin has.

    Raises:
        TypeError: if an entry has the wrong type.
        ValueError: if an entry is unknown or has a bad value, or if there is neither
            ``"profile"`` nor ``"config"``, or both.
        FileNotFoundError: if there is no such profile.

    Example:
        >>> given = {"token_sparse_attention": {"config": {"num_samples": 1024}}}
        >>> read_settings(given).config.num_samples
        1024
    """
    if not isinstance(option, Mapping) or KEY not in option:
        return None
    given, entry = option[KEY], f"{name}[{KEY!r}]"
    if not isinstance(given, Mapping):
        raise TypeError(f"{entry} must be an object, got {given!r}")
    check_keys(entry, given, entries)
    if ("profile" in given) == ("config" in given):
        raise ValueError(
            f"{entry} must have one of 'profile', the path of a config or profile, and "
            f"'config', its content; got {', '.join(given) or 'nothing'}"
        )
    others = {name: given[name] for name in given if name not in ("profile", "config")}
    if "profile" in given:
        if not isinstance(given["profile"], str):
            raise TypeError(f"profile must be a path, got {given['profile']!r}")
        return Settings(config=load_config(given["profile"]), **others)
    return Settings(config=_inline(given["config"]), **others)


def selects_tokens(configs: Iterable[SparseConfig]) -> bool:
    """Return whether a prompt's last queries may decide what its other tokens hold."""
    return any(not isinstance(config, KVSamplingConfig) for config in configs)


def _inline(content: Any) -> SparseConfig | LayerProfile:
    if not isinstance(content, Mapping):
        raise TypeError(f"config must be an object, got {content!r}")
    return settings_from_json(json.dumps(dict(content)), "config")
