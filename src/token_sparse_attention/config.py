"""Settings of the two methods: a frozen dataclass for each, on one base."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from token_sparse_attention.records import check_choice, check_keys, parse_object

_CONFIGS: dict[str, type[SparseConfig]] = {}  # the configs by the names of their methods


def check_int(name: str, value: object, minimum: int) -> None:
    """Raise TypeError or ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def single_precision(number: float) -> float:
    """Return a number as kernels take it, so that host and device round to the same count."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _sorted_numbers(name: str, given: object, what: str) -> tuple[int, ...]:
    """Return the numbers of layers or heads in ascending order."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be {what} numbers, got {given!r}")
    numbers = tuple(given)
    for number in numbers:
        check_int(name, number, 0)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} must not repeat a {what}, got {numbers}")
    return tuple(sorted(numbers))


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """What the settings of every method have in common.

    A subclass is a frozen dataclass that names its method: ``class MyConfig(SparseConfig,
    method="my_method")``. Its JSON form then begins with ``"method": "my_method"``.

    Args:
        dense_queries: how many of the last queries attend to every key.
        dense_heads: query heads of the layer whose queries all attend to every key.
        crossover: ``"auto"`` runs dense where sparse would not be faster, by a measured
            break-even; ``"off"`` ignores speed and runs dense only where the method must.
        sparse_layers: layers that may run sparse, None for all. Only integrations read it.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a field is out of range.
    """

    method: ClassVar[str] = ""
    calibrated_field: ClassVar[str] = ""  # which `tsa calibrate` chooses per layer
    calibrated_values: ClassVar[tuple[float, ...]] = ()  # that it tries
    dense_queries: int = 128
    dense_heads: tuple[int, ...] = ()
    crossover: str = "auto"
    sparse_layers: tuple[int, ...] | None = None

    def __init_subclass__(cls, method: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        taken = _CONFIGS.get(method)
        same = (cls.__module__, cls.__qualname__)  # a dataclass with slots is created twice
        if taken is not None and (taken.__module__, taken.__qualname__) != same:
            raise ValueError(f"method {method!r} is the name of {taken.__qualname__} already")
        cls.method = method
        _CONFIGS[method] = cls

    def __post_init__(self) -> None:
        check_int("dense_queries", self.dense_queries, 0)
        heads = _sorted_numbers("dense_heads", self.dense_heads, "head")
        object.__setattr__(self, "dense_heads", heads)
        check_choice("crossover", self.crossover, ("off", "auto"))
        if self.sparse_layers is not None:
            layers = _sorted_numbers("sparse_layers", self.sparse_layers, "layer")
            object.__setattr__(self, "sparse_layers", layers)
        # Made here because a compiler can read an attribute but not trace the encoder.
        object.__setattr__(self, "_text", json.dumps(self.to_dict(), separators=(",", ":")))

    @property
    def text(self) -> str:
        """The config as one line of JSON, in which it travels through PyTorch's operator."""
        text: str = self.__dict__["_text"]
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the method and the fields as JSON-ready values."""
        fields = {"method": self.method, **dataclasses.asdict(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def to_json(self) -> str:
        """Return the config as a JSON object.

        Example:
            >>> config_from_json(KVSamplingConfig().to_json()) == KVSamplingConfig()
            True
        """
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True, kw_only=True)
class KVSamplingConfig(SparseConfig, method="kv_sampling"):
    """Settings of the default method: a sliding window, sinks, and sampled keys.

    The fields of `SparseConfig` are fields here too; it says what is raised.

    No query is dropped. Queries come in blocks at absolute positions. Each attends to its
    sliding window, to the first keys, and to keys that its head samples for the block, by score,
    and weights by their inverse inclusion probability. Queries of the block before give the
    scores. So what a token's keys and values hold depends on the tokens before it alone, except
    for the last queries of a prompt, which attend to every key. See docs/how-it-works.md.

    Args:
        block_size: how many queries share their samples; a power of two, at least 16.
        num_probes: how many queries score a block's keys, evenly spread over the block before;
            a power of two, at most ``block_size``.
        sliding_window: width of the window in tokens, the query itself included; at least
            ``block_size``.
        sink_size: how many of the first keys every query attends to.
        num_samples: how many keys a head samples for a block; 0 for window and sinks alone.
        budget: ``"shared"`` gives every head ``num_samples`` samples, ``"per_head"`` as many on
            average: a quarter to each head, the rest in proportion to the attention that it
            gives to keys behind the window, at most four times the average.

    Source:
        An extension of arXiv 2602.03216; docs/how-it-works.md cites the closest ideas.

    Example:
        >>> KVSamplingConfig(num_samples=1024, sparse_layers=(3, 1)).sparse_layers
        (1, 3)
    """

    calibrated_field: ClassVar[str] = "num_samples"
    calibrated_values: ClassVar[tuple[float, ...]] = (1024, 2048, 4096)
    block_size: int = 2048
    num_probes: int = 16
    sliding_window: int = 2048
    sink_size: int = 4
    num_samples: int = 2048
    budget: str = "shared"

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 16)
        check_int("num_probes", self.num_probes, 1)
        for name in ("block_size", "num_probes"):
            if getattr(self, name).bit_count() != 1:
                raise ValueError(f"{name} must be a power of two, got {getattr(self, name)}")
        if self.num_probes > self.block_size:
            raise ValueError(
                f"num_probes must be at most block_size = {self.block_size}, got {self.num_probes}"
            )
        check_int("sliding_window", self.sliding_window, 1)
        if self.sliding_window < self.block_size:
            raise ValueError(
                f"sliding_window must be at least block_size = {self.block_size}, got "
                f"{self.sliding_window}"
            )
        check_int("sink_size", self.sink_size, 0)
        check_int("num_samples", self.num_samples, 0)
        check_choice("budget", self.budget, ("shared", "per_head"))
        super().__post_init__()

    @property
    def probe_stride(self) -> int:
        """The distance between two probes: probe t stands at ``(t + 1) * probe_stride - 1``."""
        return self.block_size // self.num_probes


@dataclass(frozen=True, kw_only=True)
class TokenSelectionConfig(SparseConfig, method="token_selection"):
    """Settings of Token Sparse Attention (arXiv 2602.03216); the defaults are the published ones.

    The fields of `SparseConfig` are fields here too; it says what is raised.

    Every head attends over its own selected tokens only: its queries, keys and values are
    gathered at them. `fallback="window"`, `budget="per_head"`, `keep_ratio`, `dense_queries`,
    `dense_heads` and the crossover are extensions that are off by default.

    Args:
        drop_mass: share of the attention mass that the dropped tokens may hold together, the
            paper's tau; in ``[0, 1)``, 0 means dense.
        observation_window: how many of the last queries score the tokens; these are always kept.
        pool_size: width of the average pooling that smooths the scores, in tokens; odd.
        min_tokens: never keep fewer scored tokens than this.
        budget: ``"shared"`` gives all heads of a sequence the same number of tokens (the
            paper's Dynamic Token Coverage), ``"per_head"`` applies the rule to each head.
        keep_ratio: keep this share of a sequence's tokens in place of the budget, the
            observation window included, in ``(0, 1]``; for benchmarks and ablations. The
            crossover, ``min_tokens`` and the rule for short contexts do not apply then.
        fallback: what a query that was not selected receives: ``"zero"``, as published, or
            ``"window"``, causal sliding-window attention over the uncompressed tokens.
        sliding_window: width of that window in tokens, the query itself included.

    Example:
        >>> TokenSelectionConfig().drop_mass, TokenSelectionConfig().observation_window
        (0.005, 128)
    """

    calibrated_field: ClassVar[str] = "drop_mass"
    calibrated_values: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.4)
    drop_mass: float = 0.005
    observation_window: int = 128
    pool_size: int = 7
    min_tokens: int = 1024
    budget: str = "shared"
    keep_ratio: float | None = None
    fallback: str = "zero"
    sliding_window: int = 512
    dense_queries: int = 0
    crossover: str = "off"

    def __post_init__(self) -> None:
        _check_number("drop_mass", self.drop_mass)
        if not (math.isfinite(self.drop_mass) and 0 <= self.drop_mass < 1):
            raise ValueError(f"drop_mass must be in [0, 1), got {self.drop_mass}")
        check_int("observation_window", self.observation_window, 1)
        check_int("pool_size", self.pool_size, 1)
        if self.pool_size % 2 == 0:
            raise ValueError(f"pool_size must be odd, got {self.pool_size}")
        check_int("min_tokens", self.min_tokens, 0)
        check_choice("budget", self.budget, ("shared", "per_head"))
        if self.keep_ratio is not None:
            _check_number("keep_ratio", self.keep_ratio)
            if not 0 < self.keep_ratio <= 1:
                raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        check_choice("fallback", self.fallback, ("zero", "window"))
        check_int("sliding_window", self.sliding_window, 1)
        super().__post_init__()


def config_from_dict(fields: Mapping[str, Any]) -> SparseConfig:
    """Build a config from `SparseConfig.to_dict` values; absent fields take their defaults.

    Without an entry ``method`` the values are those of the default method.

    Raises:
        ValueError: if the method or a field is unknown, or a value is out of range.
        TypeError: if a field has the wrong type.
    """
    method = fields.get("method", KVSamplingConfig.method)
    if not isinstance(method, str) or method not in _CONFIGS:
        raise ValueError(f"config method must be {' or '.join(_CONFIGS)}, got {method!r}")
    values = {name: value for name, value in fields.items() if name != "method"}
    known = {name: [one.name for one in dataclasses.fields(_CONFIGS[name])] for name in _CONFIGS}
    for name in values:
        others = [other for other in known if name in known[other]]
        if others and method not in others:
            raise ValueError(
                f"config has an entry {name!r}, which the method {method} does not have; "
                f'add "method": "{others[0]}" for that one'
            )
    check_keys("config", values, known[method])
    return _CONFIGS[method](**values)


@functools.lru_cache(maxsize=1024)
def config_from_json(text: str) -> SparseConfig:
    """Build a config from a JSON object, as `SparseConfig.to_json` writes it.

    Raises:
        ValueError: if the text is no JSON object, or has an unknown entry or bad value.
        TypeError: if an entry has the wrong type.

    Example:
        >>> config_from_json('{"method": "kv_sampling", "num_samples": 1024}').num_samples
        1024
    """
    return config_from_dict(parse_object("config", text))
