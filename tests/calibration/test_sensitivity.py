"""Sensitivity: what the divergence is, and that choices hold when measured together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from integrations.models import CONFIG, LAYERS, make_ids, make_model
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig
from token_sparse_attention.calibration import sensitivity
from token_sparse_attention.calibration.choose import UnreachableError
from token_sparse_attention.calibration.job import calibrate
from token_sparse_attention.calibration.options import CalibrationOptions
from token_sparse_attention.calibration.prompts import Prompt
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    LayerSetting,
    PromptLength,
    Sensitivity,
)
from token_sparse_attention.calibration.sensitivity import (
    ALL_KEYS,
    LayerReading,
    Reading,
    choose_profile,
    dense_reference,
    divergence,
    measure,
    measure_sensitivity,
)
from token_sparse_attention.calibration.show import layer_table, sentences
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.methods import method_of
from token_sparse_attention.profile import without_crossover

MASSES = (0.1, 0.3)


def drops(*masses):
    return [LayerSetting("drop_mass", mass) for mass in masses]


def samples(*counts):
    return [LayerSetting("num_samples", count) for count in counts]


def sharp_model(**changes):
    """Attention that prefers some tokens, so that settings differ in what they drop."""
    model = make_model(**changes)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(12)
        layer.self_attn.k_proj.weight.mul_(12)
    return model


def references(model, count=2, **options):
    return [dense_reference(model, Prompt(make_ids(seed=i)), **options) for i in range(count)]


def sensitivities(model, refs, base, settings, calls=None, **code):
    """Rows of the model; the layers of each measured profile go to `calls`."""

    def measured(profile):
        if calls is not None:
            calls.append(profile.layers)
        return measure(model, refs, profile, **code)

    return measure_sensitivity(measured, LAYERS, base, settings)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_divergence_is_that_of_decoding_after_a_sparse_prefill(family):
    model, ids, reply = make_model(family), make_ids(), make_ids(6, seed=5)
    reference = dense_reference(model, Prompt(ids, reply))
    measured = measure(model, [reference], CONFIG)

    def decoded():
        """Logits by a forward pass per token, on a cache of the prefill."""
        output = model(ids, use_cache=True)
        rows = [output.logits[0, -1]]
        for token in reply[0]:
            output = model(token[None, None], past_key_values=output.past_key_values)
            rows.append(output.logits[0, -1])
        return torch.stack(rows).double().log_softmax(-1)

    dense = decoded()
    with apply(model, CONFIG):
        sparse = decoded()
    literal = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(dense, sparse)) / 7
    assert reference.log_probs.shape == (7, 199)
    assert literal > 1e-6
    assert measured.divergence == pytest.approx(literal, rel=1e-2)
    assert measured.standard_error is None


def test_what_the_model_says_itself_is_followed_up_to_its_end():
    model, ids = make_model(), make_ids()
    said = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert dense_reference(model, Prompt(ids), 5).continuation[0].tolist() == said.tolist()
    assert dense_reference(model, Prompt(ids), 0).log_probs.shape == (1, 199)
    model.generation_config.eos_token_id = [198, int(said[3])]
    end = said.tolist().index(said[3])
    assert dense_reference(model, Prompt(ids), 5).continuation[0].tolist() == said[:end].tolist()


def test_divergence_by_hand_and_with_impossible_tokens():
    half = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log()
    expected = (0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))) / 2
    assert divergence(half, other) == pytest.approx(float(expected), rel=1e-6)
    assert divergence(half, half) == 0
    with pytest.raises(ValueError, match="KL is inf"):
        divergence(half, torch.tensor([[1.0, 0.0, 0.0]] * 2).log())


def test_a_layer_that_drops_nothing_costs_nothing_and_saves_nothing():
    model = make_model()
    rows = sensitivities(  # "math" rounds unlike the model's own attention
        model, references(model), CONFIG, drops(1e-9, 0.3), attention_backend="math"
    )
    for row in rows[::2]:
        assert (row.divergence, row.standard_error, row.work, row.kept_share) == (0, 0, 1, 1)
        assert row.sparse_prompts == 0
        assert row.note.startswith("no token's mass fits")
    for row in rows[1::2]:
        assert row.divergence > 0
        assert row.kept_share**2 <= row.work < row.kept_share < 1
        assert (row.sparse_prompts, row.note) == (2, "")


SAMPLES = KVSamplingConfig(
    block_size=16,
    num_probes=8,
    sliding_window=16,
    sink_size=0,
    num_samples=24,
    dense_queries=0,
    crossover="off",
)


COUNTS = (8, 48)
BUDGET = {"method": "sensitivity", "divergence_budget": 1.0}
KEYS = BUDGET | {"base": SAMPLES}


def test_layers_are_measured_with_each_number_of_samples():
    model = sharp_model()
    options = CalibrationOptions(
        base=SAMPLES, values=COUNTS, max_reply=4, method="sensitivity", divergence_budget=0.0
    )
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    result = calibrate(model, [Prompt(make_ids())], options)
    rows = result.sensitivity
    assert [row.setting for row in rows] == samples(*COUNTS) * LAYERS
    assert [row.layer for row in rows] == [0, 0, 1, 1, 2, 2]
    length = make_ids().shape[1]
    for row in rows:
        far = row.kept_share * length
        assert far == pytest.approx(row.setting.value, abs=1)
        assert row.work == pytest.approx(method_of(SAMPLES).work(round(far), length), rel=0.05)
        assert (row.divergence == 0) == (row.layer == 1)
    assert all(few.work < many.work < 1 for few, many in zip(rows[::2], rows[1::2]))
    (choice,) = result.choices
    assert choice.profile == LayerProfile(SAMPLES, {1: {"num_samples": 8}})
    assert choice.divergence == 0
    assert choice.work == pytest.approx((2 + rows[2].work) / 3)
    saved = CalibrationResult.from_json(result.to_json())
    assert saved == result
    told = " ".join(sentences(saved))
    assert "Shares are of sinks and samples, behind the sliding window." in told
    assert "one layer sparse at a time at each num_samples" in told
    columns = [column.header for column in layer_table(saved).columns]
    assert columns == ["layer", "KL, share\nat 8", "KL, share\nat 48", "by KL"]
    assert list(layer_table(saved).columns[3].cells) == ["dense", "8", "dense"]


def test_the_default_settings_are_those_of_the_base():
    assert [*CalibrationOptions(**BUDGET).settings] == drops(
        *TokenSelectionConfig.calibrated_values
    )
    assert [*CalibrationOptions(**KEYS).settings] == samples(*KVSamplingConfig.calibrated_values)


def test_each_layer_takes_its_own_number_of_samples_and_runs_with_it():
    costs = [{0: 9.0, 48: 5.0}, {0: 0.001, 48: 0.001}, {0: 2.0, 48: 0.01}]
    rows = [
        Sensitivity(layer, setting, costs[layer][setting.value], None, 0.1, work, 1)
        for layer in range(LAYERS)
        for setting, work in zip(samples(0, 48), (0.2, 0.5))
    ]
    model = sharp_model()
    refs = references(model, 1, max_reply=2)
    choice = choose_profile(
        rows, SAMPLES, "divergence_budget", 1e9, lambda profile: measure(model, refs, profile)
    )
    assert dict(choice.profile.layers) == {i: {"num_samples": 0} for i in range(LAYERS)}
    small = choose_profile(
        rows, SAMPLES, "divergence_budget", 0.02, lambda _: Reading((0.02,), ({},))
    )
    profile = LayerProfile.from_json(small.profile.to_json())
    assert dict(profile.layers) == {1: {"num_samples": 0}, 2: {"num_samples": 48}}
    with apply(model, profile) as report:
        model(make_ids())
    kept = {record.layer: record.kept[0] for record in report if record.paths == ["sparse"]}
    assert set(kept) == {1, 2}
    assert set(kept[1]) == {0}
    assert all(36 <= count <= 49 for count in kept[2])
    with pytest.raises(UnreachableError, match=r"5.1 is out of reach.*0.200 of dense"):
        choose_profile(rows, SAMPLES, "target_speedup", 5.1, lambda _: 1 / 0)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_samples_that_cover_the_prompt_are_dense_and_are_not_measured_again(budget):
    model, calls = sharp_model(), []
    base = dataclasses.replace(SAMPLES, budget=budget, sink_size=3)
    counts = (1000, 8, 2000, 3000)  # a head has a quarter of the mean at least
    refs = references(model, 2, max_reply=2)
    rows = sensitivities(model, refs, base, samples(*counts), calls)
    assert [own for call in calls for own in call.values()] == [
        {"num_samples": count} for count in (1000, 8, 2000)
    ] * LAYERS
    for row in rows:
        covers = row.setting.value > 200
        assert row.note == (ALL_KEYS if covers else "")
        assert row.sparse_prompts == (0 if covers else 2)
        assert (row.divergence == 0) == (row.work == 1) == (row.kept_share == 1) == covers
    logits = model(make_ids()).logits
    with apply(model, LayerProfile(base, {0: {"num_samples": 1000}})):
        assert torch.allclose(model(make_ids()).logits, logits, atol=1e-4), "dense in all but name"


def test_samples_that_cover_one_prompt_of_two_count_for_the_other():
    model = sharp_model()
    refs = [dense_reference(model, Prompt(make_ids(n)), 2) for n in (120, 200)]
    rows = sensitivities(model, refs, SAMPLES, samples(150))
    long = sensitivities(model, refs[1:], SAMPLES, samples(150))
    for row, alone in zip(rows, long):
        assert (row.sparse_prompts, row.note) == (1, ALL_KEYS)
        assert row.divergence == pytest.approx(alone.divergence / 2)
        assert alone.divergence > 0


def test_short_prompts_run_dense_whatever_is_sampled_and_are_measured_once():
    model, calls = make_model(), []
    reference = dense_reference(model, Prompt(make_ids(16)))
    rows = sensitivities(model, [reference], SAMPLES, samples(48, 8, 64), calls)
    assert len(calls) == LAYERS
    for row in rows:
        assert (row.divergence, row.work, row.kept_share, row.sparse_prompts) == (0, 1, 1, 0)
        assert row.note.startswith("context too short for the method")


def test_why_layers_ran_dense_is_told_with_the_settings():
    def row(layer, count, note):
        return Sensitivity(layer, *samples(count), 0.0, None, 1.0, 1.0, 0, note)

    options = CalibrationOptions(**KEYS, values=(8, 48))
    result = CalibrationResult(
        "sensitivity", "m", "float32", {}, {}, options.base, (PromptLength(40, 0),),
        sensitivity=(
            row(0, 8, "short"), row(0, 48, "short"), row(1, 8, ""), row(1, 48, ALL_KEYS),
            row(2, 8, ""), row(2, 48, ALL_KEYS),
        ),
    )  # fmt: skip
    told = " ".join(sentences(result))
    assert "layers 0 (short)." in told
    assert f"layers 1-2 at num_samples 48 ({ALL_KEYS})." in told


def test_a_layer_without_influence_is_chosen_first():
    model = make_model()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    options = CalibrationOptions(
        method="sensitivity", base=CONFIG, values=MASSES, divergence_budget=0.0, max_reply=4
    )
    result = calibrate(model, [Prompt(make_ids())], options)
    of_layer = {layer: [r for r in result.sensitivity if r.layer == layer] for layer in range(3)}
    assert all(row.divergence == 0 and row.sparse_prompts for row in of_layer[1])
    assert all(row.divergence > 0 for layer in (0, 2) for row in of_layer[layer])
    assert dict(result.profile.layers) == {1: {"drop_mass": 0.3}}
    assert result.choices[0].divergence == 0
    assert result.choices[0].work == pytest.approx((2 + of_layer[1][1].work) / 3)


def test_crossover_is_off_while_measuring_and_as_given_in_the_profile():
    model = make_model()
    base = dataclasses.replace(CONFIG, crossover="auto")
    options = CalibrationOptions(
        method="sensitivity", base=base, values=(0.3,), target_speedup=1.2, max_reply=2
    )
    result = calibrate(model, [Prompt(make_ids())], options)
    assert all(row.sparse_prompts for row in result.sensitivity)
    assert result.profile.base == base
    changed = LayerProfile(CONFIG, {0: {"crossover": "auto", "drop_mass": 0.2}})
    off = without_crossover(changed).layer_configs(3)
    assert off == {0: dataclasses.replace(CONFIG, drop_mass=0.2)}


def test_a_layer_that_can_never_run_sparse_is_measured_once():
    model, calls = make_model("Gemma3Text"), []
    refs = references(model, max_reply=2)
    rows = sensitivities(model, refs, CONFIG, drops(*MASSES), calls)
    assert [tuple(layers) for layers in calls] == [(0,), (1,), (1,), (2,), (2,)]
    assert [row.setting for row in rows] == drops(*MASSES) * LAYERS
    assert {row.note for row in rows[:2]} == {"layer attends within a sliding window"}
    assert {row.work for row in rows[:2]} == {1.0}


def test_more_dropped_is_less_work_in_every_layer():
    model = sharp_model()
    rows = sensitivities(model, references(model), CONFIG, drops(*MASSES))
    for less, more in zip(rows[::2], rows[1::2]):
        assert more.work < less.work
        assert len({less.layer, more.layer}) == 1


def test_work_is_the_mean_of_the_pairs_that_each_head_keeps():
    model, config = sharp_model(), dataclasses.replace(CONFIG, budget="per_head")
    reading = measure(model, references(model, 1, max_reply=0), config)
    with apply(model, config) as report:
        model(make_ids(seed=0))
    pairs = [[n * (n + 1) / (200 * 201) for n in record.kept[0]] for record in report]
    assert len({share for heads in pairs for share in heads}) > LAYERS
    for layer, heads in enumerate(pairs):
        assert reading.of_layer(layer)[0].work == pytest.approx(sum(heads) / len(heads))
    whole = sum(map(sum, pairs)) / (4 * LAYERS)
    assert reading.work(LAYERS) == pytest.approx(whole)
    assert reading.work(LAYERS + 1) == pytest.approx((LAYERS * whole + 1) / (LAYERS + 1))


def test_the_model_is_given_back_even_when_measuring_fails(monkeypatch):
    model = make_model()
    refs = references(model, 1)
    before = model(make_ids()).logits
    monkeypatch.setattr(sensitivity, "_read_layer", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model, refs, CONFIG)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(make_ids()).logits, before)


def test_a_model_in_training_or_with_broken_logits_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="eval mode"):
        dense_reference(model.train(), Prompt(make_ids()))
    model.eval().lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="must be numbers"):
        dense_reference(model, Prompt(make_ids(), make_ids(3)))


def rows_of(*divergences, work=0.25):
    (setting,) = drops(0.2)
    return [Sensitivity(i, setting, d, None, 0.5, work, 1) for i, d in enumerate(divergences)]


def joint(excess=1.0, work=0.25):
    """A model whose layers together cost `excess` times their sum."""
    costs = [0.01, 0.02, 0.04, 0.08]

    def measure_profile(profile):
        measured.append(sorted(profile.layers))
        layers = {i: LayerReading(0.5, work, True, False, "") for i in profile.layers}
        return Reading((excess * sum(costs[i] for i in profile.layers),), (layers,))

    measured = []
    return rows_of(*costs), measure_profile, measured


@pytest.mark.parametrize(
    ("excess", "layers", "moved"),
    [(1.0, [0, 1, 2], 0), (2.5, [0, 1], 1), (5.0, [0], 2), (50.0, [], 3), (0.1, [0, 1, 2], 0)],
)
def test_a_choice_is_backed_off_until_it_meets_its_budget_together(excess, layers, moved):
    rows, measure_profile, _ = joint(excess)
    choice = choose_profile(rows, CONFIG, "divergence_budget", 0.075, measure_profile)
    assert sorted(choice.profile.layers) == layers
    assert choice.divergence <= 0.075
    assert choice.summed_divergence <= 0.075
    assert choice.steps_moved == moved
    assert choice.work == pytest.approx(1 - 0.75 * len(layers) / 4)


def test_a_target_is_reached_together_or_named():
    rows, measure_profile, _ = joint()
    choice = choose_profile(rows, CONFIG, "target_speedup", 1.6, measure_profile)
    assert sorted(choice.profile.layers) == [0, 1]
    assert choice.work == pytest.approx(0.625)
    rows, worse, measured = joint(work=0.5)
    choice = choose_profile(rows, CONFIG, "target_speedup", 1.6, worse)
    assert sorted(choice.profile.layers) == [0, 1, 2]
    assert choice.steps_moved == 1
    assert len(measured) == 2
    with pytest.raises(UnreachableError, match=r"5 is out of reach.*0.250 of dense, 4.00x"):
        choose_profile(rows, CONFIG, "target_speedup", 5, measure_profile)
    with pytest.raises(UnreachableError, match=r"together, the attention work is 0.500"):
        choose_profile(rows, CONFIG, "target_speedup", 3, worse)


def test_both_methods_are_measured_beside_each_other():
    model = sharp_model()
    options = CalibrationOptions(
        method="both", base=CONFIG, values=MASSES, target_speedup=1.2, max_reply=4
    )
    prompts = [Prompt(make_ids(160)), Prompt(make_ids(200, seed=2))]
    result = calibrate(model, prompts, options)
    by_drift, chosen = result.choices
    assert [p.tokens for p in result.prompts] == [160, 200]
    assert [p.continuation_tokens for p in result.prompts] == [4, 4]
    assert len(result.drift) == LAYERS
    assert sum(row.drift for row in result.drift) == pytest.approx(1)
    assert set(by_drift.profile.layers) == {r.layer for r in result.drift if r.at_or_below}
    again = measure(model, references_of(model, prompts), by_drift.profile)
    assert by_drift.divergence == pytest.approx(again.divergence)
    assert by_drift.work == pytest.approx(again.work(LAYERS))
    assert chosen.work <= 1 / 1.2
    assert result.profile == chosen.profile


def references_of(model, prompts):
    return [dense_reference(model, prompt, 4) for prompt in prompts]


def test_goals_out_of_reach_leave_the_measurements_and_a_reason():
    model = make_model()
    options = CalibrationOptions(
        method="both", base=CONFIG, values=(0.1,), target_speedup=50, max_reply=1
    )
    result = calibrate(model, [Prompt(make_ids())], options)
    assert "50 is out of reach" in result.failure
    assert result.profile is None
    assert len(result.sensitivity) == LAYERS
    short = dataclasses.replace(options, base=TokenSelectionConfig())
    result = calibrate(model, [Prompt(make_ids())], short)
    assert "no layer ran sparse under any setting: context too short" in result.failure


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "guess"}, "method must be one of drift, sensitivity, both"),
        ({"attention_backend": "flexprefill"}, "attention_backend must be one of auto, .*got 'fl"),
        ({"base": TokenSelectionConfig(sparse_layers=(1,))}, "sparse_layers must be null"),
        ({"drift_quantile": 2}, r"drift_quantile must be in \[0, 1\], got 2"),
        ({"divergence_budget": 1.0}, "method drift got divergence_budget"),
        ({"values": (0.1,), "heads_of": 2}, "method drift got values, heads_of"),
        ({"method": "both"}, "needs one goal.*got neither"),
        ({"method": "both", "divergence_budget": 1.0, "target_speedup": 2.0}, "got both"),
        ({"method": "both", "divergence_budget": -1.0}, "divergence_budget must be at least 0"),
        ({"method": "both", "target_speedup": 0.5}, "target_speedup must be at least 1, got 0.5"),
        (
            {"method": "both", "target_speedup": 2.0, "values": (0.0,)},
            r"drop_mass 0.0 never runs sparse: drop_mass is 0",
        ),
        ({"method": "both", "target_speedup": 2.0, "values": ()}, "values must hold"),
        ({"method": "both", "target_speedup": 2.0, "values": (0.1, 0.1)}, "not repeat"),
        ({"max_reply": -1}, "max_reply must be at least 0"),
        (KEYS | {"heads_of": -1}, "heads_of must be at least 0, got -1"),
        ({"heads_of": 1}, r"heads_of need method sensitivity or both; method drift got heads_of"),
        (BUDGET | {"values": (8,)}, r"drop_mass must be in \[0, 1\), got 8"),
        (KEYS | {"values": (0.1,)}, r"num_samples must be an int, got 0.1"),
        (KEYS | {"values": ()}, r"values must hold at least one number, got none"),
        (KEYS | {"values": (8.5,)}, r"num_samples must be an int, got 8.5"),
        (KEYS | {"values": (-1,)}, "num_samples must be at least 0, got -1"),
        (KEYS | {"values": (8, 8)}, r"values must not repeat a number, got \(8, 8\)"),
    ],
)
def test_options_name_what_is_wrong(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CalibrationOptions(**{"method": "drift"} | changes)
