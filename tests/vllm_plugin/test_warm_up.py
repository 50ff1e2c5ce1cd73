"""The warm-up runs what long prompts run, once, uncounted, and never stops a start."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig
from token_sparse_attention.integrations.serving.counters import COUNTERS
from token_sparse_attention.integrations.serving.layer import Layer, check_layer
from token_sparse_attention.integrations.serving.plan import Prefill
from token_sparse_attention.integrations.serving.settings import Settings
from token_sparse_attention.integrations.vllm import backend, warm_up
from token_sparse_attention.integrations.vllm.paged import measure_order, read_cpu, read_gpu

CPU = torch.device("cpu")
BLOCK, DIM = 16, 32
LONGEST = Prefill(0, 0, 30_000, 30_000)
CONFIG = TokenSelectionConfig(
    drop_mass=0.05, observation_window=32, min_tokens=128, crossover="auto"
)
SAMPLING = KVSamplingConfig(
    block_size=512, num_probes=32, num_samples=64, sliding_window=512, budget="per_head"
)
CONFIGS = [
    CONFIG,
    TokenSelectionConfig(crossover="auto"),
    dataclasses.replace(CONFIG, drop_mass=1e-6, min_tokens=9000, pool_size=101),
    dataclasses.replace(CONFIG, fallback="window"),
    SAMPLING,
    dataclasses.replace(SAMPLING, num_probes=512, dense_queries=900),
]


def layer(config, heads=4, kv_heads=2, dtype=torch.float32):
    return Layer(config, heads, kv_heads, DIM, dtype, DIM**-0.5)


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    monkeypatch.setattr(warm_up, "_WARM", {})
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # so that caplog sees it


@pytest.fixture
def calls(monkeypatch):
    """The operator's calls: query and key lengths, and whether it ran sparse."""
    seen = []
    operator = warm_up.token_sparse_attention

    def watched(query, key, value, config, **others):
        result = operator(query, key, value, config, **others)
        seen.append((query.shape[2], key.shape[2], bool(result[1].ran_sparse)))
        return result

    monkeypatch.setattr(warm_up, "token_sparse_attention", watched)
    return seen


def warm(layers, longest=LONGEST, read_cache=read_gpu):
    return warm_up.warm_up(layers, longest, Settings(), read_cache, BLOCK, CPU)


@pytest.mark.parametrize("config", CONFIGS)
def test_whole_prompts_and_chunks_run_sparse(calls, config):
    seconds, failed = warm([layer(config)])
    assert seconds > 0
    assert not failed
    assert len(calls) == 4
    assert all(sparse for *_, sparse in calls)
    assert {(query == key, key % 2) for query, key, _ in calls} == {
        (True, 0), (True, 1), (False, 0), (False, 1)
    }  # fmt: skip
    assert max(key for _, key, _ in calls) < 3000, "takes no more than a small prompt"


def test_chunks_are_read_from_a_cache_in_the_processors_order(calls):
    def write(key, value, cache):
        sides = cache.view(2, -1)
        sides[0], sides[1] = key[:, 0].T.flatten(), value.flatten()

    order = measure_order(BLOCK, DIM, torch.float32, write)
    warm([layer(CONFIG)], read_cache=partial(read_cpu, order=order))
    assert [sparse for *_, sparse in calls] == [True] * 4


def test_without_a_reader_only_whole_prompts_run(calls):
    warm([layer(CONFIG)], read_cache=None)
    assert len(calls) == 2
    assert all(query == key for query, key, _ in calls)


def test_each_kind_of_layer_runs_once(calls):
    kinds = [layer(CONFIG), layer(SAMPLING), layer(CONFIG, heads=2)]
    kinds.append(layer(CONFIG, dtype=torch.bfloat16))
    warm([*kinds, *kinds])
    assert len(calls) == 4 * len(kinds)
    assert warm(kinds) == (None, {})
    assert len(calls) == 4 * len(kinds)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (CONFIG, Prefill(0, 0, 4000, 4000)),  # below the crossover
        (dataclasses.replace(CONFIG, crossover="off"), Prefill(0, 0, 160, 160)),
        (dataclasses.replace(CONFIG, drop_mass=0.0), LONGEST),
    ],
)
def test_what_no_prompt_can_run_is_left_out(calls, config, longest):
    assert warm([layer(config)], longest) == (None, {})
    assert not calls


def test_nothing_is_counted_and_no_random_numbers_are_drawn():
    before, state = COUNTERS.read(), torch.get_rng_state()
    warm([layer(CONFIG), layer(SAMPLING)])
    assert COUNTERS.read() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_is_returned_and_the_next_layer_runs(calls):
    def broken(*_):
        raise RuntimeError("no such kernel")

    kinds = [layer(CONFIG), layer(SAMPLING)]
    seconds, failed = warm(kinds, read_cache=broken)
    assert seconds > 0
    assert len(calls) == 2
    assert failed == dict.fromkeys(kinds, "RuntimeError: no such kernel")
    again = warm([layer(CONFIG)], read_cache=broken)
    assert again == (None, {layer(CONFIG): "RuntimeError: no such kernel"}), "not tried again"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_backend": "fa4"}, "attention_backend 'fa4' cannot run"),
        ({"impl": "triton"}, "impl 'triton'"),
    ],
)
def test_code_that_cannot_run_a_layer_is_refused(given, message):
    check_layer(layer(CONFIG), Settings(), CPU)
    with pytest.raises(ValueError, match=message):
        check_layer(layer(CONFIG, dtype=torch.float64), Settings(**given), CPU)


BROKEN = dataclasses.replace(CONFIG, pool_size=9)


class StockBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        pass


class Builder(backend.SparsePrefillBuilder, StockBuilder):
    def cache_reader(self):
        return read_gpu


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("wanted", "device", "runs"),
    [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)],
)
def test_the_builder_warms_up_on_a_gpu_unless_told_not_to(
    monkeypatch, caplog, rank, wanted, device, runs
):
    given = []

    def recorded(*arguments):
        given.append(arguments)
        return warm_up.WarmUp(1.26, {layer(BROKEN): "RuntimeError: no such kernel"})

    settings = Settings(warm_up=wanted)
    configs = {"layers.0.attn": CONFIG, "layers.1.attn": BROKEN, "layers.2.attn": CONFIG}
    monkeypatch.setattr(backend, "engine_settings", lambda _: settings)
    monkeypatch.setattr(backend, "tensor_parallel_group", lambda: (None, rank))
    monkeypatch.setattr(backend, "usable_layers", lambda *_: (configs, {}))
    monkeypatch.setattr(
        backend, "layer_shapes", lambda chosen, *_: [layer(one) for one in chosen.values()]
    )
    monkeypatch.setattr(backend, "warm_up", recorded)
    monkeypatch.setattr(backend, "check_layer", lambda *_: None)
    monkeypatch.setattr(backend, "watch_runner", lambda _: None)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=5000),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=2000, enable_chunked_prefill=False
        ),
    )
    with caplog.at_level(logging.INFO, logger="vllm.token_sparse_attention"):
        spec = SimpleNamespace(block_size=BLOCK)
        builder = Builder(spec, list(configs)[:2], vllm_config, torch.device(device))
    assert list(builder._configs) == ["layers.0.attn"] + ["layers.1.attn"] * (not runs)
    assert ("layers.1.attn stay dense: their kernels could not" in caplog.text) == runs
    expected = (
        [layer(CONFIG), layer(BROKEN)],
        Prefill(0, 0, 2000, 5000),
        settings,
        read_gpu,
        BLOCK,
    )
    assert given == ([(*expected, torch.device(device))] if runs else [])
    logged = "Token sparse attention: kernels warmed up in 1.3 seconds" in caplog.text
    assert logged == (runs and rank == 0)


@pytest.mark.vllm
def test_the_shapes_are_those_of_the_engines_layers(engines):
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from token_sparse_attention.integrations.vllm.engine import layer_shapes, longest_prefill

    vllm_config = engines().llm_engine.vllm_config
    name, module = next(iter(get_layers_from_vllm_config(vllm_config, Attention).items()))
    model = vllm_config.model_config.hf_config
    heads = (model.num_attention_heads, model.num_key_value_heads)
    dim = model.head_dim
    assert layer_shapes({name: CONFIG}, vllm_config, None) == [
        Layer(CONFIG, *heads, dim, torch.float32, module.impl.scale)
    ]
    assert longest_prefill(vllm_config) == Prefill(0, 0, 4096, 4096)
