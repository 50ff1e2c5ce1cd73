"""Results of a released model: several files about the same prompts, and the page's tables."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.released import page
from benchmarks.released.join import joined

from fidelity.test_summary import HEADER, answer
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    Choice,
    HeadSensitivity,
    LayerSetting,
    PromptLength,
    Sensitivity,
)
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.fidelity.record import FidelityResults
from token_sparse_attention.profile import LayerProfile

FIRST = FidelityResults(
    HEADER,
    (
        *(answer(0, name, [0.2], [1.0]) for name in ("dense", "a", "b")),
        *(answer(1, name, [0.4], [3.0]) for name in ("dense", "a")),  # cut off here
    ),
)
OTHER = FidelityResults(
    dataclasses.replace(
        HEADER, configurations={"dense": None, "c": KVSamplingConfig(num_samples=16).to_dict()}
    ),
    tuple(answer(i, name, [0.1], [9.0]) for i in range(3) for name in ("dense", "c")),
)


def test_results_about_the_same_prompts_are_one_for_the_pieces_that_the_first_finished():
    both = joined([FIRST, OTHER])
    assert list(both.header.configurations) == ["dense", "a", "b", "c"]
    assert [one.key for one in both.answers] == [
        (100, "lookup", 0, name) for name in ("dense", "a", "b", "c")
    ]
    assert both.answers[0].loss == [1.0]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"texts": {"other": "0"}}, "texts"),
        ({"arguments": {"model": "another"}}, "model"),
        ({"arguments": {**HEADER.arguments, "seed": 1}}, "seed"),
        ({"configurations": {"dense": None, "a": OTHER.header.configurations["c"]}}, "'a'"),
    ],
)
def test_results_about_other_prompts_are_not_joined(changes, names):
    other = dataclasses.replace(OTHER, header=dataclasses.replace(OTHER.header, **changes))
    with pytest.raises(ValueError, match=names):
        joined([FIRST, other])


def test_the_tables_of_divergence():
    every, a, b, c = page.divergence([joined([FIRST, OTHER])])
    assert [len(line) for line in (a, b, c)] == [len(every)] * 3
    assert (a[0], a[2], c[2]) == ("a", "0.2000", "0.1000")
    assert (a[3], c[3], c[-1]) == ("1.00", "0.50", "1")
    assert page.dense_loss([FIRST])[1][1:] == ["as released", "-", "-", "-", "2.000", "-"]
    assert [line[3] for line in page.by_length([OTHER])] == ["settings", "c"]


def test_the_tables_of_a_calibration():
    base = KVSamplingConfig()
    few, more = (LayerSetting("num_samples", count) for count in (256, 1024))
    result = CalibrationResult(
        method="sensitivity", model="m", dtype="bfloat16", provenance={}, arguments={}, base=base,
        prompts=(PromptLength(100, 1),),
        sensitivity=(
            Sensitivity(0, few, 0.5, None, 0.1, 0.2, 1),
            Sensitivity(0, more, 0.25, 0.125, 0.1, 0.3, 1),
            Sensitivity(0, dataclasses.replace(more, dense_heads=(1,)), 0.1, None, 0.1, 0.4, 1),
        ),
        heads=(HeadSensitivity(0, 1, more, 0.2, None), HeadSensitivity(0, 0, more, 0.1, None)),
        choices=(Choice("target_speedup", 4.0, LayerProfile(base, {0: {}}), 0.5, work=0.2),),
    )  # fmt: skip
    assert page.choices([result])[1] == ["2,048", "1/4", "0.200", "0.5000", "-", "1"]
    assert page.layers([result]) == [
        ["layer", "window 2,048, 256", "window 2,048, 1,024"],
        ["0", "0.50000", "0.25000 ±0.12500"],
    ]
    assert page.heads([result])[1] == ["0", "1,024", "1: 0.20000, 0: 0.10000"]


def test_what_the_results_page_says_of_the_calibration():
    measured = page.CalibrationResult.load(page.RESULTS / "quarter.measured.json")
    cost = {
        one.layer: one.divergence
        for one in measured.sensitivity
        if one.setting.value == 1024 and not one.setting.dense_heads
    }
    assert len(cost) == 24
    dearest = sorted(cost, key=cost.__getitem__)[-2:]
    assert sorted(dearest) == [9, 11]
    assert 2 * sum(cost[layer] for layer in dearest) > sum(cost.values())
    (choice,) = measured.choices
    assert choice.work == pytest.approx(0.25, abs=0.01)
    layers = choice.profile.layers
    assert set(range(24)) - set(layers) == {9, 11}
    half = KVSamplingConfig().num_samples // 2
    more = [number for number, changes in layers.items() if changes["num_samples"] > half]
    assert len(more) == 1, "nearly all of the others"
