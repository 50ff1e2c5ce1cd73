"""What `tsa bench` prints of a run."""

from __future__ import annotations

import pytest

from studies.synthetic import changed, op_result, prefill_result
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.benchmark.show import COLUMNS, show, times


def lines(result):
    found = [dict(zip(COLUMNS, cells, strict=True)) for cells in times(Run("", result))]
    return {(one["what"], one["clock"], one["setting"]): one for one in found}


def test_every_record_is_a_line_beside_dense_attention():
    result = op_result()
    found = lines(result)
    assert len(found) == len(result.records)
    whole = found["ours/whole", "graph", "50% kept"]
    assert (whole["tokens"], whole["ms"], whole["dense / this"]) == ("128K", "56", "3.88x")
    assert found["dense/fa4", "graph", ""]["dense / this"] == "1.00x"
    assert found["ours/attend", "graph", "50% kept"]["dense / this"] == "-", "a stage"
    assert found["ours/whole", "memory", "50% kept"]["extra MiB"] == "512"
    assert found["dense/flex", "skipped", ""]["ms"] == "OutOfMemoryError"
    assert found["crossover/ours", "graph", "drop_mass 0.005"]["dense / this"] == "0.86x"


def test_a_models_first_token_is_compared_with_the_dense_model():
    found = lines(prefill_result())
    assert found["samples-4096/all", "eager", ""]["dense / this"] == "3.00x"


@pytest.mark.parametrize("name", ["ours/whole", "dense/fa4"])
def test_nothing_rests_on_a_failed_check(name):
    result = changed(op_result(), name, passed=False)
    found = lines(result)
    setting = "50% kept" if name == "ours/whole" else ""
    assert found[name, "graph", setting]["ms"] == "check failed"
    assert found["ours/whole", "graph", "50% kept"]["dense / this"] == "-"


def test_failed_checks_are_named(capsys):
    result = changed(op_result(), "ours/whole", passed=False, note="error 0.5 above [0.1]")
    show(Run("", result))
    printed = capsys.readouterr().out.replace("\n", "")
    assert "check failed: ours/whole at 131,072 tokens, 50% kept: error 0.5 above [0.1]" in printed
