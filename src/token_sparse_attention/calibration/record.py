"""What a calibration measured and chose, and the file that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from token_sparse_attention.config import SparseConfig, config_from_dict
from token_sparse_attention.profile import LayerProfile
from token_sparse_attention.records import JsonFile, check_choice, encode

METHODS = ("drift", "sensitivity", "both")
GOALS = ("drift_quantile", "divergence_budget", "target_speedup")


@dataclass(frozen=True)
class PromptLength:
    """How long a calibration prompt was.

    Attributes:
        tokens: of the prompt.
        continuation_tokens: of the reply that divergence was measured along.
    """

    tokens: int
    continuation_tokens: int


@dataclass(frozen=True)
class LayerDrift:
    """One layer's drift.

    Attributes:
        layer: layer number.
        relative: mean over prompts of the token-mean of
            ``||h_out - h_in|| / (||h_in|| + 1e-8)``.
        drift: `relative` divided by its sum over the layers.
        standard_error: of `drift` over prompts; None with one prompt.
        at_or_below: whether `drift` is at or below the quantile asked for.
    """

    layer: int
    relative: float
    drift: float
    standard_error: float | None
    at_or_below: bool


@dataclass(frozen=True)
class LayerSetting:
    """What one layer changes of the base settings.

    Attributes:
        name: the base config's ``calibrated_field``.
        value: of that field.
        dense_heads: heads that it leaves dense.

    Example:
        >>> str(LayerSetting("num_samples", 1024, (3,)))
        'num_samples 1024, dense heads 3'
    """

    name: str
    value: int | float
    dense_heads: tuple[int, ...] = ()

    def __str__(self) -> str:
        dense = ", ".join(map(str, self.dense_heads))
        return f"{self.name} {self.value}" + (f", dense heads {dense}" if dense else "")

    @property
    def changes(self) -> dict[str, Any]:
        """The overrides of a `LayerProfile`."""
        heads = {"dense_heads": list(self.dense_heads)} if self.dense_heads else {}
        return {self.name: self.value, **heads}


@dataclass(frozen=True)
class Sensitivity:
    """What one layer does to the model when it alone is sparse.

    Attributes:
        layer: layer number.
        setting: what it changed of the base settings.
        divergence: KL(dense || sparse) of the next-token logits in nats, averaged over the
            positions of each prompt and over prompts; 0 for prompts where the layer ran dense.
        standard_error: of `divergence` over prompts; None with one prompt.
        kept_share: share of the tokens that the method chose for the heads, averaged over
            prompts; for KV sampling of sinks and samples.
        work: pairs of a query and a key that are attended to, as a share of all causal ones;
            mean over heads and prompts.
        sparse_prompts: on how many prompts the layer ran sparse.
        note: why it ran dense on the others.
    """

    layer: int
    setting: LayerSetting
    divergence: float
    standard_error: float | None
    kept_share: float
    work: float
    sparse_prompts: int
    note: str = ""


@dataclass(frozen=True)
class HeadSensitivity:
    """What one head does to the model when it alone is sparse.

    Attributes:
        layer: layer number.
        head: head number.
        setting: what its layer changed of the base settings.
        divergence: as in `Sensitivity`.
        standard_error: of `divergence` over prompts; None with one prompt.
    """

    layer: int
    head: int
    setting: LayerSetting
    divergence: float
    standard_error: float | None


@dataclass(frozen=True)
class Choice:
    """Layers and settings that were chosen, and what was measured of them together.

    Attributes:
        goal: ``"drift_quantile"``, ``"divergence_budget"`` or ``"target_speedup"``.
        value: what was asked for.
        profile: the choice, with the crossover that was asked for.
        summed_divergence: sum of the layers' own divergences; None where these were not
            measured.
        divergence: KL of all chosen layers together, as in `Sensitivity`, measured with the
            crossover off; None if it was not measured.
        standard_error: of `divergence` over prompts.
        prompt_divergences: what `divergence` is the mean of, prompt by prompt; none if it was
            not measured.
        work: mean over layers, heads and prompts of the work, as in `Sensitivity`, measured
            together.
        steps_moved: by how many steps, of one layer each, the measured combination differs
            from the one that the layers alone promised: back for a budget, on for a target.
    """

    goal: str
    value: float
    profile: LayerProfile | Any  # `Any`, which lets msgspec pass its JSON on
    summed_divergence: float | None = None
    divergence: float | None = None
    standard_error: float | None = None
    work: float | None = None
    steps_moved: int = 0
    prompt_divergences: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("goal", self.goal, GOALS)
        if not isinstance(self.profile, LayerProfile):
            profile = LayerProfile.from_json(encode(self.profile))
            object.__setattr__(self, "profile", profile)


@dataclass(frozen=True)
class CalibrationResult(JsonFile):
    """One calibration: what was asked, what was measured, what was chosen.

    Attributes:
        method: ``"drift"``, ``"sensitivity"`` or ``"both"``.
        model: hub id or folder.
        dtype: of the model.
        provenance: device, versions and commit.
        arguments: what the command was asked for.
        base: the settings that every layer starts from.
        prompts: their lengths.
        drift: one entry per layer, none if not measured.
        sensitivity: one entry per layer and setting, none if not measured; those of layers
            some of whose heads are dense come last.
        heads: one entry per head of the layers that were measured head by head.
        choices: drift's and then sensitivity's; the last is the result. None if the goal is
            out of reach.
        failure: why there is no choice; empty if there is.
    """

    VERSIONS: ClassVar = (5,)
    method: str
    model: str
    dtype: str
    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    base: SparseConfig | Any  # as `Choice.profile`
    prompts: tuple[PromptLength, ...]
    drift: tuple[LayerDrift, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    heads: tuple[HeadSensitivity, ...] = ()
    choices: tuple[Choice, ...] = ()
    failure: str = ""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if not isinstance(self.base, SparseConfig):
            if not isinstance(self.base, dict):
                raise ValueError(f"base must be an object, got {self.base!r}")
            try:
                base = config_from_dict(self.base)
            except (ValueError, TypeError) as error:
                raise ValueError(f"base: {error}") from error
            object.__setattr__(self, "base", base)
        for name in ("sensitivity", "heads"):
            for number, row in enumerate(getattr(self, name)):
                self._check_setting(f"{name}[{number}].setting", row.setting)

    def _check_setting(self, where: str, setting: LayerSetting) -> None:
        name = self.base.calibrated_field
        if setting.name != name:
            raise ValueError(f"{where}: name must be {name}, as base has it; got {setting.name!r}")
        try:
            config_from_dict({**self.base.to_dict(), **setting.changes})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    @property
    def profile(self) -> LayerProfile | None:
        """The profile to run with, None if the goal is out of reach."""
        return None if self.failure or not self.choices else self.choices[-1].profile
