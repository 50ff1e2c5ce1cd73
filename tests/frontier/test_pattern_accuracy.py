"""The table of patterns beside token sparsity."""

from __future__ import annotations

from benchmarks.block_sparse.accuracy import table

from evaluation.results import pair, results


def test_accuracy_and_the_median_of_the_speed_ups_stand_side_by_side():
    of = results(*pair(1.0, 1.0), *pair(1.0, 0.0, index=1))
    length = of.samples[0].length
    times = {"samples": [{"length": length, "speed_up": {"sparse": x}} for x in (2.0, 3.0, 7.0)]}
    times["samples"].append({"length": length + 1, "speed_up": {"sparse": 99.0}})
    rows = table(of, times).splitlines()[2:]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert cells[1:4] == ["sparse", "0.500 of 1.000", "-0.500"]
    assert cells[5] == "2"
    assert cells[-2:] == ["3.00x", "3"]
    assert "| - | 0 |" in table(of, {"samples": []})
