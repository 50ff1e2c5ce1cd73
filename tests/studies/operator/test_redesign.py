"""What DESIGN.md says of the operator before and after the rebuild, from the committed times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROWS = json.loads((ROOT / "benchmarks/results/redesign/operator-h200.json").read_text())["rows"]
DESIGN = " ".join((ROOT / "DESIGN.md").read_text(encoding="utf-8").split())
SAMPLING = [row for row in ROWS if row["name"] == "sampling"]


def less(ratio):
    return f"{1 - ratio:.0%}".removesuffix("%")


def test_both_methods_were_measured_at_both_shapes():
    measured = {(row["heads"], row["S"], row["name"]) for row in ROWS}
    for heads in (14, 32):
        for name in ("sampling", "selection", "selection windows"):
            assert {(heads, 32768, name), (heads, 131072, name)} <= measured


def test_the_outputs_are_the_same():
    assert {row["difference"] for row in ROWS} == {0.0}


def test_no_graph_takes_two_percent_longer():
    worst = max(row["graph ratio"] for row in ROWS)
    assert worst < 1.02
    assert f"no graph takes more than {worst - 1:.1%} longer" in DESIGN
    assert all(row["graph ratio"] < 1 for row in SAMPLING)


def test_the_host_takes_less_time():
    ratios = [row["host ratio"] for row in SAMPLING]
    assert f"falls by {less(max(ratios))} to {less(min(ratios))}%" in DESIGN
    (short,) = (row for row in SAMPLING if (row["heads"], row["S"]) == (14, 16384))
    assert f"takes {less(short['wall ratio'])}% less time" in DESIGN


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['heads']}-{row['S']}-{row['name']}")
def test_ratios_are_those_of_the_times(row):
    for kind in ("graph", "wall", "host"):
        ratio = row[f"new {kind}"] / row[f"old {kind}"]
        assert ratio == pytest.approx(row[f"{kind} ratio"], rel=1e-3)
