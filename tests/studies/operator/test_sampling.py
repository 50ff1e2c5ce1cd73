"""Sampled keys: what it measures, its tables, and costs as numbers of keys."""

from __future__ import annotations

import math
import re

import pytest
import torch
from benchmarks.markdown import build
from benchmarks.operator import sampling
from benchmarks.operator.sampling_tables import SAMPLING_TABLES, dense_query_keys, sampling_keys

from studies.synthetic import S, changed, far_result
from token_sparse_attention.benchmark import checks, op
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import ResultFile
from token_sparse_attention.benchmark.runs import NoFigureError, Run

FAR = ["--device", "cpu", "--dtype", "float32", "--budget-seconds", "0.001"]
FAR += ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--lengths", "640"]
FAR += ["--samples", "16,64", "--sinks", "20", "--dense-queries", "8"]
SETTINGS = ("sinks-20", "samples-16", "samples-64", "samples-64-per-head")


def rows(name, of):
    lines = build(name, [Run("run", of)], SAMPLING_TABLES).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_costs_are_keys_per_query_of_dense_time():
    run = Run("run", far_result())
    assert sampling_keys(run, S, "samples-4096") == pytest.approx((4 + 9 - 3) / 200 * S)
    assert dense_query_keys(run, S, 128) == pytest.approx(2 / 200 * S / 128)


def test_tables_say_what_was_measured():
    assert rows("far-settings", far_result()) == [
        ["run", "128K", "window", "-", "3", "4", "50.00x", "-"],
        ["run", "128K", "samples-4096", "4", "9", "14", "14.29x", "6,554"],
        ["run", "128K", "samples-4096-dense-128", "-", "-", "16", "12.50x", "-"],
    ]
    assert rows("far-stages", far_result()) == [
        ["run", "128K", "dense, fa4", "200", "131,072"],
        ["run", "128K", "score", "0.5", "328"],
        ["run", "128K", "windows, window", "3", "1,966"],
        ["run", "128K", "128 dense queries", "2", "1,311: 10.2 each"],
    ]


def test_nothing_is_claimed_without_a_passed_check():
    wrong = changed(far_result(), "far/whole/samples-4096", passed=False)
    assert rows("far-settings", wrong)[1][5:] == ["**check failed**"] * 3
    assert rows("far-stages", wrong)[3][3:] == ["**check failed**"] * 2
    with pytest.raises(NoFigureError, match="check failed"):
        sampling_keys(Run("run", wrong), S, "samples-4096")
    with pytest.raises(NoFigureError, match="not measured"):
        dense_query_keys(Run("run", far_result()), S, 64)
    base = changed(far_result(), "far/dense/fa4", passed=False)
    assert rows("far-settings", base)[1][6:] == ["**check failed**"] * 2
    assert rows("far-stages", base)[1][4] == "**check failed**"


def test_every_setting_and_stage_is_measured(tmp_path):
    assert sampling.main([*FAR, "--out", str(tmp_path / "far.json")]) == 0
    printed = ResultFile.load(tmp_path / "far.json")
    assert printed.arguments["command"] == "benchmarks.operator.sampling"
    assert printed.arguments["samples"] == [16, 64]
    assert {(entry.suite, entry.kind) for entry in printed.records} == {("far", "eager")}
    whole = ("window", *SETTINGS, "samples-64-dense-8")
    assert [entry.name for entry in printed.records] == [
        *("far/dense/flash", "far/score"),
        *(f"far/draw/{name}" for name in SETTINGS),
        *(f"far/windows/{name}" for name in ("window", *SETTINGS)),
        *(f"far/whole/{name}" for name in whole),
    ]
    checked = [entry.name for entry in printed.records if entry.passed]
    assert checked == ["far/dense/flash", *(f"far/whole/{name}" for name in whole)]
    run = Run("run", printed)
    assert all(math.isfinite(sampling_keys(run, 640, name)) for name in SETTINGS)


def test_settings_are_what_their_names_say():
    common = OpOptions(device="cpu", lengths=(640,), backends=("flash",))
    found = sampling.SamplingOptions(common, (16, 64), (30,), (8,)).settings()
    shown = {name: (c.sink_size, c.num_samples, c.dense_queries) for name, c in found.items()}
    assert shown == {
        "window": (0, 0, 0),
        "sinks-30": (30, 0, 0),
        "samples-16": (0, 16, 0),
        "samples-64": (0, 64, 0),
        "samples-64-per-head": (0, 64, 0),
        "samples-64-dense-8": (0, 64, 8),
    }
    assert {c.budget for name, c in found.items() if "per-head" in name} == {"per_head"}
    assert {(c.sliding_window, c.crossover) for c in found.values()} == {(512, "off")}
    alone = sampling.SamplingOptions(common, (), (), (8,)).settings()
    assert list(alone) == ["window", "window-dense-8"]


def test_a_failed_check_exits_1(capsys, monkeypatch):
    monkeypatch.setattr(checks, "exact_rows", lambda *given: torch.ones(len(given[2]), 1))
    assert sampling.main(FAR) == 1
    printed = capsys.readouterr().out
    assert "check failed" in printed
    assert not re.search(r"\d\.\d\dx", printed)


def test_what_cannot_run_is_noted_or_refused(tmp_path, capsys, monkeypatch):
    assert sampling.main([*FAR, "--dense", "fa4"]) == 2
    assert "--dense: attention_backend 'fa4'" in capsys.readouterr().err
    assert sampling.main([*FAR, "--lengths", "100"]) == 2
    assert "lengths must exceed 128" in capsys.readouterr().err

    def timed(_, *contenders, **__):
        if contenders[0].name.startswith("far/whole"):
            raise torch.OutOfMemoryError("too large")
        return iter(())

    monkeypatch.setattr(op.Point, "timed", timed)
    assert sampling.main([*FAR, "--out", str(tmp_path / "far.json")]) == 0
    (skipped,) = ResultFile.load(tmp_path / "far.json").records
    assert (skipped.kind, skipped.note) == ("skipped", "OutOfMemoryError: too large")
