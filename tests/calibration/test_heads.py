"""Heads: which ones are measured, what is tried with them dense, and what is chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from calibration.test_sensitivity import KEYS, SAMPLES, samples, sharp_model
from integrations.models import LAYERS, make_ids
from token_sparse_attention.calibration import sensitivity
from token_sparse_attention.calibration.heads import (
    costliest_layers,
    measure_heads,
    numbers_of_dense_heads,
)
from token_sparse_attention.calibration.job import calibrate, choose_again
from token_sparse_attention.calibration.options import CalibrationOptions
from token_sparse_attention.calibration.prompts import Prompt
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    LayerSetting,
    Sensitivity,
)
from token_sparse_attention.calibration.show import draw, layer_table, sentences
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.methods import method_of

COSTLY, HEAD = 1, 2  # of three layers and four heads


def one_head_matters():
    """A model whose layers but one do nothing, and that one by one head alone."""
    model = sharp_model()
    size = model.config.head_dim
    for number, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight
        kept = weight[:, HEAD * size : (HEAD + 1) * size].clone()
        weight.zero_()
        if number == COSTLY:
            weight[:, HEAD * size : (HEAD + 1) * size] = kept
    return model


def options(**changes):
    return CalibrationOptions(**KEYS | {"values": (8, 48), "max_reply": 3} | changes)


def test_layers_are_examined_by_what_they_cost_where_they_see_most():
    def row(layer, count, cost, sparse=1):
        return Sensitivity(layer, LayerSetting("num_samples", count), cost, None, 0, 0, sparse)

    rows = [row(0, 8, 9.0), row(0, 48, 1.0), row(1, 48, 3.0), row(1, 8, 0.0), row(2, 48, 0.0)]
    rows += [row(3, 8, 2.0), row(3, 900, 0.0, sparse=0)]
    assert costliest_layers(rows, 9) == [1, 3, 0]
    assert costliest_layers(rows, 2) == [1, 3]
    assert costliest_layers(rows, 0) == []


def test_powers_of_two_up_to_half_of_the_heads_are_tried():
    assert [numbers_of_dense_heads(n) for n in (1, 2, 3, 8, 28)] == [
        [], [1], [1], [1, 2, 4], [1, 2, 4, 8],
    ]  # fmt: skip


def test_the_head_that_matters_is_found_and_left_dense():
    result = calibrate(one_head_matters(), [Prompt(make_ids())], options(heads_of=2))
    assert [one.layer for one in result.heads] == [COSTLY] * 4, "the others cost nothing"
    first, *others = result.heads
    assert first.head == HEAD
    assert first.divergence > 0
    assert all(one.divergence < 1e-9 for one in others)
    assert first.setting == LayerSetting("num_samples", 48)
    tried = result.sensitivity[2 * LAYERS :]
    dense_heads = [row.setting.dense_heads for row in tried]
    assert [row.setting.value for row in tried] == [8, 48] * 2
    assert dense_heads[0] == dense_heads[1] == (HEAD,)
    assert len(dense_heads[2]) == 2
    assert HEAD in dense_heads[2]
    length = make_ids().shape[1]
    for row in tried:
        assert row.layer == COSTLY
        assert row.divergence < 1e-9
        sparse = method_of(SAMPLES).work(row.setting.value, length)
        number = len(row.setting.dense_heads)
        assert row.work == pytest.approx((number + (4 - number) * sparse) / 4, rel=0.05)

    small = choose_again(result, options(divergence_budget=1e-9))
    profile = small.profile
    assert profile.layers[COSTLY] == {"num_samples": 8, "dense_heads": [HEAD]}
    model, ids = one_head_matters(), make_ids()
    with torch.no_grad(), apply(model, profile) as report:
        logits = model(ids).logits
        kept = {record.layer: record.kept[0] for record in report}
    assert [count == length for count in kept[COSTLY]] == [head == HEAD for head in range(4)]
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)

    table = layer_table(small)
    assert len(table.columns) == 4, "two numbers of samples, of whole layers"
    assert list(table.columns[3].cells)[COSTLY] == "8, dense heads 2"
    told = " ".join(sentences(small))
    assert "Heads of layer 1, one sparse at a time at num_samples 48, nats: 2: " in told
    assert "their own work is" in told
    assert CalibrationResult.from_json(small.to_json()) == small
    assert draw(small, ".svg").count(b"dense heads") == 0


def test_what_the_choice_costs_together_is_measured_with_its_dense_heads():
    result = calibrate(one_head_matters(), [Prompt(make_ids())], options(heads_of=1))
    assert result.choices[-1].divergence is not None
    tight = options(heads_of=1, divergence_budget=1e-9)
    choice = calibrate(one_head_matters(), [Prompt(make_ids())], tight).choices[-1]
    assert choice.profile.layers[COSTLY]["dense_heads"] == [HEAD]
    assert choice.divergence < 1e-9
    assert choice.work < 0.75


def test_settings_that_cover_the_prompt_are_not_tried_with_heads(monkeypatch):
    profiles, real = [], sensitivity.measure

    def counted(model, references, profile, **code):
        profiles.append(profile)
        return real(model, references, profile, **code)

    monkeypatch.setattr(sensitivity, "measure", counted)
    covering = options(heads_of=1, values=(8, 1000))
    result = calibrate(one_head_matters(), [Prompt(make_ids())], covering)
    dense_heads = [p for p in profiles if "dense_heads" in p.layers.get(COSTLY, {})]
    assert {p.layers[COSTLY]["num_samples"] for p in dense_heads} == {8}
    assert len(dense_heads) == 4 + 2
    assert len(result.heads) == 4


def test_without_a_number_nothing_is_measured():
    assert measure_heads(lambda _: 1 / 0, 4, SAMPLES, [], 0) == ([], [])
    rows = [Sensitivity(0, samples(8)[0], 1.0, None, 0.1, 0.1, 1)]
    assert measure_heads(lambda _: 1 / 0, 4, SAMPLES, rows, 0) == ([], [])
    assert dataclasses.asdict(options())["heads_of"] == 0
