"""apply() on a CUDA device: generation with every cache, and models split over devices."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from integrations.models import CONFIG, LAYERS, make_ids, make_model
from token_sparse_attention.integrations.transformers import apply, register_dense_attention

DEVICE = "cuda"


def sparse_everywhere(report):
    return all(set(record.paths) == {"sparse"} for record in report) and len(report) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_agree_with_the_cpu(dtype):
    model, ids = make_model().to(dtype), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with apply(model, CONFIG):
        expected = model(ids, attention_mask=mask).logits.float()
    model.to(DEVICE)
    with apply(model, CONFIG) as report:
        logits = model(ids.to(DEVICE), attention_mask=mask.to(DEVICE)).logits.float().cpu()
    assert sparse_everywhere(report)
    error = (logits - expected)[mask.bool()].norm() / expected[mask.bool()].norm()
    assert error < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache):
    """A static cache makes generate compile its decode steps."""
    model, ids = make_model(), make_ids()
    with apply(model, CONFIG):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.to(DEVICE)
    with apply(model, CONFIG) as report:
        out = model.generate(
            ids.to(DEVICE), max_new_tokens=6, do_sample=False, cache_implementation=cache
        )
    assert out.tolist() == expected.tolist()
    assert sparse_everywhere(report)
    assert len(report.prefills()) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_decode_steps_of_the_dense_kernels_stay_off_cudnn(padded):
    """PyTorch may choose it for a single query on Hopper, and would plan at every step."""
    model, ids = make_model().to(DEVICE, torch.bfloat16), make_ids(batch=2).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :40] = 0
    model.set_attn_implementation(register_dense_attention())
    cache = model(ids, attention_mask=mask).past_key_values
    mask = torch.cat((mask, mask[:, -1:]), -1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    calls = {event.key for event in profiled.key_averages()}
    assert "aten::scaled_dot_product_attention" in calls
    assert not {call for call in calls if "cudnn" in call}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_on_the_dense_kernels(cache):
    model, ids = make_model(), make_ids()
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.to(DEVICE)
    model.set_attn_implementation(register_dense_attention())
    out = model.generate(
        ids.to(DEVICE), max_new_tokens=6, do_sample=False, cache_implementation=cache
    )
    assert out.tolist() == expected.tolist()


def test_models_split_over_devices():
    from accelerate import dispatch_model

    model, ids = make_model(), make_ids()
    with apply(model, CONFIG):
        expected = model(ids).logits
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    device_map |= {f"model.layers.{layer}": "cpu" for layer in range(1, LAYERS)}
    device_map |= {"model.norm": 0, "lm_head": 0}
    model = dispatch_model(model, device_map, main_device=0)
    with apply(model, CONFIG) as report:
        logits = model(ids.to(DEVICE)).logits
    assert sparse_everywhere(report)
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-4)
