"""A cache in 8-bit floats: sparse layers read what dense attention reads."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from token_sparse_attention.integrations.serving.counters import COUNTERS
from token_sparse_attention.integrations.vllm.paged import Quantised, measure_order, read_gpu
from vllm_plugin.engines import additional_config, gained, prompt_ids, sampling

CLOSE = 0.001
PROMPT = prompt_ids(1500, 3)
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_numbers_are_read_with_their_scales(stored):
    torch.manual_seed(0)
    cache = torch.randn(3, 2, 16, 8).to(stored)
    key, value = read_gpu(cache.view(torch.uint8), torch.tensor([2, 0]), 20)
    scales = torch.tensor([0.5, 3.0])
    read = Quantised(stored, torch.float32)
    blocks = torch.cat((cache[2].float(), cache[0].float()), 1)[:, :20]
    assert torch.equal(read.read(key, scales[:1])[0], blocks[..., :4] * 0.5)
    assert torch.equal(read.read(value, scales)[0], blocks[..., 4:] * scales[:, None, None])
    queries = torch.randn(1, 6, 5, 4).to(stored)  # three heads for each KV head
    expected = queries.float() * scales.repeat_interleave(3)[:, None, None]
    assert torch.equal(read.read(queries, scales), expected)
    assert read._replace(dtype=torch.bfloat16).read(key, scales).dtype == torch.bfloat16


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_the_order_of_a_quantised_block_is_measured(stored):
    def write(key, value, cache):
        sides = cache.view(stored).view(2, -1)
        sides[0], sides[1] = key[:, 0].T.flatten(), value.flatten()

    order = measure_order(32, 16, torch.bfloat16, write, stored)
    place = torch.arange(32 * 16)
    assert torch.equal(order.key, place.view(16, 32).T)
    assert torch.equal(order.value, place.view(32, 16))


@pytest.mark.vllm
def test_a_format_without_a_scale_per_head_is_not_read():
    from token_sparse_attention.integrations.vllm.paged import quantised_cache

    names = ("auto", "bfloat16", "int8_per_token_head", "fp8_per_token_head", "nvfp4")
    assert [quantised_cache(name, torch.bfloat16) for name in names] == [None] * len(names)
    assert quantised_cache("fp8", torch.bfloat16).stored == torch.float8_e4m3fn


@pytest.fixture(scope="module", params=["fp8", "fp8_e5m2"])
def start(engines, request):
    from vllm_plugin.test_exactness import CONFIG

    def get(num_samples=CONFIG.num_samples, **changes):
        config = dataclasses.replace(CONFIG, num_samples=num_samples)
        given = additional_config(config=config.to_dict())
        usual = {"enable_prefix_caching": True, "additional_config": given}
        return engines(kv_cache_dtype=request.param, **usual | changes)

    return get


@pytest.fixture
def first_layer(monkeypatch):
    """Return what the first layer's attention gives for a prompt's tokens, ``[T, H, D]``.

    Behind it a rounding error grows to an 8-bit float's step, with dense attention as well.
    """
    from token_sparse_attention.integrations.vllm.cpu import CPUTokenSparseImpl
    from vllm_plugin.test_exactness import say

    seen, forward = [], CPUTokenSparseImpl.forward

    def spy(self, layer, *tensors, output, **others):
        result = forward(self, layer, *tensors, output=output, **others)
        if ".layers.0." in layer.layer_name:
            seen.append(output.clone())
        return result

    monkeypatch.setattr(CPUTokenSparseImpl, "forward", spy)

    def get(engine, prompt, before=()):
        engine.reset_prefix_cache()
        for one in before:
            say(engine, [one], max_tokens=1)
        seen.clear()
        engine.generate([{"prompt_token_ids": prompt}], sampling(max_tokens=1), use_tqdm=False)
        return torch.cat(seen)

    return get


def apart(one, other):
    """The error of one next to the other, as a share of the other's size."""
    assert one.shape == other.shape
    return float((one - other).norm() / other.norm())


@pytest.mark.vllm
def test_all_keys_give_dense_attention_to_the_same_cache(start, engines, first_layer):
    dense = {"additional_config": {}, "attention_backend": None}
    expected = first_layer(start(**dense), PROMPT)
    assert apart(first_layer(start(num_samples=4096), PROMPT), expected) < CLOSE
    assert apart(first_layer(start(), PROMPT), expected) > 10 * CLOSE
    assert apart(first_layer(engines(**dense), PROMPT), expected) > 10 * CLOSE


@pytest.mark.vllm
def test_chunks_and_prefixes_give_what_a_whole_cold_prompt_gives(start, first_layer):
    cold = first_layer(start(), PROMPT)
    counts = COUNTERS.read()
    cut = first_layer(start(max_num_batched_tokens=301), PROMPT)
    gain = gained(counts, COUNTERS.read())
    assert (gain["prefills_sparse"], gain["layer_calls_dense"]) == (5, {})
    assert apart(cut, cold) < CLOSE
    warm = first_layer(start(), PROMPT, before=[PROMPT[:1000] + prompt_ids(600, 21)])
    assert len(warm) < 1000
    assert apart(warm, cold[-len(warm) :]) < CLOSE
