"""Several result files as one."""

from __future__ import annotations

import dataclasses
import gzip

import pytest
from benchmarks.pooling import load_folder, pooled

from evaluation.results import pair, results
from token_sparse_attention.evaluation.record import EvalResults, save_results


def test_a_folder_gives_its_results_by_name_compressed_or_not(tmp_path):
    one, other = results(*pair(1.0, 1.0)), results(*pair(1.0, 0.0, index=1))
    for name, of in (("b", one), ("a-1.5", other)):
        save_results(tmp_path / f"{name}.jsonl", of)
    plain = tmp_path / "a-1.5.jsonl"
    (tmp_path / "a-1.5.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    (tmp_path / "replay.json").write_text("not a result")
    found = load_folder(tmp_path)
    assert list(found) == ["a-1.5", "b"]
    assert found["a-1.5"].samples == other.samples


def test_results_are_pooled_where_they_agree():
    one, other = results(*pair(1.0, 1.0)), results(*pair(1.0, 0.0, index=1))
    both = pooled([one, other])
    assert both.header == one.header
    assert both.samples == (*one.samples, *other.samples)
    with pytest.raises(ValueError, match="twice"):
        pooled([one, one])
    header = dataclasses.replace(other.header, configurations={"dense": None})
    with pytest.raises(ValueError, match="agree in configurations"):
        pooled([one, EvalResults(header, other.samples)])
