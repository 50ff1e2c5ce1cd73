"""What a calibration is to measure and to reach; apart, so that a help needs no torch."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Literal

from token_sparse_attention.calibration.record import METHODS, LayerSetting
from token_sparse_attention.config import (
    SparseConfig,
    TokenSelectionConfig,
    config_from_dict,
)
from token_sparse_attention.options import HIDDEN, CountFrom0, Option


def _number(text: str) -> float:
    """Read a value; a whole number stays one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise ValueError(f"must be numbers like 1024,4096 or 0.1,0.5, got {text!r}")


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure, and what the choice should reach.

    Attributes:
        method: ``drift``: how far layers move tokens (the paper's); ``sensitivity``: what each
            one's sparsity does to the model's predictions; ``both``: sensitivity decides, and
            drift's choice is measured beside it.
        base: the settings that every layer starts from; its ``sparse_layers`` must be None.
        drift_quantile: layers at or below this quantile of the drift become sparse.
        values: sensitivity: what to try in each layer: values of ``num_samples``, or of
            ``drop_mass`` where the settings select tokens.
        heads_of: sensitivity: measure the N costliest layers head by head too, and leave single
            heads of theirs dense where that is worth it.
        divergence_budget: sensitivity: KL in nats that all chosen layers may cost together:
            one of the two goals.
        target_speedup: sensitivity: how many times less attention work to aim at: the other.
        max_reply: measure along this many tokens of the model's own reply, where the prompt
            brings no continuation; 0: after the prompt only.
        impl: see `token_sparse_attention`.
        attention_backend: the kernel of sparse layers, one of `BACKENDS`: a pattern would add
            its own divergence to that of token sparsity.

    Raises:
        ValueError: if a field is out of range or does not go with `base`, or sensitivity has
            not exactly one goal.
    """

    method: Literal["drift", "sensitivity", "both"]
    base: Annotated[SparseConfig, HIDDEN] = field(default_factory=TokenSelectionConfig)
    drift_quantile: Annotated[float, Option(metavar="Q")] = 0.5
    values: Annotated[
        tuple[float, ...] | None,
        Option(default="1024,4096,16384 samples; 0.05,0.1,0.2,0.4 of the mass", read=_number),
    ] = None
    heads_of: CountFrom0 = 0
    divergence_budget: float | None = None
    target_speedup: float | None = None
    max_reply: Annotated[CountFrom0, Option("--reply-tokens")] = 32
    impl: Annotated[str, HIDDEN] = "auto"
    attention_backend: Annotated[str, HIDDEN] = "auto"

    def __post_init__(self) -> None:
        from token_sparse_attention.attention.resolve import check_backend  # imports torch

        check_backend(self.attention_backend)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.base.sparse_layers is not None:
            raise ValueError(
                "sparse_layers must be null in the base settings, because calibration chooses "
                f"the layers; got {list(self.base.sparse_layers)}"
            )
        if not 0 <= self.drift_quantile <= 1:
            raise ValueError(f"drift_quantile must be in [0, 1], got {self.drift_quantile}")
        if self.max_reply < 0:
            raise ValueError(f"max_reply must be at least 0, got {self.max_reply}")
        if self.method == "drift":
            unused = {
                "divergence_budget": self.divergence_budget,
                "target_speedup": self.target_speedup,
                "values": self.values,
                "heads_of": self.heads_of or None,
            }
            given = [name for name, value in unused.items() if value is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(unused)} need method sensitivity or both; "
                    f"method drift got {', '.join(given)}"
                )
            return
        goals = [self.divergence_budget, self.target_speedup]
        if goals.count(None) != 1:
            raise ValueError(
                f"method {self.method} needs one goal, divergence_budget or target_speedup; "
                f"got {'both' if None not in goals else 'neither'}"
            )
        budget, speedup = self.divergence_budget, self.target_speedup
        if budget is not None and not (math.isfinite(budget) and budget >= 0):
            raise ValueError(f"divergence_budget must be at least 0, got {budget}")
        if speedup is not None and not (math.isfinite(speedup) and speedup >= 1):
            raise ValueError(f"target_speedup must be at least 1, got {speedup}")
        self._check_settings()

    def _check_settings(self) -> None:
        import torch

        from token_sparse_attention.methods import method_of

        name, values = self.base.calibrated_field, self.values
        if not name:
            raise ValueError(f"base must be of a method with a calibrated_field, got {self.base}")
        if values is not None:
            if not values:
                raise ValueError("values must hold at least one number, got none")
            if len(set(values)) != len(values):
                raise ValueError(f"values must not repeat a number, got {values}")
            for value in values:
                config = config_from_dict({**self.base.to_dict(), name: value})
                gate = method_of(config).gate(torch.device("cpu"), num_heads=1, head_dim=64)
                if gate.always is not None:
                    raise ValueError(f"values: {name} {value} never runs sparse: {gate.always}")
        if self.heads_of < 0:
            raise ValueError(f"heads_of must be at least 0, got {self.heads_of}")

    @property
    def settings(self) -> tuple[LayerSetting, ...]:
        """What sensitivity tries in each layer."""
        values = self.base.calibrated_values if self.values is None else self.values
        return tuple(LayerSetting(self.base.calibrated_field, value) for value in values)

    @property
    def goal(self) -> tuple[str, float]:
        """What the choice should reach: its name in `record.GOALS`, and its value."""
        if self.divergence_budget is not None:
            return "divergence_budget", self.divergence_budget
        if self.target_speedup is not None:
            return "target_speedup", self.target_speedup
        return "drift_quantile", self.drift_quantile
