"""Drift: against a literal recomputation, and the quantile rule against hand values."""

from __future__ import annotations

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from integrations.families import FAMILIES, SHAPE
from integrations.models import LAYERS, make_ids, make_model
from token_sparse_attention import TokenSelectionConfig
from token_sparse_attention.calibration import drift
from token_sparse_attention.calibration.drift import (
    decoder_layers,
    drift_profile,
    drift_threshold,
    measure_drift,
    relative_change,
    watch_layers,
)


def literal(model, ids):
    """The definition, from hidden states; the last of these is taken before the final norm."""
    seen = []
    handle = model.get_decoder().norm.register_forward_pre_hook(lambda _, args: seen.append(args))
    states = [*model(ids, output_hidden_states=True).hidden_states[:-1], seen[0][0]]
    handle.remove()
    values = []
    for before, after in pairwise(states):
        tokens = [
            ((new - old).norm() / (old.norm() + 1e-8)).item()
            for old, new in zip(before[0].float(), after[0].float())
        ]
        values.append(sum(tokens) / len(tokens))
    return values


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Mixtral"])
def test_drift_is_what_its_definition_says(family, monkeypatch):
    monkeypatch.setattr(drift, "_CHUNK_TOKENS", 64)
    model, prompts = make_model(family), [make_ids(150, seed=1), make_ids(67, seed=2)]
    expected = np.array([literal(model, ids) for ids in prompts])
    measured = measure_drift(model, prompts)
    assert len(measured.relative) == LAYERS
    np.testing.assert_allclose(measured.relative, expected.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        measured.normalised, expected.mean(0) / expected.mean(0).sum(), rtol=1e-5
    )
    shares = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(
        measured.standard_error, shares.std(0, ddof=1) / 2**0.5, rtol=1e-3, atol=1e-9
    )


def test_norms_are_taken_in_float32():
    before = torch.full((1, 9, 64), 300.0, dtype=torch.float16)  # its squares overflow float16
    change = relative_change(before, before * 1.5)
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(0.5)
    assert relative_change(torch.zeros(1, 2, 4), torch.ones(1, 2, 4)).item() == pytest.approx(2e8)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_every_family(family):
    model = make_model(family)
    (layers,) = (
        module
        for name, module in model.named_modules()
        if name.endswith((".layers", ".h", ".blocks"))
    )
    assert decoder_layers(model) is layers


def test_layers_are_those_of_the_text_decoder():
    text = transformers.Gemma3TextConfig(**SHAPE | {"head_dim": 16, "sliding_window": 40})
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert decoder_layers(model) is model.model.language_model.layers
    assert len(measure_drift(model, [make_ids(40)]).relative) == LAYERS


def test_a_model_whose_layers_cannot_be_found_is_refused():
    model = make_model()
    del model.model.layers[2]
    with pytest.raises(ValueError, match=r"one list of 3 numbered decoder layers, .* has 0"):
        measure_drift(model, [make_ids(20)])


def test_hooks_are_removed_whatever_happens():
    model = make_model()
    layers = decoder_layers(model)
    watching = watch_layers(model)
    watching.__enter__()
    assert all(layer._forward_hooks for layer in layers)
    error = RuntimeError("mine")
    assert not watching.__exit__(RuntimeError, error, None), "errors are passed on"
    assert not any(layer._forward_hooks for layer in layers)
    with pytest.raises(IndexError):
        measure_drift(model, [torch.tensor([[10**6]])])
    assert not any(layer._forward_hooks for layer in layers)


def test_hidden_states_do_not_outlive_their_layer():
    model = make_model(num_hidden_layers=4)
    alive, outputs = [], []

    def note(_, __, output):
        outputs.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in outputs))

    with watch_layers(model) as changes:
        handles = [layer.register_forward_hook(note) for layer in model.model.layers]
        model(make_ids(), use_cache=False, logits_to_keep=1)
        assert [change.numel() for change in changes.values()] == [1] * 4
    for handle in handles:
        handle.remove()
    assert max(alive) <= 2  # a layer's input and output


def test_what_cannot_be_measured_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="at least one prompt"):
        measure_drift(model, [])
    with pytest.raises(ValueError, match="eval mode"):
        measure_drift(model.train(), [make_ids(20)])
    model.eval().model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(ValueError, match="prompt 2 must be finite"):
        measure_drift(model, [torch.tensor([[3, 4]]), torch.tensor([[3, 7]])])


@pytest.mark.parametrize(
    ("values", "quantile", "threshold", "layers"),
    [
        ([0.4, 0.1, 0.2, 0.3], 0.5, 0.25, (1, 2)),
        ([0.4, 0.1, 0.2, 0.3, 0.5], 0.5, 0.3, (1, 2, 3)),
        ([0.2, 0.1, 0.2, 0.2], 0.25, 0.175, (1,)),
        ([0.2, 0.1, 0.2, 0.2], 0.5, 0.2, (0, 1, 2, 3)),
        ([0.3, 0.1, 0.2], 0.0, 0.1, (1,)),
        ([0.3, 0.1, 0.2], 1.0, 0.3, (0, 1, 2)),
        ([0.7], 0.5, 0.7, (0,)),
    ],
)
def test_layers_at_or_below_the_quantile_are_sparse(values, quantile, threshold, layers):
    found = drift_threshold(values, quantile)
    assert found[0] == pytest.approx(threshold)
    assert found[1] == layers


def test_the_layer_that_the_quantile_falls_on_survives_rounding():
    values = [0.1 * i for i in range(1, 12)]
    for tenth in range(11):
        assert drift_threshold(values, tenth / 10)[1] == tuple(range(tenth + 1))


@given(
    st.lists(st.floats(1e-3, 1).map(lambda v: round(v, 3)), min_size=1, max_size=40),
    st.floats(0, 1).map(lambda q: round(q, 3)),
)
def test_the_quantile_is_numpys(values, quantile):
    threshold, layers = drift_threshold(values, quantile)
    assert threshold == pytest.approx(np.quantile(values, quantile))
    assert set(layers) <= {i for i, v in enumerate(values) if v <= threshold + 1e-12}
    assert set(layers) >= {i for i, v in enumerate(values) if v <= threshold - 1e-12}


def test_profile_holds_the_layers_and_leaves_the_settings():
    measured = drift.summarise([[0.8, 0.1, 0.3], [0.8, 0.3, 0.1]])
    assert measured.normalised == pytest.approx((2 / 3, 1 / 6, 1 / 6))
    base = TokenSelectionConfig(drop_mass=0.1)
    threshold, profile = drift_profile(measured, base, 0.5)
    assert threshold == pytest.approx(1 / 6)
    assert profile.base == base
    assert dict(profile.layers) == {1: {}, 2: {}}
    with pytest.raises(ValueError, match=r"drift_quantile must be in \[0, 1\], got 1.5"):
        drift_profile(measured, base, 1.5)
    with pytest.raises(ValueError, match="at least one layer must change its input"):
        drift.summarise([[0.0, 0.0]])


def test_a_layer_without_attention_is_not_chosen():
    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    config = transformers.Lfm2Config(**(SHAPE | {"num_hidden_layers": 4, "layer_types": kinds}))
    model = transformers.Lfm2ForCausalLM(config).eval()
    measured = measure_drift(model, [make_ids(120)])
    assert len(measured.normalised) == 4
    assert measured.attending == (1, 3)
    _, profile = drift_profile(measured, TokenSelectionConfig(), quantile=1.0)
    assert tuple(profile.layers) == (1, 3)
