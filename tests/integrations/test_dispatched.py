"""Models that accelerate spreads over devices, here memory and disk; models without data."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from integrations.models import CONFIG, LAYERS, make_ids, make_model
from token_sparse_attention.integrations.transformers import apply

WINDOWED = dataclasses.replace(CONFIG, budget="per_head", fallback="window", sliding_window=9)
OFFLOADED = f"model.layers.{LAYERS - 1}"
DEVICES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    **{f"model.layers.{layer}": "cpu" for layer in range(LAYERS - 1)},
    OFFLOADED: "disk",
}


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["shared", "per head, windowed"])
def test_a_model_loaded_onto_several_devices_equals_one_on_one_device(tmp_path, config):
    whole, ids = make_model(), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    whole.save_pretrained(tmp_path / "model")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=DEVICES, offload_folder=str(tmp_path / "offload")
    ).eval()
    assert spread.get_submodule(OFFLOADED).self_attn.q_proj.weight.device.type == "meta"
    results = []
    for model in (whole, spread):
        model.generation_config.eos_token_id = None
        with apply(model, config) as report:
            logits = model(ids, attention_mask=mask).logits
            new = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert [record.paths for record in report] == [["sparse"] * 2] * 2 * LAYERS
        results.append((logits, new, [record.kept for record in report]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_a_model_may_be_dispatched_while_it_is_applied(tmp_path):
    model, ids = make_model(), make_ids()
    with apply(model, CONFIG) as report:
        expected = model(ids).logits
        report.clear()
        model = dispatch_model(model, DEVICES, main_device="cpu", offload_dir=str(tmp_path))
        assert torch.equal(model(ids).logits, expected)
    assert [record.paths for record in report] == [["sparse"]] * LAYERS
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["shared", "per head, windowed"])
def test_a_model_without_data_gives_logits_without_data(config):
    model, ids = make_model().to("meta"), make_ids().to("meta")
    expected = model(ids).logits.shape
    with apply(model, config):
        logits = model(ids).logits
    assert logits.is_meta
    assert logits.shape == expected
