"""Models some of whose layers do something else than causal self-attention."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import transformers

from integrations.models import SAMPLING, SHAPE, make_ids, make_model
from integrations.test_transformers import CLOSE
from token_sparse_attention import DenseReason, LayerProfile
from token_sparse_attention.integrations.transformers import apply

ALL_KEYS = dataclasses.replace(SAMPLING, num_samples=1600)  # sees every key, so it equals dense


def test_layers_that_are_named_and_do_not_attend_are_said():
    model, ids = make_model("Lfm2"), make_ids()
    profile = LayerProfile(base=SAMPLING, layers={0: {}, 1: {}, 2: {}})
    for settings in (profile, dataclasses.replace(SAMPLING, sparse_layers=(0, 1, 2))):
        with apply(model, settings), pytest.warns(UserWarning, match="do not run sparse: 0, 2"):
            model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in (SAMPLING, dataclasses.replace(SAMPLING, sparse_layers=(1, 3))):
            with apply(model, settings):
                model(ids)


def make_cross_attending():
    """A model of text and images whose layers 1 and 3 attend from the text to the image."""
    torch.manual_seed(0)
    text = SHAPE | {
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 4,
        "intermediate_size": 64,
        "vision_output_dim": 96,
        "image_size": 112,
        "patch_size": 14,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    config = transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=198
    )
    model = transformers.MllamaForConditionalGeneration(config).eval()
    for layer in (1, 3):  # closed at first: the image would change nothing
        model.model.language_model.layers[layer].cross_attn_attn_gate.data.fill_(1.0)
    image = {
        "pixel_values": torch.randn(1, 1, 2, 3, 112, 112),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
    }
    return model, image


@pytest.mark.parametrize("length", [60, 130, 200], ids=["fewer", "as many", "more"])
def test_cross_attention_is_not_taken_for_self_attention(length):
    """The image has 130 keys, the text fewer, as many, or more queries."""
    model, image = make_cross_attending()
    ids = make_ids(length).clamp(max=190)
    dense = model(ids, **image).logits
    with apply(model, ALL_KEYS) as report:
        logits = model(ids, **image).logits
    torch.testing.assert_close(logits, dense, **CLOSE)
    assert [record.kv_len for record in report] == [length, 130, length, 130]
    not_causal = [str(DenseReason.NOT_CAUSAL)]
    assert [record.reasons for record in report] == [[None], not_causal, [None], not_causal]


def test_a_module_that_does_not_say_that_it_is_causal_runs_dense():
    model, ids = make_model(), make_ids()
    dense = model(ids).logits
    for layer in model.model.layers:
        del layer.self_attn.is_causal
    with apply(model, SAMPLING) as report:
        assert torch.equal(model(ids).logits, dense)
    assert {record.dense_reason for record in report} == {DenseReason.NOT_CAUSAL}
