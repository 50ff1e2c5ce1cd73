"""Tables of what makes answers likely again, on results made here."""

from __future__ import annotations

import dataclasses
import math

import pytest
from benchmarks.frontier import restored

from evaluation.results import HEADER, pair
from token_sparse_attention import KVSamplingConfig
from token_sparse_attention.evaluation.record import EvalResults

BASE = KVSamplingConfig(crossover="off").to_dict()


def profile(layers):
    return {"version": 2, "base": BASE, "layers": layers}


def results(nats):
    """Nats of prompts 0, 1, ... by configuration, None where one was not run."""
    configurations = {name: None if name == "dense" else BASE for name in nats}
    header = dataclasses.replace(HEADER, configurations=configurations)
    dense, sparse = pair(1.0, 1.0)
    samples = tuple(
        dataclasses.replace(
            dense if name == "dense" else sparse,
            configuration=name,
            index=index,
            reply=str(value),
            score=math.exp(-value),
        )
        for name, of in nats.items()
        for index, value in enumerate(of)
        if value is not None
    )
    return EvalResults(header, samples)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_points_are_compared_on_the_prompts_that_both_have():
    found = cells(
        restored.table(results({"dense": [1.0, 2.0, 9.0], "all": [1.5, 4.0, None]}), "dense")
    )
    assert found[0][:2] == ["what is attended to", "nats"]
    (row,) = found[2:]
    assert row[0] == "4,096 samples"
    assert row[1] == "+1.25 ± 0.75 (2)"
    assert row[2] == "1 of 2"  # half a nat is not over half a nat
    lost = (math.exp(-1.5) - math.exp(-1.0) + math.exp(-4.0) - math.exp(-2.0)) / 2
    assert row[3] == f"{lost:+.3f}"
    assert float(row[4].split(" to ")[0]) < lost < float(row[4].split(" to ")[1])


def test_only_the_points_that_are_asked_for_are_shown():
    one = results({"dense": [1.0, 2.0], "all": [1.0, 2.0], "more": [0.5, 1.0]})
    assert [row[1] for row in cells(restored.table(one, "all"))[2:]] == [
        "+0.00 ± 0.00 (2)",
        "-0.75 ± 0.25 (2)",
    ]
    assert len(cells(restored.table(one, "all", ["more"]))) == 3


def test_a_prompt_that_only_the_other_point_has_is_left_out():
    one = results({"dense": [1.0, 2.0, 9.0], "all": [1.5, 4.0, None]})
    (row,) = cells(restored.table(one, "all"))[2:]
    assert row[:3] == ["dense", "-1.25 ± 0.75 (2)", "0 of 2"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "dense"),
        (BASE, "4,096 samples"),
        (BASE | {"sliding_window": 8192}, "4,096 samples, window 8,192"),
        (profile({"0": {}, "2": {}}), "layer 1 dense"),
        (profile({"2": {}}), "layers 0, 1 dense"),
        (
            profile({"0": {}, "1": {"dense_heads": [4]}, "2": {"dense_heads": [0, 2]}}),
            "head 4 of layer 1 dense, heads 0, 2 of layer 2 dense",
        ),
        (
            profile({"0": {}, "1": {"num_samples": 16384}, "2": {"num_samples": 16384}}),
            "16,384 samples in layers 1, 2",
        ),
    ],
)  # fmt: skip
def test_what_differs_is_said(settings, said):
    assert restored.differs(settings, 3) == said
