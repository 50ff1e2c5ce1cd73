"""The calibration file: what is written is read back, and nothing else is."""

from __future__ import annotations

import dataclasses
import json

import pytest

from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    Choice,
    HeadSensitivity,
    LayerDrift,
    LayerSetting,
    PromptLength,
    Sensitivity,
)
from token_sparse_attention.errors import UsageError

PROFILE = LayerProfile(TokenSelectionConfig(drop_mass=0.1), {1: {"drop_mass": 0.4}, 3: {}})
RESULT = CalibrationResult(
    method="both",
    model="some/model",
    dtype="bfloat16",
    provenance={"device": "a device", "versions": {"torch": "2"}, "commit": None},
    arguments={"length": 4096, "text": ["a.txt"]},
    base=TokenSelectionConfig(drop_mass=0.1),
    prompts=(PromptLength(4096, 32), PromptLength(4096, 7)),
    drift=(LayerDrift(0, 1.5, 0.75, 0.01, False), LayerDrift(1, 0.5, 0.25, None, True)),
    sensitivity=(
        Sensitivity(0, LayerSetting("drop_mass", 0.1), 1e-4, None, 0.8, 0.7, 2, "too short"),
        Sensitivity(1, LayerSetting("drop_mass", 0.2), 1e-4, None, 0.8, 0.7, 2),
    ),
    heads=(HeadSensitivity(1, 3, LayerSetting("drop_mass", 0.2, (0, 2)), 1e-4, None),),
    choices=(
        Choice("drift_quantile", 0.5, PROFILE),
        Choice("divergence_budget", 0.01, PROFILE, 0.008, 0.009, 0.001, 0.6, 2, (0.002, 0.016)),
    ),
)
SAMPLING = dataclasses.replace(
    RESULT,
    base=KVSamplingConfig(),
    sensitivity=(Sensitivity(1, LayerSetting("num_samples", 512), 1e-4, None, 0.8, 0.7, 2),),
    heads=(),
)


def test_results_survive_the_file(tmp_path):
    path = tmp_path / "profile.measured.json"
    for result, number in ((RESULT, float), (SAMPLING, int)):
        path.write_text(result.to_json())
        assert CalibrationResult.load(path) == result
        values = [row.setting.value for row in CalibrationResult.load(path).sensitivity]
        assert {type(value) for value in values} == {number}
    assert RESULT.profile == PROFILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=4), "this file must have version 5, got 4"),
        (lambda c: c.pop("drift"), "has no entry 'drift'"),
        (lambda c: c.update(extra=1), "unknown entry 'extra'"),
        (lambda c: c.update(method="guess"), "method must be one of drift"),
        (lambda c: c.update(model=3), "model must be str, got 3"),
        (lambda c: c["base"].update(drop_mass=2), "base: drop_mass must be in"),
        (lambda c: c["prompts"][1].update(tokens="4"), r"prompts\[1\].tokens must be int"),
        (lambda c: c["drift"][0].pop("relative"), r"drift\[0\] has no entry 'relative'"),
        (lambda c: c["drift"][0].update(at_or_below=1), r"drift\[0\].at_or_below must be bool"),
        (lambda c: c["sensitivity"][0].update(layer=True), r"layer must be int, got True"),
        (lambda c: c["sensitivity"].append(3), r"sensitivity\[2\] must be object, got 3"),
        (
            lambda c: c["sensitivity"][0].update(setting=0.1),
            r"\[0\].setting must be object, got 0.1",
        ),
        (
            lambda c: c["sensitivity"][0]["setting"].update(name="pool_size"),
            r"sensitivity\[0\].setting: name must be drop_mass, as base has it; got 'pool_size'",
        ),
        (
            lambda c: c["sensitivity"][1]["setting"].update(value=1.5),
            r"sensitivity\[1\].setting: drop_mass must be in \[0, 1\), got 1.5",
        ),
        (
            lambda c: c["heads"][0]["setting"].update(value=1.5),
            r"heads\[0\].setting: drop_mass must be in \[0, 1\), got 1.5",
        ),
        (lambda c: c["sensitivity"][0]["setting"].pop("name"), r"setting has no entry 'name'"),
        (
            lambda c: c["heads"][0]["setting"].update(dense_heads=[0.5]),
            r"heads\[0\].setting.dense_heads\[0\] must be int, got 0.5",
        ),
        (
            lambda c: c["heads"][0]["setting"].update(dense_heads=3),
            r"heads\[0\].setting.dense_heads must be array, got 3",
        ),
        (lambda c: c["choices"][0].update(goal="x"), r"choices\[0\]: goal must be one of"),
        (
            lambda c: c["choices"][1].update(prompt_divergences=[0.1, "x"]),
            r"choices\[1\].prompt_divergences\[1\] must be float, got 'x'",
        ),
        (
            lambda c: c["choices"][1].update(prompt_divergences=0.1),
            r"choices\[1\].prompt_divergences must be array, got 0.1",
        ),
        (lambda c: c["choices"][1]["profile"].update(version=9), r"choices\[1\]: profile version"),
    ],
)
def test_anything_else_is_refused_by_name(change, message):
    content = json.loads(RESULT.to_json())
    change(content)
    with pytest.raises(UsageError, match=message):
        CalibrationResult.from_json(json.dumps(content), "this file")


def test_samples_are_whole_numbers():
    content = json.loads(SAMPLING.to_json())
    content["sensitivity"][0]["setting"]["value"] = 0.5
    with pytest.raises(UsageError, match=r"\[0\].setting: num_samples must be an int, got 0.5"):
        CalibrationResult.from_json(json.dumps(content))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone.json cannot be read"):
        CalibrationResult.load(tmp_path / "gone.json")
    with pytest.raises(UsageError, match="this file is not valid JSON"):
        CalibrationResult.from_json("{", "this file")
    text = RESULT.to_json().replace("0.0001", "NaN")
    with pytest.raises(UsageError, match="NaN is no JSON number"):
        CalibrationResult.from_json(text)
