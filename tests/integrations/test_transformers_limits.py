"""apply(): lifecycle, refusals, and everything that must fall back to dense."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import token_sparse_attention
from integrations.models import CONFIG, LAYERS, SHAPE, make_ids, make_image_model, make_model
from integrations.test_transformers import CLOSE, paths, reasons
from token_sparse_attention import DenseReason, TokenSelectionConfig, config_from_json
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.integrations import implementation
from token_sparse_attention.integrations.transformers import apply, register_dense_attention

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="compiles C++ at run time"
)


def registered():
    return set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping)


def test_names_are_unique_and_removed():
    before = registered()
    model = make_model()
    with apply(model, CONFIG):
        name = model.config._attn_implementation
        assert registered() - before == {name}
        assert "flash" not in name
        assert "sdpa" not in name
    assert registered() == before
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_plain_call_lasts_until_removed():
    model, ids = make_model(), make_ids()
    dense = model(ids).logits
    applied = apply(model, CONFIG)
    assert not torch.equal(model(ids).logits, dense)
    applied.remove()
    applied.remove()
    assert torch.equal(model(ids).logits, dense)
    assert len(applied.report) == LAYERS
    with pytest.raises(RuntimeError, match="was removed"), applied:
        pass


def test_an_exception_inside_removes_it():
    model = make_model()
    with pytest.raises(KeyError), apply(model, CONFIG):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_an_implementation_set_meanwhile_stays():
    model = make_model()
    with apply(model, CONFIG):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_two_models_at_once():
    first, second, ids = make_model(), make_model("Qwen3"), make_ids()
    alone = []
    for model in (first, second):
        with apply(model, CONFIG):
            alone.append(model(ids).logits)
    with apply(first, CONFIG) as one, apply(second, CONFIG) as two:
        both = [model(ids).logits for model in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(alone, both))
    assert len(one) == len(two) == LAYERS


def test_another_model_on_the_same_config_object_stays_dense():
    config = LlamaConfig(**SHAPE)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = make_ids()
    dense = second(ids).logits
    with apply(first, CONFIG) as report:
        assert torch.equal(second(ids).logits, dense)
        assert len(report) == 0
        with pytest.raises(ValueError, match="models built on one config object share it"):
            apply(second, CONFIG)


def test_applying_twice_raises():
    model = make_model()
    with apply(model, CONFIG):
        with pytest.raises(ValueError, match="model already runs token sparse attention"):
            apply(model, CONFIG)
        with pytest.raises(ValueError, match="model already runs token sparse attention"):
            apply(model.model, CONFIG)
    with apply(model, CONFIG):
        pass


def test_save_pretrained_never_writes_the_name(tmp_path):
    model, ids = make_model(), make_ids()
    with apply(model, CONFIG) as report:
        model(ids)
        name = model.config._attn_implementation
        model.save_pretrained(tmp_path)
        assert len(report) == LAYERS
    for file in tmp_path.glob("*.json"):
        assert name not in file.read_text()
        assert "tsa_" not in file.read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_base_model_can_be_used_too():
    model, ids = make_model(), make_ids()
    with apply(model.model, CONFIG) as report:
        model.model(ids)
    assert paths(report) == [["sparse"]] * LAYERS


def test_multimodal_models_run_sparse_in_the_text_decoder_only():
    model = make_image_model()
    ids = make_ids().clamp(max=190)
    with apply(model, CONFIG) as report:
        assert model.config.vision_config._attn_implementation == "sdpa"
        model(ids)
        assert paths(report) == [["dense"], ["sparse"], ["sparse"]]
        ids[:, 5:9] = 198
        pixels = torch.randn(1, 3, 28, 28)
        image_types = (ids == 198).long()
        model(ids, pixel_values=pixels, token_type_ids=image_types)
    assert reasons(report)[1].startswith("attention mask is not causal"), "images see both ways"


class NotThroughTheInterface(PreTrainedModel):
    """Claims to support the interface, but its layer computes attention on its own."""

    config_class = LlamaConfig
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.embedding(input_ids)

    @classmethod
    def _can_set_attn_implementation(cls):
        return True


def test_a_model_whose_layers_never_call_the_interface_raises_after_its_first_prefill():
    model = NotThroughTheInterface(LlamaConfig(**SHAPE))
    before = registered()
    apply(model, CONFIG)
    with pytest.raises(RuntimeError, match="no layer of NotThroughTheInterface called"):
        model(make_ids())
    assert registered() == before
    model(make_ids())


def test_other_refusals_are_named():
    model = make_model()
    with pytest.raises(
        TypeError, match="model must be a transformers PreTrainedModel, got Linear"
    ):
        apply(nn.Linear(2, 2), CONFIG)
    with pytest.raises(TypeError, match="config must be a SparseConfig or a LayerProfile"):
        apply(model, {"drop_mass": 0.1})
    with pytest.raises(ValueError, match="impl must be one of"):
        apply(model, CONFIG, impl="cuda")
    with pytest.raises(ValueError, match="attention_backend must be one of"):
        apply(model, CONFIG, attention_backend="fa2")
    encoder_decoder = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="model must be decoder-only, but Bart"):
        apply(encoder_decoder, CONFIG)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="one of the attention implementations eager, sdpa, got"):
        apply(model, CONFIG)
    assert model.config._attn_implementation == "flex_attention", "a refusal changes nothing"


def test_an_explicit_attention_backend_never_falls_back():
    model, ids = make_model(), make_ids()
    with apply(model, CONFIG, attention_backend="math"):
        math = model(ids).logits
    with apply(model, CONFIG):
        torch.testing.assert_close(model(ids).logits, math, **CLOSE)
    with apply(model, CONFIG, attention_backend="cudnn"), pytest.raises(ValueError, match="cudnn"):
        model(ids)


def test_gradients_run_dense_with_a_warning():
    model, ids = make_model(), make_ids()
    dense = model(ids).logits
    with apply(model, CONFIG) as report:
        with torch.enable_grad(), pytest.warns(UserWarning, match="gradients are being recorded"):
            logits = model(ids).logits
        assert logits.requires_grad
        torch.testing.assert_close(logits.detach(), dense, **CLOSE)
        assert reasons(report) == ["gradients are being recorded (use torch.no_grad())"] * LAYERS
        with torch.inference_mode():
            model(ids)
        assert paths(report) == [["sparse"]] * LAYERS


def test_dropout_and_attention_weights_run_dense():
    model, ids = make_model(attention_dropout=0.1), make_ids()
    with apply(model, CONFIG) as report:
        model.train()
        model(ids)
        model.eval()
        assert set(reasons(report)) == {"attention dropout is active"}
    model.set_attn_implementation("eager")
    with apply(model, CONFIG) as report:
        weights = model(ids, output_attentions=True).attentions
        assert weights[0].shape == (1, 4, 200, 200)
        assert set(reasons(report)) == {"attention weights were asked for"}


def test_arguments_the_sparse_path_does_not_know_run_dense():
    model, ids = make_model(), make_ids()
    dense = model(ids).logits
    with apply(model, CONFIG) as report:
        logits = model(ids, max_length_q=200).logits
    assert torch.equal(logits, dense)
    assert reasons(report)[0].endswith("does not know: max_length_q")


def test_masks_that_are_not_causal_plus_padding_run_dense():
    model, ids = make_model(), make_ids()
    causal = torch.ones(200, 200, dtype=torch.bool).tril()
    holes = causal.clone()
    holes[:, 50] = False
    holes[50, 50] = True
    blocks = causal.clone()
    blocks[100:, :100] = False
    prefix = causal.clone()
    prefix[:30, :30] = True
    for mask in (holes, blocks, prefix):
        mask = mask[None, None]
        dense = model(ids, attention_mask=mask).logits
        with apply(model, CONFIG) as report:
            assert torch.equal(model(ids, attention_mask=mask).logits, dense)
        assert set(reasons(report)) == {
            "attention mask is not causal with one run of real tokens per sequence"
        }
    with apply(model, CONFIG) as report:
        explicit = model(ids, attention_mask=causal[None, None]).logits
        assert paths(report) == [["sparse"]] * LAYERS
        assert torch.equal(explicit, model(ids).logits)


def test_padding_with_a_gap_runs_dense():
    model, ids = make_model(), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 50:60] = 0
    dense = model(ids, attention_mask=mask).logits
    with apply(model, CONFIG) as report:
        assert torch.equal(model(ids, attention_mask=mask).logits, dense)
    assert reasons(report)[0].startswith("attention mask is not causal")


def test_each_forward_pass_reads_its_own_mask():
    model, ids = make_model(), make_ids(batch=2)
    early, late = torch.ones_like(ids), torch.ones_like(ids)
    early[0, :20] = 0
    late[1, :70] = 0
    for first, second in ((early, late), (late, early)):
        with apply(model, CONFIG):
            expected = model(ids, attention_mask=second).logits
        with apply(model, CONFIG):
            model(ids, attention_mask=first)
            assert torch.equal(model(ids, attention_mask=second).logits, expected)


def test_why_the_method_itself_ran_dense_is_said():
    model, ids = make_model(), make_ids()
    with apply(model, dataclasses.replace(CONFIG, drop_mass=1e-9)) as report:
        model(ids)
    assert reasons(report)[0].startswith("no token's mass fits under drop_mass")
    model.model.layers[0].self_attn.q_proj.weight.fill_(torch.nan)
    with apply(model, CONFIG) as report:
        model(ids)
    assert reasons(report)[0].endswith("scores are not finite")


def test_every_reason_can_be_recorded():
    package = Path(token_sparse_attention.__file__).parent
    code = "".join(file.read_text() for file in package.rglob("*.py"))
    assert [
        reason.name for reason in DenseReason if f"DenseReason.{reason.name}" not in code
    ] == []


def test_packed_sequences_run_dense():
    model, ids = make_model(), make_ids()
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None]
    settings = {"position_ids": positions, "use_cache": False}
    dense = model(ids, **settings).logits
    with apply(model, CONFIG) as report:
        assert torch.equal(model(ids, **settings).logits, dense)
    assert reasons(report)[0].startswith("attention mask is not causal")


def test_a_wide_sliding_window_is_no_obstacle():
    model, ids = make_model("Mistral", sliding_window=500), make_ids()
    with apply(model, CONFIG) as report:
        model(ids)
    assert paths(report) == [["sparse"]] * LAYERS


@needs_compiler
def test_compiled_models_work():
    model, ids = make_model(num_hidden_layers=1), make_ids()
    dense = model(ids).logits
    with apply(model, CONFIG):
        sparse = model(ids).logits
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(ids).logits, dense, **CLOSE)
    for settings in (CONFIG, TokenSelectionConfig(), CONFIG):
        with apply(compiled, settings) as report:
            expected = sparse if settings is CONFIG else dense
            torch.testing.assert_close(compiled(ids).logits, expected, **CLOSE)
            assert paths(report) == [["sparse" if settings is CONFIG else "dense"]]
        torch.testing.assert_close(compiled(ids).logits, dense, **CLOSE)
    torch._dynamo.reset()


@needs_compiler
def test_quantised_caches_work():
    model = make_model(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    ids = make_ids()
    with apply(model, CONFIG) as report:
        out = model.generate(
            ids,
            max_new_tokens=3,
            do_sample=False,
            cache_implementation="quantized",
            cache_config={"backend": "quanto", "nbits": 4},
        )
    assert out.shape == (1, 203)
    assert paths(report) == [["sparse"]] * LAYERS
    assert report.decode_calls == 2 * LAYERS


def test_dispatched_models_work(tmp_path):
    from accelerate import dispatch_model

    model, ids = make_model(), make_ids()
    with apply(model, CONFIG):
        expected = model(ids).logits
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    device_map |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" for layer in range(1, LAYERS)}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    with apply(model, CONFIG) as report:
        assert torch.equal(model(ids).logits, expected)
    assert paths(report) == [["sparse"]] * LAYERS


def test_profiles_survive_the_way_through_json():
    profile = CONFIG
    model, ids = make_model(), make_ids()
    with apply(model, config_from_json(json.dumps(json.loads(profile.to_json())))):
        first = model(ids).logits
    with apply(model, CONFIG):
        assert torch.equal(model(ids).logits, first)


def test_an_application_does_not_keep_a_dropped_model_alive():
    model = make_model()
    applied = apply(model, CONFIG)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    applied.remove()


def test_a_mask_that_was_changed_in_place_is_read_again():
    model, ids = make_model(), make_ids()
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].clone()
    apart = mask.clone()
    apart[..., 90:, :90] = False
    expected = model(ids, attention_mask=apart, use_cache=False).logits
    with apply(model, CONFIG) as report:
        model(ids, attention_mask=mask, use_cache=False)
        assert paths(report) == [["sparse"]] * LAYERS
        mask.copy_(apart)
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_autocast_is_followed(family, use_cache):
    """Rotation leaves queries and keys in single precision, and values in half."""
    model, ids = make_model(family), make_ids()
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(ids, use_cache=use_cache).logits
        with apply(model, dataclasses.replace(CONFIG, keep_ratio=1.0)) as report:
            logits = model(ids, use_cache=use_cache).logits
    assert paths(report) == [["sparse"]] * LAYERS
    torch.testing.assert_close(logits, dense, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["math", "flexprefill"])
def test_dense_layers_follow_autocast(monkeypatch, backend):
    model, ids = make_model(), make_ids()
    dtypes = set()

    def spy(backend, query, key):
        dtypes.update((query.dtype, key.dtype))
        return resolve_backend(backend, query, key)

    monkeypatch.setattr(implementation, "resolve_backend", spy)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation(register_dense_attention(backend))
        logits = model(ids, use_cache=False).logits
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("backend", "enabled", "expected"),
    [
        ("auto", (True, True), (True, False)),
        ("flexprefill", (True, True), (True, False)),
        ("auto", (False, True), (False, False)),
        ("auto", (True, False), (True, True)),  # there is nothing else to run on
        ("cudnn", (True, True), (True, True)),
    ],
)
def test_single_queries_stay_off_cudnn(monkeypatch, backend, enabled, expected):
    """Which would plan anew for every number of keys; a prompt with padding may run on it."""
    kernels, seen, sdpa = torch.backends.cuda, {}, AttentionInterface._global_mapping["sdpa"]

    def spy(module, query, *others, **options):
        seen[query.shape[2] == 1] = kernels.cudnn_sdp_enabled()
        return sdpa(module, query, *others, **options)

    model, ids = make_model(), make_ids()
    padding = torch.ones_like(ids)
    padding[:, 0] = 0
    expected_ids = model.generate(ids, attention_mask=padding, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation(register_dense_attention(backend))
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
    was = kernels.cudnn_sdp_enabled(), kernels.math_sdp_enabled()
    try:
        kernels.enable_cudnn_sdp(enabled[0])
        kernels.enable_math_sdp(enabled[1])
        out = model.generate(ids, attention_mask=padding, max_new_tokens=3, do_sample=False)
        assert (kernels.cudnn_sdp_enabled(), kernels.math_sdp_enabled()) == enabled
    finally:
        kernels.enable_cudnn_sdp(was[0])
        kernels.enable_math_sdp(was[1])
    assert (seen[False], seen[True]) == expected
    assert torch.equal(out, expected_ids)


def test_mixed_dtypes_run_dense(monkeypatch):
    model, ids = make_model(), make_ids()
    module = transformers.models.llama.modeling_llama
    rotate = module.apply_rotary_pos_emb

    def half_queries(query, key, *others):
        query, key = rotate(query, key, *others)
        return query.half(), key

    monkeypatch.setattr(module, "apply_rotary_pos_emb", half_queries)
    with apply(model, CONFIG) as report, contextlib.suppress(RuntimeError):
        model(ids)  # dense attention takes no such inputs either
    assert reasons(report)[0] == str(DenseReason.DTYPES)


def test_an_application_that_is_never_removed_goes_with_its_model():
    before = registered()
    model, ids = make_model(), make_ids()
    reports = weakref.ref(apply(model, CONFIG).report)
    model(ids)
    assert reports() is not None, "the model keeps it"
    assert paths(reports()) == [["sparse"]] * LAYERS
    del model
    gc.collect()
    assert registered() == before
    assert reports() is None


def test_a_model_that_shares_its_config_with_a_dropped_one_still_runs():
    config = LlamaConfig(**SHAPE)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = make_ids()
    dense = second(ids).logits
    apply(first, CONFIG)
    del first
    gc.collect()
    assert config._attn_implementation == "sdpa"
    assert torch.equal(second(ids).logits, dense)
