"""What ``--config VALUE`` stands for: settings by name, in a file, or written out."""

from __future__ import annotations

import re
from pathlib import Path

from token_sparse_attention.config import KVSamplingConfig, SparseConfig, TokenSelectionConfig
from token_sparse_attention.errors import UsageError, did_you_mean
from token_sparse_attention.profile import (
    PROFILE_FILE,
    LayerProfile,
    load_config,
    settings_from_json,
)

PROFILES = Path(__file__).parent / "evaluation" / "profiles"  # the paper's layers of two models
# Of block-sparse patterns; named here because their modules import torch.
PATTERN_NAMES = ("flexprefill", "minference", "xattention", "streaming")
LEADING_PATTERN = re.compile(rf"({'|'.join(PATTERN_NAMES)})(?:$|:|\+)")  # that a value begins with
Settings = SparseConfig | LayerProfile


def keywords() -> list[str]:
    """Return the values that are names of settings."""
    return ["default", "published", "profile", *sorted(p.stem for p in PROFILES.glob("*.json"))]


def default_config(model: str) -> tuple[Settings, str]:
    """Return the settings for a model, and in words where they come from.

    Raises:
        UsageError: if the model folder's own profile cannot be used.
    """
    profile = Path(model) / PROFILE_FILE
    try:
        if profile.is_file():
            return load_config(profile), f"{PROFILE_FILE} of the model"
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{profile} cannot be used: {error}; --config default leaves it out"
        ) from error
    return KVSamplingConfig(), "the library's defaults"


def read_settings(value: str, model: str, given: str | None = None) -> Settings:
    """Return settings of token sparsity.

    Args:
        value: one of `keywords`, a JSON file, or JSON itself.
        model: hub id or folder, whose profile ``profile`` is.
        given: what errors call it, if it is not ``--config VALUE``.

    Raises:
        UsageError: if the value cannot be used.
    """
    try:
        return _settings(value, model)
    except (OSError, ValueError, TypeError) as error:
        given = given or f"--config {value}"
        raise UsageError(f"{given} cannot be used: {error}") from error


def settings_or_default(value: str | None, model: str) -> tuple[Settings, str]:
    """Return `read_settings` of a value, or without one `default_config`; and their source."""
    if value is None:
        return default_config(model)
    return read_settings(value, model), value


def _settings(value: str, model: str) -> Settings:
    if value.startswith("{"):
        return settings_from_json(value, "it")
    if value == "default":
        return KVSamplingConfig()
    if value == "published":
        return TokenSelectionConfig()
    if value == "profile":
        path = Path(model) / PROFILE_FILE
        if not path.is_file():
            raise ValueError(f"the model {model} has no {PROFILE_FILE}")
        return load_config(path)
    if value in keywords():
        return load_config(PROFILES / f"{value}.json")
    if not Path(value).is_file():
        hint = did_you_mean(value, [*keywords(), *PATTERN_NAMES])
        if LEADING_PATTERN.match(value):
            hint = "; a block-sparse pattern holds no settings of token sparsity"
        none = f", nor one of {', '.join(keywords())}"
        raise ValueError(f"there is no file {value!r}{hint or none}")
    return load_config(value)
