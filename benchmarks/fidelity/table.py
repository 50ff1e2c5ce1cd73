"""Means over prompts with standard errors, and differences from a reference by prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import NONE, markdown_table

from token_sparse_attention.fidelity.prompts import SHAPES

KINDS = tuple(SHAPES)
REFERENCE = "M 2048"


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a variant: by kind its mean, spread and interval, and its cost.

    Every variant is compared with `REFERENCE` on the documents that both have.
    """
    by: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        if "kinds" in record:
            by.setdefault(record["variant"], {})[record["document"]] = record
    rows = []
    for name, documents in by.items():
        if name == "dense":
            continue
        row: dict[str, Any] = {"variant": name, "documents": len(documents), "kinds": {}}
        for kind in KINDS:
            found = {i: d["kinds"][kind] for i, d in documents.items()}
            values = [one["kl"] for one in found.values()]
            other = {i: d["kinds"][kind]["kl"] for i, d in by.get(REFERENCE, {}).items()}
            ratio = _ratio([(one["kl"], other[i]) for i, one in found.items() if i in other])
            row["kinds"][kind] = {
                "kl": statistics.fmean(values),
                "standard_error": _error(values),
                "interval_95": _interval(values),
                "worst_prompt": max(values),
                "agreement": statistics.fmean(one["agreement"] for one in found.values()),
                "log_ratio": ratio and ratio[0],
                "log_ratio_error": ratio and ratio[1],
            }
        pooled = [
            [math.log(max(d["kinds"][kind]["kl"], 1e-6) / max(o["kinds"][kind]["kl"], 1e-6))
             for kind in KINDS]
            for i, d in documents.items() if (o := by.get(REFERENCE, {}).get(i))
        ]  # fmt: skip
        means = [statistics.fmean(one) for one in pooled]
        row["log_ratio"] = statistics.fmean(means) if means else None
        row["log_ratio_error"] = _error(means)
        costs = [d["kinds"]["cost"] for d in documents.values()]
        row["pairs"] = statistics.fmean(c["pairs"] for c in costs)
        row["scoring"] = statistics.fmean(c["scoring"] for c in costs)
        row["seconds"] = statistics.fmean(d["seconds"] for d in documents.values())
        rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of what `summarise` returned."""
    lines = [["variant", *KINDS, "of the reference", "agreement", "pairs", "scoring", "prompts"]]
    for row in rows:
        cells = [
            f"{k['kl']:.4f} ±{k['standard_error']:.4f}" for k in (row["kinds"][n] for n in KINDS)
        ]
        agreement = statistics.fmean(row["kinds"][n]["agreement"] for n in KINDS)
        ratio = NONE
        if row["log_ratio"] is not None:
            low, high = (
                math.exp(row["log_ratio"] + s * 1.96 * row["log_ratio_error"]) for s in (-1, 1)
            )
            ratio = f"{math.exp(row['log_ratio']):.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            [
                row["variant"],
                *cells,
                ratio,
                f"{agreement:.3f}",
                f"{row['pairs']:.3f}",
                f"{row['scoring']:.3f}",
                str(row["documents"]),
            ]
        )
    return markdown_table(lines)


def _error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _interval(values: Sequence[float]) -> tuple[float, float]:
    middle, half = statistics.fmean(values), 1.96 * _error(values)
    return middle - half, middle + half


def _ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the mean log of the ratio of pairs and its standard error."""
    logs = [math.log(max(a, 1e-6) / max(b, 1e-6)) for a, b in pairs]
    return (statistics.fmean(logs), _error(logs)) if logs else None
