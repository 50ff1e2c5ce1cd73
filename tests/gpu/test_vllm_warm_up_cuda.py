"""What the vLLM plugin compiles at the start is all that long prompts run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton import knobs

from token_sparse_attention import (
    AuxRequest,
    Chunk,
    KVSamplingConfig,
    TokenSelectionConfig,
    token_sparse_attention,
)
from token_sparse_attention.integrations.serving.layer import Layer
from token_sparse_attention.integrations.serving.plan import Prefill
from token_sparse_attention.integrations.serving.settings import Settings
from token_sparse_attention.integrations.vllm.paged import read_gpu
from token_sparse_attention.integrations.vllm.warm_up import past_probes, warm_up

DEVICE = torch.device("cuda", 0)
BLOCK, LONG = 16, 70_001
CONFIG = TokenSelectionConfig(drop_mass=0.1)
SAMPLING = KVSamplingConfig(num_samples=256, crossover="off", dense_queries=0)
CONFIGS = {
    "selection": CONFIG,
    "selection_per_head": dataclasses.replace(CONFIG, budget="per_head"),
    "selection_window": dataclasses.replace(CONFIG, fallback="window", sliding_window=2048),
    "sampling": SAMPLING,
    "sampling_many_sinks": dataclasses.replace(SAMPLING, sink_size=600),
    "sampling_per_head": dataclasses.replace(SAMPLING, budget="per_head", dense_queries=128),
}


@pytest.mark.parametrize("heads", [(8, 2, 128), (6, 2, 72)])
@pytest.mark.parametrize("name", CONFIGS)
def test_long_prompts_compile_nothing_more(monkeypatch, name, heads):
    config = CONFIGS[name]
    compiled = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given["fn"].name)
    )
    settings = Settings(config=config)
    num_heads, num_kv_heads, dim = heads
    layer = Layer(config, *heads, torch.bfloat16, dim**-0.5)
    longest = Prefill(0, 0, LONG, LONG)
    seconds, failed = warm_up([layer], longest, settings, read_gpu, BLOCK, DEVICE)
    assert not failed
    assert seconds > 0
    compiled.clear()
    for length, chunk in ((LONG, LONG), (66_000, 66_000), (LONG, 60_003), (LONG + 15, 60_000)):
        shape = (length, num_heads + 2 * num_kv_heads, dim)
        tokens = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).transpose(0, 1)[None]
        query, key, value = tokens.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        past = None
        if chunk != length:
            past = past_probes(layer, length - chunk, DEVICE)
            shape = (-(-length // BLOCK), num_kv_heads, BLOCK, 2 * dim)
            cache = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
            key, value = read_gpu(cache, torch.arange(len(cache), device=DEVICE), length)
        _, selection, _ = token_sparse_attention(
            query[:, :, -chunk:],
            key,
            value,
            config,
            scale=layer.scale,
            chunk=Chunk(past),
            return_aux=AuxRequest(selection=True),
        )
        assert selection.ran_sparse.all()
    assert compiled == []
