"""Tables, figures and aims from result files."""

from __future__ import annotations

import re
from functools import partial

import pytest
from benchmarks.markdown import EMPTY, Page, fill
from benchmarks.markdown import build as build_table
from benchmarks.operator.charts import FIGURES, draw
from benchmarks.operator.tables import TABLES
from benchmarks.operator.targets import TARGETS, outcomes

from studies.synthetic import S, changed, op_result, prefill_result
from token_sparse_attention.benchmark.runs import NoFigureError, Run
from token_sparse_attention.errors import UsageError

BLANK = "".join(f"## {name}\n<!-- begin {name} -->\n<!-- end {name} -->\n" for name in TABLES)


def build(name, runs):
    return build_table(name, runs, TABLES)


def runs(op=None):
    return [Run("fast", op or op_result()), Run("model", prefill_result())]


def cells(name, op=None):
    lines = build(name, runs(op)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}, "every row has every column"
    return rows[2:]


def test_every_table_says_what_was_measured():
    assert cells("dense") == [["fast", "128K", "217 (649)", "424 (332)", "OutOfMemoryError"]]
    assert cells("stages") == [
        ["fast", "128K", "50%", "0.5", "0.2", "0.9", "0.4", "2", "54", "3.7%", "56", "2"]
    ]
    assert cells("whole-dense") == [["fast", "128K", "fa4: 217", "56 (3.88x)"]]
    assert cells("whole-eager") == [["fast", "128K", "122, 56.1 (2.17x)"]]
    assert cells("fallback") == [["fast", "128K", "1.7", "2.8", "4"]]
    assert cells("memory") == [["fast", "128K", "50%", "512", "-", "2,048", "4,608", "+0.2%"]]
    assert cells("first-call") == [["fast", "128K", "50%", "5", "4.95", "5.05", "5"]]
    assert cells("crossover") == [
        ["fast", "1K", "0.005", "100.0%", "0.06", "+10 us (+16.7%)", "-"]
    ]
    assert cells("prefill")[1] == ["model", "128K", "all", "50%", "4,500", "2.00x", "-"]
    sampled = ["model", "128K", "all", "4,096 samples", "3,000", "3.00x", "-"]
    assert cells("prefill")[3] == sampled
    device, commit, versions = cells("runs")[0][1:4]
    assert (device, commit, versions) == ("Abacus 9000", "`0123456789ab`", "torch 9.9")


def test_aims_are_met_or_missed():
    found = {aim: (measured, verdict) for aim, measured, verdict, _ in outcomes(runs())}
    assert len(found) == len(TARGETS)
    assert [verdict for _, verdict in found.values()] == [
        *("met", "met", "met", "not measured", "missed", "met", "met", "met", "met", "missed")
    ]
    assert found[TARGETS[0].aim][0] == "2.00 ms, 3.7%"
    assert found[TARGETS[4].aim][0] == "4.00 ms"
    assert found[TARGETS[7].aim][0] == "at worst +16.7% (+10 us) at 1K"


def test_aims_can_be_missed():
    slow = changed(op_result(), "ours/gather", median_ms=3.0)
    assert next(iter(outcomes(runs(slow))))[2] == "missed"
    late = changed(op_result(), "crossover/ours", median_ms=0.09)
    assert list(outcomes(runs(late)))[7][2] == "missed"


@pytest.mark.parametrize("passed", [False, None])
def test_nothing_is_claimed_without_a_passed_check(passed, tmp_path):
    word = "check failed" if passed is False else "-"
    wrong = changed(op_result(), "ours/whole", passed=passed)
    wrong = changed(wrong, "ours/whole", "eager", passed=passed)
    for name in ("whole-dense", "whole-eager"):
        assert word in cells(name, wrong)[0][-1]
        assert "x)" not in build(name, runs(wrong))
    assert "%" not in cells("stages", wrong)[0][9]
    assert not {"met", "missed"} & {row[2] for row in list(outcomes(runs(wrong)))[:6]}
    with pytest.raises(NoFigureError):
        draw("whole-dense", runs(wrong), tmp_path / "figure.svg")
    base = changed(op_result(), "dense/fa4", passed=passed)
    assert word in cells("whole-dense", base)[0][-1]
    with pytest.raises(NoFigureError):
        Run("", base).dense(S)


def test_runs_are_never_compared_with_each_other():
    op = op_result()
    dense, ours = (
        type(op)(op.provenance, op.arguments, tuple(r for r in op.records if keep(r)))
        for keep in (lambda r: "dense" in r.name, lambda r: "dense" not in r.name)
    )
    text = build("whole-dense", [Run("a", dense), Run("b", ours)])
    assert "x)" not in text


def test_pages_are_made_anew(tmp_path):
    tables = {name: build(name, runs()) for name in TABLES}
    page = Page(tmp_path / "page.md", tables, {"dense": partial(draw, "dense", runs())})
    page.path.write_text(BLANK)
    once = page.files()
    assert set(once) == {page.path, tmp_path / "figures" / "dense.svg"}
    assert "217 (649)" in once[page.path]
    page.path.write_text(once[page.path])
    assert page.files() == once
    assert page.markers() == list(TABLES)
    assert sum(build(name, []) == EMPTY + "\n" for name in TABLES) == len(TABLES) - 1, "aims stay"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("# Empty\n", "must have markers .* got none"),
        ("<!-- begin wishes -->\n<!-- end wishes -->\n", "got wishes"),
    ],
)
def test_pages_without_known_markers_are_refused(page, message):
    with pytest.raises(UsageError, match=message):
        fill(page, {"dense": ""})


def test_figures_are_the_same_each_time(tmp_path):
    drawn = {}
    for name in FIGURES:
        for again in ("once", "again"):
            draw(name, runs(), path := tmp_path / f"{name}-{again}.svg")
            drawn[name, again] = path.read_text(encoding="utf-8")
        assert drawn[name, "once"] == drawn[name, "again"]
    for label in ("50% kept, all layers", "4,096 samples, all layers"):
        assert label in drawn["prefill", "once"]
    for svg in drawn.values():
        assert svg.startswith("<?xml")
        assert not re.search(r"<dc:date>|\d{4}-\d\d-\d\d", svg)
    with pytest.raises(NoFigureError):
        draw("dense", [], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
