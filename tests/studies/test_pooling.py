"""Several result files as one."""

from __future__ import annotations

import dataclasses
import gzip

import pytest
from benchmarks.pooling import beside, load_folder, pooled

from evaluation.results import HEADER, pair, results
from token_sparse_attention.evaluation.record import DENSE, EvalResults, save_results

OTHER = HEADER.configurations["sparse"] | {"drop_mass": 0.5}


def of_samples(digest, configurations, samples):
    header = dataclasses.replace(
        HEADER, arguments={"samples_sha256": digest}, configurations=configurations
    )
    return EvalResults(header, tuple(samples))


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


def test_configurations_stand_side_by_side():
    dense, sparse = pair(1.0, 0.5)
    further = dataclasses.replace(sparse, configuration="other", score=0.25)
    one = of_samples("a", HEADER.configurations, [dense, sparse])
    other = of_samples("a", {DENSE: None, "other": OTHER}, [dense, further])
    both = beside([one, other])
    assert list(both.header.configurations) == [DENSE, "sparse", "other"]
    assert both.samples == (dense, sparse, further), "dense once"


@pytest.mark.parametrize(
    ("digest", "configurations", "dense_score", "message"),
    [
        ("b", {DENSE: None}, 1.0, "same model and samples"),
        ("a", {DENSE: None, "sparse": OTHER}, 1.0, "what sparse is"),
        ("a", {DENSE: None}, 0.5, "differ in"),
    ],
)
def test_what_differs_does_not_stand_side_by_side(digest, configurations, dense_score, message):
    one = of_samples("a", HEADER.configurations, pair(1.0, 0.5))
    other = of_samples(digest, configurations, pair(dense_score, None)[:1])
    with pytest.raises(ValueError, match=message):
        beside([one, other])
