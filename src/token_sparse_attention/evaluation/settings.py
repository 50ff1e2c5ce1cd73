"""What ``--config NAME=VALUE`` stands for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from token_sparse_attention.benchmark.record import UsageError
from token_sparse_attention.config import LayerProfile, TokenSparseConfig, load_config
from token_sparse_attention.evaluation.record import DENSE
from token_sparse_attention.run import PROFILE_FILE

PROFILES = Path(__file__).parent / "profiles"  # the layers that the paper lists for two models
Settings = TokenSparseConfig | LayerProfile


def keywords() -> list[str]:
    """Return the values that are names of settings."""
    return ["default", "published", "profile", *sorted(p.stem for p in PROFILES.glob("*.json"))]


def read_configurations(given: Sequence[str], model: str) -> dict[str, Settings]:
    """Return named settings, in order.

    Args:
        given: ``NAME=VALUE`` or ``VALUE``: a value is one of `keywords`, a JSON file, or JSON
            itself. A value without a name takes the keyword or the file's name.
            Without any, the model's own profile, or else the library's defaults.
        model: hub id or folder, whose profile ``profile`` is.

    Raises:
        UsageError: if a value cannot be used, or a name is taken.
    """
    if not given:
        given = ["profile" if (Path(model) / PROFILE_FILE).is_file() else "default"]
    found: dict[str, Settings] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or "{" in name:
            name, value = Path(text).name.removesuffix(".json"), text
        if not name or "{" in name:
            raise UsageError(f"--config must be NAME=VALUE where the value is JSON, got {text!r}")
        if name == DENSE or name in found:
            raise UsageError(f"--config: the name {name!r} is taken, give another one")
        try:
            found[name] = _read(value, model)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"--config {text} cannot be used: {error}") from error
    return found


def _read(value: str, model: str) -> Settings:
    if value.startswith("{"):
        return _parse(value)
    if value == "default":
        return TokenSparseConfig()
    if value == "published":
        return TokenSparseConfig.published()
    if value == "profile":
        path = Path(model) / PROFILE_FILE
        if not path.is_file():
            raise ValueError(f"the model {model} has no {PROFILE_FILE}")
        return load_config(path)
    if value in keywords():
        return load_config(PROFILES / f"{value}.json")
    if not Path(value).is_file():
        near = difflib.get_close_matches(value, keywords(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", nor one of {', '.join(keywords())}"
        raise ValueError(f"there is no file {value!r}{hint}")
    return load_config(value)


def _parse(text: str) -> Settings:
    try:
        is_profile = "version" in json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    return LayerProfile.from_json(text) if is_profile else TokenSparseConfig.from_json(text)


def settings_dicts(configurations: Mapping[str, Settings]) -> dict[str, dict[str, object] | None]:
    """Return what a result file's header records of the configurations, the dense one first."""
    dicts = {name: json.loads(config.to_json()) for name, config in configurations.items()}
    return {DENSE: None, **dicts}
