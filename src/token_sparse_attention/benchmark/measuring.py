"""What every measurement of `Record` shares: its device, and the file that grows meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from token_sparse_attention.benchmark.record import Record, ResultFile
from token_sparse_attention.errors import UsageError


def device_named(name: str) -> torch.device:
    """Return a device that works; ``"auto"`` is CUDA where there is one.

    Raises:
        UsageError: if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {error}") from error
    return device


def collect(
    measured: Iterable[Record],
    about: Mapping[str, Any],
    arguments: Mapping[str, Any],
    out: Path | None,
) -> ResultFile:
    """Return a run's records as they come, saved after each length.

    Args:
        measured: the records, those of one length after each other.
        about: provenance of the run.
        arguments: what was asked for.
        out: where to save, None for nowhere.

    Raises:
        UsageError: if the file cannot be written.
    """
    records: list[Record] = []
    for record in measured:
        if out and records and records[-1].seq_len != record.seq_len:
            ResultFile(about, arguments, tuple(records)).save(out, f"--out {out}")
        records.append(record)
    result = ResultFile(about, arguments, tuple(records))
    if out:
        result.save(out, f"--out {out}")
    return result
