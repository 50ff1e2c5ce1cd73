"""The memory that a method says it takes, against what its calls allocate, by sizes alone.

The calls run on tensors without memory. Kernels are launched as on a GPU, and do nothing.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from token_sparse_attention import KVSamplingConfig
from token_sparse_attention import prefill as operator
from token_sparse_attention.attention.flash import FlashBackend
from token_sparse_attention.execution import Execution
from token_sparse_attention.inputs import AuxRequest, Chunk, PastProbes
from token_sparse_attention.integrations.past_probes import PagedProbes, Pages, store_of
from token_sparse_attention.integrations.serving.plan import Prefill, workspace_bytes
from token_sparse_attention.integrations.serving.probes import RequestProbes, probe_share
from token_sparse_attention.integrations.vllm.paged import fit_pages
from token_sparse_attention.kernels import block_scoring, sampled_attention, sampling
from token_sparse_attention.methods import LayerShape

DTYPE = torch.bfloat16
KERNELS = [
    (block_scoring, "block_statistics_kernel"),
    (block_scoring, "block_norms_kernel"),
    (block_scoring, "block_scores_kernel"),
    (sampling, "sample_blocks_kernel"),
    (sampled_attention, "sampled_keys_kernel"),
]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self):
        super().__init__()
        self.bytes, self._now, self._alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if _is(one)}
        for one in tree_leaves(result):
            if _is(one) and one.untyped_storage()._cdata not in given | self._alive.keys():
                self._add(one.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self._alive[key] = size
        weakref.finalize(storage, self._drop, key, size)
        self._now += size
        self.bytes = max(self.bytes, self._now)

    def _drop(self, key, size):
        self._alive.pop(key, None)
        self._now -= size


def _is(leaf):
    return isinstance(leaf, torch.Tensor)


class Unlaunched:
    def __getitem__(self, grid):
        return lambda *_, **__: None


def needed(config, shape, monkeypatch):
    """Return the bytes that one call of a layer holds at most, the copy of its cache included."""
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Unlaunched())
    monkeypatch.setattr(operator, "resolve_backend", lambda *_: FlashBackend("flash", "a test"))
    monkeypatch.setattr(operator, "resolve_impl", lambda *_: "triton")
    query = torch.empty(1, shape.query_len, shape.num_heads, shape.head_dim, dtype=DTYPE)
    query = query.to("meta").transpose(1, 2)
    past = None
    with Peak() as peak:
        key, value = (
            torch.empty(
                1, shape.kv_len, shape.num_kv_heads, shape.head_dim, dtype=DTYPE, device="meta"
            ).transpose(1, 2)
            for _ in range(2)
        )
        if shape.query_len < shape.kv_len:
            number = 2 * config.num_probes
            probes = query.new_empty(1, shape.num_heads, number, shape.head_dim)
            past = PastProbes(probes, torch.empty(1, number, dtype=torch.int64, device="meta"))
        aux = AuxRequest(selection=True, indices=False)
        operator.prefill((query, key, value), None, config, Execution(), 1.0, aux, Chunk(past))
    return peak.bytes


SHAPES = [
    LayerShape(32, 8, 128, 2, 131072, 131072),
    LayerShape(32, 8, 128, 2, 16384, 131072),
    LayerShape(32, 8, 128, 2, 2048, 131072),
    LayerShape(32, 8, 128, 2, 2048, 524288),
    LayerShape(8, 1, 128, 2, 8192, 32768),
]
CONFIGS = [
    KVSamplingConfig(crossover="off"),
    KVSamplingConfig(crossover="off", budget="per_head"),
    KVSamplingConfig(crossover="off", block_size=256, sliding_window=256, num_samples=4096),
    KVSamplingConfig(crossover="off", block_size=256, sliding_window=256, num_samples=65536),
    KVSamplingConfig(
        crossover="off", block_size=256, sliding_window=256, num_samples=16, num_probes=256
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[4]}-{shape[5]}")
@pytest.mark.parametrize(
    "config", CONFIGS, ids=["shared", "per_head", "small_blocks", "many_samples", "many_probes"]
)
def test_vllm_sets_aside_what_a_call_takes(config, shape, monkeypatch):
    held = needed(config, shape, monkeypatch)
    reserved = workspace_bytes(config, shape)
    assert held <= reserved <= 2 * held
    codes = 2 * shape.kv_len * shape.num_kv_heads * shape.head_dim  # a byte for each number
    assert workspace_bytes(config, shape, quantised=True) - reserved == codes


@pytest.mark.parametrize("page_size", [16, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_vllm_sets_aside_what_probes_take(dtype, page_size):
    config, shape = KVSamplingConfig(), LayerShape(8, 2, 128, 2, 2048, 8192)
    cache = torch.empty(64, shape.num_kv_heads, page_size, 2 * shape.head_dim, dtype=dtype)
    prefill = Prefill(0, 0, shape.query_len, shape.query_len)
    pages = fit_pages(Pages(), cache)
    slots = torch.arange(shape.query_len) % pages.cache_shape[0]
    kept = PagedProbes(pages, 0, config, slots)
    query, key = (
        torch.zeros(1, heads, shape.query_len, shape.head_dim, dtype=DTYPE)
        for heads in (shape.num_heads, shape.num_kv_heads)
    )
    RequestProbes(kept, prefill).keep(query, key)
    (held,) = store_of(pages).values()
    share = probe_share(config, shape, page_size, quantised=dtype == torch.uint8)
    assert sum(one.nbytes for one in held) == share * cache.nbytes
