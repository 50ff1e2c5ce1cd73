"""What ``--config VALUE`` stands for: settings by name, in a file, or written out."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.config import KVSamplingConfig, SparseConfig, TokenSelectionConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.profile import (
    PROFILE_FILE,
    LayerProfile,
    load_config,
    settings_from_json,
)

PROFILES = Path(__file__).parent / "evaluation" / "profiles"  # the paper's layers of two models
LEADING_PATTERN = re.compile(rf"({'|'.join(PATTERNS)})(?:$|:|\+)")  # that a value begins with
Settings = SparseConfig | LayerProfile


def keywords() -> list[str]:
    """Return the values that are names of settings."""
    return ["default", "published", "profile", *sorted(p.stem for p in PROFILES.glob("*.json"))]


def read_settings(value: str, model: str, given: str | None = None) -> Settings:
    """Return settings of token sparsity.

    Args:
        value: one of `keywords`, a JSON file, or JSON itself.
        model: hub id or folder, whose profile ``profile`` is.
        given: what errors call the value, if it was part of something longer.

    Raises:
        UsageError: if the value cannot be used.
    """
    try:
        return _settings(value, model)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--config {given or value} cannot be used: {error}") from error


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
        near = difflib.get_close_matches(value, [*keywords(), *PATTERNS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", nor one of {', '.join(keywords())}"
        if LEADING_PATTERN.match(value):
            hint = "; a block-sparse pattern holds no settings of token sparsity"
        raise ValueError(f"there is no file {value!r}{hint}")
    return load_config(value)
