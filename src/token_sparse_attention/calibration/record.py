"""What a calibration measured and chose, and the file that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from token_sparse_attention.benchmark.record import check_choice, check_type
from token_sparse_attention.config import LayerProfile, TokenSparseConfig
from token_sparse_attention.errors import UsageError

SCHEMA_VERSION = 4  # 2 knew no heads, 3 no single prompts of a choice
METHODS = ("drift", "sensitivity", "both")
GOALS = ("drift_quantile", "divergence_budget", "target_speedup")
DROP_MASSES = (0.05, 0.1, 0.2, 0.4)  # tried by default where queries are selected
SAMPLES = (1024, 4096, 16384)  # and where they are not
SETTINGS = ("drop_mass", "fallback_samples")
Row = TypeVar("Row")


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
        name: the field of `TokenSparseConfig`: ``"drop_mass"``, or ``"fallback_samples"`` where
            the base settings select no queries.
        value: of that field; a whole number for samples.
        dense_heads: heads that it leaves dense besides.

    Example:
        >>> str(LayerSetting("fallback_samples", 1024, (3,)))
        'fallback_samples 1024, dense heads 3'
    """

    name: str
    value: float
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
        kept_share: share of the tokens that heads kept, averaged over prompts; of those that
            every query sees besides its window, where the base settings select no queries.
        work: mean over heads and prompts of ``(S' / S)^2``; where no queries are selected, of
            the pairs of a query and a key that are attended to, as a share of all causal ones.
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
    profile: LayerProfile
    summed_divergence: float | None = None
    divergence: float | None = None
    standard_error: float | None = None
    work: float | None = None
    steps_moved: int = 0
    prompt_divergences: tuple[float, ...] = ()


@dataclass(frozen=True)
class CalibrationResult:
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
        version: of this format.
    """

    method: str
    model: str
    dtype: str
    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    base: TokenSparseConfig
    prompts: tuple[PromptLength, ...]
    drift: tuple[LayerDrift, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    heads: tuple[HeadSensitivity, ...] = ()
    choices: tuple[Choice, ...] = ()
    failure: str = ""
    version: int = SCHEMA_VERSION

    @property
    def profile(self) -> LayerProfile | None:
        """The profile to run with, None if the goal is out of reach."""
        return None if self.failure or not self.choices else self.choices[-1].profile

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("prompts", "drift", "sensitivity", "heads"):
            content[name] = [dataclasses.asdict(row) for row in content[name]]
        content["choices"] = [
            {**_fields(choice), "profile": json.loads(choice.profile.to_json())}
            for choice in self.choices
        ]
        content["base"] = self.base.to_dict()
        content["provenance"] = dict(self.provenance)
        content["arguments"] = dict(self.arguments)
        return {"version": content.pop("version"), **content}

    def to_json(self) -> str:
        """Return the file's content."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "calibration") -> CalibrationResult:
        """Build a result from `to_json`'s text.

        Raises:
            UsageError: if the text is no such file; the message names `source` and the
                entry.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{source} is not valid JSON: {error}") from error
        if isinstance(content, dict) and content.get("version") in (2, 3):
            content = {"heads": [], **content, "version": SCHEMA_VERSION}
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise UsageError(f"{source} must be an object with {', '.join(sorted(names))}")
        if content["version"] != SCHEMA_VERSION:
            raise UsageError(
                f"{source} must have version {SCHEMA_VERSION}, got {content['version']!r}"
            )
        for name in ("model", "dtype", "failure", "method"):
            check_type(content[name], (str,), f"{source}: {name}")
        for name in ("provenance", "arguments", "base"):
            check_type(content[name], (dict,), f"{source}: {name}")
        check_choice(content["method"], METHODS, f"{source}: method")
        rows: dict[str, type[Any]] = {
            "prompts": PromptLength,
            "drift": LayerDrift,
            "sensitivity": Sensitivity,
            "heads": HeadSensitivity,
            "choices": Choice,
        }
        for name, kind in rows.items():
            check_type(content[name], (list,), f"{source}: {name}")
            content[name] = tuple(
                _read_row(kind, fields, f"{source}: {name}[{index}]")
                for index, fields in enumerate(content[name])
            )
        try:
            content["base"] = TokenSparseConfig.from_dict(content["base"])
        except (ValueError, TypeError) as error:
            raise UsageError(f"{source}: base: {error}") from error
        return cls(**content)

    @classmethod
    def load(cls, path: Path) -> CalibrationResult:
        """Read a file that holds `to_json`'s text.

        Raises:
            UsageError: if it cannot be read or is none.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text, str(path))


def _fields(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def _read_row(kind: type[Row], fields: Any, where: str) -> Row:
    hints = get_type_hints(kind)
    check_type(fields, (dict,), where)
    values = {"prompt_divergences": [], **fields} if kind is Choice else dict(fields)
    _check_names(values, hints, where)
    if "profile" in values:
        try:
            values["profile"] = LayerProfile.from_json(json.dumps(values["profile"]))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{where}.profile: {error}") from error
    if "setting" in values:
        values["setting"] = _read_setting(values["setting"], f"{where}.setting")
    for name, value in values.items():
        kinds = get_args(hints[name]) or (hints[name],)
        if get_origin(hints[name]) is tuple:
            values[name] = _read_list(value, kinds[0], f"{where}.{name}")
        else:
            check_type(value, kinds, f"{where}.{name}")
    if "goal" in values:
        check_choice(values["goal"], GOALS, f"{where}.goal")
    return kind(**values)


def _read_setting(fields: Any, where: str) -> LayerSetting:
    check_type(fields, (dict,), where)
    values = {"dense_heads": [], **fields}
    _check_names(values, get_type_hints(LayerSetting), where)
    name, value, heads = values["name"], values["value"], values["dense_heads"]
    check_type(name, (str,), f"{where}.name")
    check_choice(name, SETTINGS, f"{where}.name")
    check_type(value, (int if name == "fallback_samples" else float,), f"{where}.value")
    return LayerSetting(name, value, _read_list(heads, int, f"{where}.dense_heads"))


def _read_list(values: Any, kind: type[Any], where: str) -> tuple[Any, ...]:
    check_type(values, (list,), where)
    for value in values:
        check_type(value, (kind,), where)
    return tuple(values)


def _check_names(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    if set(given) != set(known):
        wrong = ", ".join(sorted(set(given) ^ set(known)))
        raise UsageError(f"{where} has missing or unknown entries: {wrong}")
