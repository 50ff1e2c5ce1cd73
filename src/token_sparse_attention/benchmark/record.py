"""One record type for every measurement, and the file that holds a run's records."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from token_sparse_attention.errors import UsageError

SCHEMA_VERSION = 1
SUITES = ("op", "prefill", "block", "far")
KERNEL_KINDS = ("graph", "events", "eager")  # what counts as kernel time, best first
KINDS = (*KERNEL_KINDS, "first_call", "memory", "skipped")


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        suite: ``"op"``, ``"prefill"``, ``"block"`` or ``"far"``.
        name: what ran, for example ``"dense/fa4"`` or ``"ours/score"``.
        kind: ``"graph"``: time on the device by replay of a CUDA graph; ``"events"``: time
            between CUDA events, where no graph could be captured; ``"eager"``: host clock from
            an idle device to an idle device; ``"first_call"``: what the first call at a
            length takes beyond a warm one; ``"memory"``; ``"skipped"``: see `note`.
        batch: B.
        num_heads: H.
        num_kv_heads: H_kv.
        head_dim: D.
        seq_len: S.
        dtype: of the tensors.
        kept: share of the tokens attended over; in the suite ``"block"`` the density, attended
            blocks over all causal blocks, a block on the diagonal counted as a whole one. None
            where that does not apply.
        drop_mass: the setting that decided `kept`, None where `kept` was given.
        median_ms: median time.
        low_ms: 20th percentile of the time.
        high_ms: 80th percentile of the time.
        samples: how many times were taken.
        peak_extra_mib: peak memory beyond what was allocated before the call and what the
            call returns.
        error: relative error against float64, the worst of the rows checked.
        passed: whether the check passed, None if there is none.
        note: what else to know.
    """

    suite: str
    name: str
    kind: str
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int
    dtype: str
    kept: float | None = None
    drop_mass: float | None = None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    peak_extra_mib: float | None = None
    error: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class ResultFile:
    """What one run measured, and where.

    Attributes:
        provenance: device, versions and commit when the measurement began.
        arguments: what the command was asked for.
        records: the measurements.
        version: of this format.
    """

    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    records: tuple[Record, ...]
    version: int = SCHEMA_VERSION

    @property
    def failures(self) -> list[Record]:
        """The records whose check failed."""
        return [record for record in self.records if record.passed is False]

    def to_json(self) -> str:
        """Return the file's content; records take one line each."""
        lines = ",\n".join(
            "    " + json.dumps(dataclasses.asdict(record), allow_nan=False)
            for record in self.records
        )
        head = {
            "version": self.version,
            "provenance": dict(self.provenance),
            "arguments": dict(self.arguments),
        }
        opened = json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
        return f'{opened},\n  "records": [\n{lines}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, source: str = "result file") -> ResultFile:
        """Build a result from `to_json`'s text.

        Raises:
            UsageError: if the text is no such file; the message names `source` and the entry.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{source} is not valid JSON: {error}") from error
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != fields:
            raise UsageError(f"{source} must be an object with {', '.join(sorted(fields))}")
        if content["version"] != SCHEMA_VERSION:
            raise UsageError(
                f"{source} must have version {SCHEMA_VERSION}, got {content['version']!r}"
            )
        for name, kind in (("provenance", dict), ("arguments", dict), ("records", list)):
            if not isinstance(content[name], kind):
                raise UsageError(f"{source}: {name} must be a {kind.__name__}")
        records = tuple(
            _read_record(fields, f"{source}: records[{index}]")
            for index, fields in enumerate(content["records"])
        )
        return cls(content["provenance"], content["arguments"], records, content["version"])

    def save(self, path: Path) -> None:
        """Write the file, and the folder it lies in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ResultFile:
        """Read a file that `save` wrote.

        Raises:
            UsageError: if it cannot be read or is none.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text, str(path))


def _read_record(fields: Any, where: str) -> Record:
    hints = get_type_hints(Record)
    if not isinstance(fields, dict):
        raise UsageError(f"{where} must be an object, got {fields!r}")
    if set(fields) != set(hints):
        wrong = ", ".join(sorted(set(fields) ^ set(hints)))
        raise UsageError(f"{where} has missing or unknown entries: {wrong}")
    for name, value in fields.items():
        check_type(value, get_args(hints[name]) or (hints[name],), f"{where}.{name}")
    for name, choices in (("suite", SUITES), ("kind", KINDS)):
        check_choice(fields[name], choices, f"{where}.{name}")
    return Record(**fields)


def check_type(value: object, allowed: tuple[type, ...], where: str) -> None:
    """Raise UsageError unless a value read from a file has one of some types.

    Args:
        value: the value.
        allowed: the types; float takes whole numbers too, and nothing takes bool but bool.
        where: what the message begins with.
    """
    if isinstance(value, bool):
        fits = bool in allowed
    elif isinstance(value, float) and not math.isfinite(value):
        fits = False
    else:
        fits = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
    if not fits:
        wanted = " or ".join("null" if a is NoneType else a.__name__ for a in allowed)
        raise UsageError(f"{where} must be {wanted}, got {value!r}")


def check_choice(value: str, choices: tuple[str, ...], where: str) -> None:
    """Raise UsageError unless a value read from a file is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{where} must be one of {', '.join(choices)}; got {value!r}")
