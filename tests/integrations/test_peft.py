"""Models that PEFT wraps: `apply` takes them, and what is called is the wrapper."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from integrations.models import CONFIG, LAYERS, SAMPLING, make_ids, make_model
from integrations.test_transformers import CLOSE, paths
from token_sparse_attention.calibration.drift import decoder_layers
from token_sparse_attention.integrations.transformers import apply, attention_of_every_layer

ALL_KEYS = dataclasses.replace(SAMPLING, num_samples=1600)
KINDS = {
    "lora": ("LoraConfig", {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]}),
    "ia3": (
        "IA3Config",
        {
            "init_ia3_weights": False,
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": 5, "adapter_layers": 2}),
}


class Wrapped(nn.Module):
    """Holds a model as PEFT's classes do, of which some call `forward` and not the model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *given, **named):
        return self.base_model.forward(*given, **named)

    def generate(self, *given, **named):
        return self.base_model.generate(*given, **named)


def check(wrapped, model, config=SAMPLING):
    """Its calls are passes: they keep probes, know drafts, and read their own masks."""
    ids = make_ids(260)
    dense = wrapped(ids).logits
    applied = apply(wrapped, config)
    whole, cache = wrapped(ids).logits, DynamicCache()
    assert paths(applied.report) == [["sparse"]] * LAYERS
    assert (whole - dense).abs().max() > 1e-3
    with applied.prompt_continues():
        wrapped(ids[:, :150], past_key_values=cache)
    last = wrapped(ids[:, 150:], past_key_values=cache).logits
    torch.testing.assert_close(last, whole[:, 150:], **CLOSE)
    wrapped(ids, logits_to_keep=5)
    assert applied.report.last_prefill()[0].query_len == 256
    applied.remove()
    assert torch.equal(wrapped(ids).logits, dense)
    assert not [one for one in wrapped.modules() if one._forward_hooks]
    assert model.config._attn_implementation == "sdpa"


def test_the_calls_of_a_wrapper_are_the_models():
    model = make_model()
    check(Wrapped(model), model)
    check(Wrapped(Wrapped(model)), model)
    check(torch.compile(Wrapped(model), backend="eager"), model)
    torch._dynamo.reset()
    check(Wrapped(torch.compile(model, backend="eager")), model)
    torch._dynamo.reset()


def test_other_functions_take_wrappers_too():
    model = make_model()
    assert len(decoder_layers(Wrapped(model))) == LAYERS
    with attention_of_every_layer(Wrapped(model), "math"):
        assert model.config._attn_implementation == "dense_math"


def test_what_wraps_something_else_is_refused():
    with pytest.raises(TypeError, match="transformers PreTrainedModel, got Linear"):
        apply(Wrapped(nn.Linear(2, 2)), CONFIG)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft(kind):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    name, settings = KINDS[kind]
    adapter = getattr(peft, name)(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(make_model(), adapter).eval()
    ids = make_ids()
    dense = model(ids).logits
    greedy = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    reply = model.generate(**greedy)
    with apply(model, ALL_KEYS) as report:
        torch.testing.assert_close(model(ids).logits, dense, **CLOSE)
        assert paths(report) == [["sparse"]] * LAYERS
        assert model.generate(**greedy).tolist() == reply.tolist()
    with apply(model, SAMPLING):
        assert (model(ids).logits - dense).abs().max() > 1e-3
        assert torch.equal(copy.deepcopy(model)(ids).logits, dense)
    assert torch.equal(model(ids).logits, dense)


def test_an_adapter_may_come_and_go_while_the_model_is_applied():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    name, settings = KINDS["lora"]
    model, ids = make_model(), make_ids()
    with apply(model, SAMPLING) as report:
        plain = model(ids).logits
        adapted = peft.get_peft_model(model, getattr(peft, name)(**settings))
        changed = adapted(ids).logits
        assert not torch.equal(changed, plain)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, plain)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, changed, **CLOSE)
    assert all(record.paths == ["sparse"] for record in report)


def test_a_lora_model_is_a_model_whose_calls_are_passes():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    name, settings = KINDS["lora"]
    model = make_model()
    check(peft.get_peft_model(model, getattr(peft, name)(**settings)).eval(), model)
