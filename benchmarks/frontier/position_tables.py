"""Tables of `positions`: what a layer's error costs by place and head, and where heads look."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.markdown import markdown_table, mean_cell

_PLACES = {
    "everywhere": "everywhere",
    "sentence": "in the answer's sentences",
    "name": "there, its name",
    "answer": "there, the answer",
    "elsewhere": "everywhere else",
}
Rows = Sequence[Mapping[str, Any]]


def load_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the samples of all files in a folder.

    Raises:
        ValueError: if they are of other samples or settings, or have a sample twice.
    """
    headers, rows = [], []
    for path in sorted(folder.glob("*.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        header, *others = map(json.loads, lines)
        headers.append({key: header[key] for key in ("model", "samples_sha256", "config")})
        rows += others
    if any(header != headers[0] for header in headers):
        raise ValueError("files of one folder must be of the same model, samples and settings")
    keys = [(row["task"], row["length"], row["index"]) for row in rows]
    if len(set(keys)) != len(keys):
        raise ValueError("files of one folder must not have a sample twice")
    return rows


def by_place(rows: Rows, tasks: Mapping[str, str]) -> str:
    """What each layer costs where it alone is sparse, in nats, by the places."""
    lines = [["prompts", "layer", *_PLACES.values()]]
    for task, name in tasks.items():
        chosen = [row for row in rows if row["task"] == task]
        for layer in sorted(chosen[0]["layers"], key=int) if chosen else ():
            lines.append([name, layer, *(_more(chosen, layer, place) for place in _PLACES)])
    return markdown_table(lines)


def by_head(rows: Rows, task: str, layer: str) -> str:
    """What each head of a layer costs where it alone is sparse, and where it looks."""
    chosen = [row for row in rows if row["task"] == task]
    lines = [["head", "nats", "own sentence", "near", "far", "the same token", "after the same"]]
    for head in range(len(chosen[0]["looks"][0]["own"])):
        looks = [row["looks"][int(layer)] for row in chosen]
        shares = [fmean(look[kind][head] for look in looks) for kind in looks[0]]
        more = _more(chosen, layer, f"head {head}")
        lines.append([str(head), more, *(f"{share:.2f}" for share in shares)])
    return markdown_table(lines)


def by_layer(rows: Rows, tasks: Mapping[str, str]) -> str:
    """The head of each layer that looks most at the query's own token, and at what follows it."""
    head = ["layer"]
    for name in tasks.values():
        head += [f"the same token, {name}", f"after the same, {name}"]
    lines = [head]
    for layer in range(len(rows[0]["looks"])):
        cells = [str(layer)]
        for task in tasks:
            looks = [row["looks"][layer] for row in rows if row["task"] == task]
            cells += [f"{_most(looks, kind):.2f}" for kind in ("same", "after")]
        lines.append(cells)
    return markdown_table(lines)


def _most(looks: Sequence[Mapping[str, Sequence[float]]], kind: str) -> float:
    """The mean share of the head that has the largest."""
    return max(map(fmean, zip(*(look[kind] for look in looks), strict=True)))


def _more(rows: Rows, layer: str, variant: str) -> str:
    """By how much less likely the answer becomes, with its standard error."""
    return mean_cell([row["layers"][layer][variant] - row["dense"] for row in rows])
