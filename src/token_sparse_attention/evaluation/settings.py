"""What ``--config NAME=VALUE`` stands for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from token_sparse_attention.attention.names import parse_backend, pattern_config
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import DENSE, PATTERN
from token_sparse_attention.profile import PROFILE_FILE
from token_sparse_attention.settings import LEADING_PATTERN, Settings, read_settings


@dataclass(frozen=True)
class Configuration:
    """What one configuration of an evaluation runs.

    Attributes:
        settings: of token sparsity; None for none.
        pattern: the block-sparse pattern that every layer attends by, in the string form of
            `parse_backend`; None for dense kernels.
    """

    settings: Settings | None = None
    pattern: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON-ready values: with a pattern, all settings of that too.

        Without one these are the settings alone.
        """
        settings = None if self.settings is None else json.loads(self.settings.to_json())
        if self.pattern is None:
            return settings or {}
        name, config = self.pattern.partition(":")[0], pattern_config(self.pattern)
        fields = {} if config is None else dataclasses.asdict(config)
        return {PATTERN: {"name": name, **fields}, "settings": settings}


def read_runs(given: Sequence[str], model: str) -> dict[str, Configuration]:
    """Return named configurations, in order: token sparsity, a block-sparse pattern, or both.

    Args:
        given: ``NAME=VALUE`` or ``VALUE``: a value is what `read_settings` takes, ``PATTERN``
            or ``PATTERN+VALUE``. A pattern is a name, and after a colon its settings as JSON.
            A value without a name takes the keyword or the file's name. ``dense`` adds
            nothing, as that always runs. Without any, the model's own profile, or else the
            library's defaults.
        model: hub id or folder, whose profile ``profile`` is.

    Raises:
        UsageError: if a value cannot be used, or a name is taken.
    """
    found = {}
    for text, name, value in _named(given, model):
        pattern, rest = _split_pattern(text, value)
        settings = None if pattern and not rest else read_settings(rest, model, f"--config {text}")
        found[name] = Configuration(settings, pattern)
    return found


def _named(given: Sequence[str], model: str) -> Iterator[tuple[str, str, str]]:
    """Yield what was given, its name and its value."""
    if not given:
        given = ["profile" if os.path.isfile(Path(model) / PROFILE_FILE) else "default"]
    taken = {DENSE}
    for text in given:
        if text == DENSE:
            continue
        name, equals, value = text.partition("=")
        if not equals or "{" in name:
            begins = LEADING_PATTERN.match(text)
            pattern = begins[0] if begins else ""
            name = pattern + Path(text.removeprefix(pattern)).name.removesuffix(".json")
            value = text
        if not name or "{" in name:
            raise UsageError(f"--config must be NAME=VALUE where the value is JSON, got {text!r}")
        if name in taken:
            raise UsageError(f"--config: the name {name!r} is taken, give another one")
        taken.add(name)
        yield text, name, value


def _split_pattern(text: str, value: str) -> tuple[str | None, str]:
    """Return the pattern at the beginning of a value, in its string form, and the rest."""
    begins = LEADING_PATTERN.match(value)
    if begins is None:
        return None, value
    end = len(begins[1])
    try:
        if value[end : end + 1] == ":":
            end = json.JSONDecoder().raw_decode(value, end + 1)[1]
        pattern = parse_backend(value[:end])
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"--config {text} cannot be used: {error}") from error
    if end < len(value) and (value[end] != "+" or end + 1 == len(value)):
        raise UsageError(f"--config {text}: expected +VALUE after {value[:end]!r}")
    return pattern, value[end + 1 :]


def settings_dicts(
    configurations: Mapping[str, Configuration],
) -> dict[str, dict[str, object] | None]:
    """Return what a result file's header records of the configurations, the dense one first."""
    return {DENSE: None, **{name: run.to_dict() for name, run in configurations.items()}}
