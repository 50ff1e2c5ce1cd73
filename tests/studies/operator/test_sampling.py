"""The study of KV sampling: what it measures, its check, and its tables."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from benchmarks import summary
from benchmarks.markdown import EMPTY, build
from benchmarks.operator import sampling
from benchmarks.operator.sampling_tables import SAMPLING_TABLES, part_shares

from studies.synthetic import S, changed, sampling_result
from token_sparse_attention.benchmark.record import ResultFile
from token_sparse_attention.benchmark.runs import Run

SMALL = '{"block_size": 64, "num_probes": 16, "sliding_window": 64, "num_samples": 32}'
ARGUMENTS = ["--device", "cpu", "--dtype", "float32", "--budget-seconds", "0.001"]
ARGUMENTS += ["--shapes", "4/2/16,3/1/8", "--lengths", "64,640", "--config", SMALL]
PARTS = ["score", "sample", "windows", "attend"]


def rows(name, of):
    lines = build(name, [Run("run", of)], SAMPLING_TABLES).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_part_is_measured_at_every_shape_and_length(tmp_path):
    out = tmp_path / "sampling.json"
    assert sampling.main([*ARGUMENTS, "--commit", "abc", "--out", str(out)]) == 0
    result = ResultFile.load(out)
    assert result.arguments["config"]["crossover"] == "off"
    assert result.arguments["config"]["num_samples"] == 32
    whole = ["dense", "whole", "crossover on", "whole without dense queries"]
    found = [(one.num_heads, one.seq_len, one.name) for one in result.records]
    wanted = [(heads, 64, name) for heads in (4, 3) for name in whole]
    wanted += [(heads, 640, name) for heads in (4, 3) for name in (*whole, *PARTS)]
    assert sorted(found) == sorted(wanted), "a prompt of one block runs dense"
    assert all(one.passed for one in result.records if one.name in whole)
    assert {row[1] for row in rows("sampling", result)} == {"4/2 of 16", "3/1 of 8"}
    assert len(rows("sampling-parts", result)) == 2


def test_tables_say_what_was_measured():
    (row,) = rows("sampling", sampling_result())
    assert row == [
        *("run", "32/8 of 128", "128K", "202", "25.2", "25 to 25.5", "8.00x", "10.00x"),
        *("2.00x", "512"),
    ]
    shares = part_shares(Run("run", sampling_result()), S)
    assert shares == pytest.approx([part / 20 for part in (2, 1, 10, 5, 1, 1)])
    shown = rows("sampling-parts", sampling_result())[0]
    assert shown == ["run", "32/8 of 128", "128K", "10%", "5%", "50%", "25%", "5%", "5%"]
    text = summary.one_layer([Run("run", sampling_result())])
    assert "| 32/8 of 128 | eager calls | 8.00x |" in text
    assert "| 32/8 of 128 | CUDA graph | 10.00x |" in text
    assert "| 32/8 of 128 | eager calls, crossover on | 2.00x |" in text
    assert summary.one_layer([]) == EMPTY + "\n"


def test_aims_are_met_or_missed():
    (speed, share, memory, slower) = rows("sampling-aims", sampling_result())
    assert (speed[1], speed[2]) == ("8.00x", "**missed**")
    assert (share[1], share[2]) == ("15%", "**met**")
    assert (memory[1], memory[2]) == ("0.50 GiB", "**met**")
    assert (slower[1], slower[2]) == ("-50.0% (-101000 us) at 128K", "**met**")
    late = changed(sampling_result(), "crossover on", "eager", median_ms=207.0)
    assert rows("sampling-aims", late)[3][1:3] == ["+2.5% (+5000 us) at 128K", "**missed**"]
    little = changed(sampling_result(), "crossover on", "eager", median_ms=202.04)
    assert rows("sampling-aims", little)[3][2] == "**met**"


def test_nothing_is_claimed_without_a_passed_check():
    wrong = changed(sampling_result(), "whole", "eager", passed=False)
    (row,) = rows("sampling", wrong)
    assert row[4:7] == ["**check failed**"] * 3
    assert row[7] == "10.00x"
    assert rows("sampling-aims", wrong)[0][1:3] == ["**check failed**", "**missed**"]


def test_a_wrong_output_fails_the_check(monkeypatch, capsys):
    def wrong(query, *_, **__):
        return torch.zeros_like(query)

    monkeypatch.setattr(sampling, "token_sparse_attention", wrong)
    assert sampling.main(ARGUMENTS) == 1
    assert "check failed: relative error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dense", "fa4"], "--dense: attention_backend 'fa4'"),
        (["--shapes", "32/8"], "--shapes must be like 32/8/128, got '32/8'"),
        (["--config", '{"sliding_window": 5}'], "--config: sliding_window must be at least"),
        (["--config", '{"method": "token_selection"}'], "must be of the method kv_sampling"),
    ],
)
def test_what_cannot_run_is_refused(arguments, message, capsys):
    assert sampling.main([*ARGUMENTS, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_too_little_memory_is_noted(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(sampling, "_measure_point", out_of_memory)
    options = sampling.SamplingOptions(
        *(torch.device("cpu"), torch.float32, sampling._config(SMALL), "flash", 0.001)
    )
    (skipped,) = sampling.measure(options, [sampling.Shape(2, 1, 8)], [640])
    assert (skipped.kind, skipped.note) == ("skipped", "OutOfMemoryError: too large")


def test_it_needs_neither_rich_nor_lm_eval():
    code = "import sys; sys.modules.update(dict.fromkeys(('rich', 'lm_eval', 'transformers')))"
    code += "; import benchmarks.operator.sampling"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_records_of_other_studies_are_left_out():
    other = dataclasses.replace(sampling_result().records[0], suite="op")
    result = dataclasses.replace(sampling_result(), records=(other,))
    assert build("sampling", [Run("run", result)], SAMPLING_TABLES) == EMPTY + "\n"
