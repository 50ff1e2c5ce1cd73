"""The backend in SGLang's own classes: its pools, layers and batches, without an engine."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from token_sparse_attention import Chunk, KVSamplingConfig, token_sparse_attention
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.serving.settings import Settings
from token_sparse_attention.integrations.sglang import backend as module
from token_sparse_attention.integrations.sglang.engine import usable_layers

pytestmark = pytest.mark.sglang
HEADS, KV_HEADS, DIM, SIZE, LONGEST = 4, 2, 16, 4096, 1200
CONFIG = KVSamplingConfig(
    block_size=32,
    num_probes=8,
    sliding_window=32,
    sink_size=1,
    num_samples=12,
    dense_queries=0,
    crossover="off",
)
REST = dataclasses.replace(CONFIG, dense_queries=64)


class Runner:
    """What the backend reads of SGLang's model runner, with two layers."""

    def __init__(self, page_size=1, kv_dtype=torch.float32, **layer):
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

        self.device, self.page_size, self.dtype = "cpu", page_size, torch.float32
        self.decode_attention_backend_str = "tsa"
        self.req_to_token_pool = ReqToTokenPool(8, LONGEST, "cpu", False)
        self.token_to_kv_pool = MHATokenToKVPool(
            SIZE, page_size, kv_dtype, KV_HEADS, DIM, 2, "cpu", False
        )
        self.model_config = SimpleNamespace(num_hidden_layers=2)
        sizes = (HEADS, DIM, DIM**-0.5, KV_HEADS)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(
            [RadixAttention(*sizes, layer_id=number, **layer) for number in range(2)]
        )


class Served:
    """A backend and requests whose tokens lie anywhere in the pool."""

    def __init__(self, monkeypatch, config=CONFIG, **changes):
        monkeypatch.setattr(module, "engine_settings", lambda _: Settings(config=config))
        monkeypatch.setattr(module, "tensor_parallel_group", lambda: (None, 0))
        self.runner = Runner(**changes)
        self.backend = module.create_backend(self.runner)
        self._tensors = torch.Generator().manual_seed(1)
        page = self.runner.page_size
        order = torch.randperm(SIZE // page - 1, generator=self._tensors) + 1
        slots = (order[:, None] * page + torch.arange(page)).flatten()
        self.runner.req_to_token_pool.req_to_token[1:4, : LONGEST // 16 * 16] = slots[
            : 3 * (LONGEST // 16 * 16)
        ].view(3, -1)

    def tensors(self, tokens):
        shapes = ((tokens, HEADS, DIM), (tokens, KV_HEADS, DIM), (tokens, KV_HEADS, DIM))
        return [torch.randn(shape, generator=self._tensors) for shape in shapes]

    def batch(self, requests, **changes):
        """Return a batch of prompts.

        Args:
            requests: of each its row, how many of its tokens are in the cache, and how many come.
            changes: to its attributes.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        rows, past, own = (torch.tensor(numbers) for numbers in zip(*requests, strict=True))
        table = self.runner.req_to_token_pool.req_to_token
        slots = [table[row, first : first + count] for row, first, count in requests]
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(requests),
            input_ids=torch.zeros(int(own.sum()), dtype=torch.int64),
            req_pool_indices=rows,
            seq_lens=past + own,
            out_cache_loc=torch.cat(slots).long(),
            seq_lens_sum=int((past + own).sum()),
            seq_lens_cpu=past + own,
            extend_num_tokens=int(own.sum()),
            extend_seq_lens=own,
            extend_prefix_lens=past,
            extend_start_loc=own.cumsum(0) - own,
            extend_prefix_lens_cpu=past.tolist(),
            extend_seq_lens_cpu=own.tolist(),
        )
        for name, value in changes.items():
            setattr(batch, name, value)
        return batch

    def run(self, batch, tensors, layer=0, **others):
        """Return the output ``[T, H, D]``."""
        query, key, value = tensors
        out = self.backend.forward(
            query.flatten(1), key, value, self.runner.model.layers[layer], batch, **others
        )
        return out.view(-1, HEADS, DIM)


def operator(tensors, config=CONFIG, **changes):
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in tensors)
    return token_sparse_attention(query, key, value, config, **changes)[0].transpose(0, 1)


def part(tensors, start, stop):
    return [tensor[start:stop] for tensor in tensors]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("cuts", [[], [512], [30], [40, 42, 640], [300, 600, 900]], ids=str)
def test_prompts_and_chunks_are_the_operators(monkeypatch, page_size, cuts):
    served = Served(monkeypatch, page_size=page_size)
    tensors = served.tensors(1000)
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, 1000], strict=True):
        batch = served.batch([(2, start, stop - start)])
        outputs.append(served.run(batch, part(tensors, start, stop)))
    expected = operator(tensors)
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-5)
    dense = operator(tensors, dataclasses.replace(CONFIG, num_samples=2000))
    assert (dense - expected).abs().max() > 0.1, "else it says nothing"


def test_only_the_chunk_that_ends_a_prompt_has_dense_queries(monkeypatch):
    served = Served(monkeypatch, config=REST)
    tensors = served.tensors(1000)
    first = served.run(
        served.batch([(1, 0, 640)], contains_last_prefill_chunk=False), part(tensors, 0, 640)
    )
    last = served.run(served.batch([(1, 640, 360)]), part(tensors, 640, 1000))
    expected = operator(tensors, REST)
    torch.testing.assert_close(torch.cat((first, last)), expected, rtol=1e-4, atol=1e-5)
    cut = operator(part(tensors, 0, 640), REST)
    assert (cut - expected[:640]).abs().max() > 0.1


def test_requests_beside_a_sparse_one_are_the_stock_backends(monkeypatch):
    """A long chunk, a short prompt and a request that decodes, in one batch."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    served = Served(monkeypatch)
    long, short, decoding = served.tensors(900), served.tensors(20), served.tensors(400)
    served.run(served.batch([(1, 0, 500)]), part(long, 0, 500))
    served.run(served.batch([(3, 0, 399)]), part(decoding, 0, 399))
    batch = served.batch([(2, 0, 20), (1, 500, 400), (3, 399, 1)], forward_mode=ForwardMode.MIXED)
    lengths = list(batch.extend_seq_lens_cpu)
    tensors = [
        torch.cat((one, two[500:], three[399:]))
        for one, two, three in zip(short, long, decoding, strict=True)
    ]
    out = served.run(batch, tensors)
    everything = dataclasses.replace(CONFIG, num_samples=2000)
    torch.testing.assert_close(out[:20], operator(short, everything))
    torch.testing.assert_close(out[20:420], operator(long)[500:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[420:], operator(decoding, everything)[399:])
    assert batch.extend_seq_lens_cpu == lengths, "the engine's own batch stays as it was"


def test_keys_that_a_kernel_has_written_are_read_from_the_pool(monkeypatch):
    served = Served(monkeypatch)
    tensors = served.tensors(600)
    batch = served.batch([(1, 0, 600)])
    served.runner.token_to_kv_pool.set_kv_buffer(
        served.runner.model.layers[0], batch.out_cache_loc, *tensors[1:]
    )
    wrong = [tensors[0], torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])]
    out = served.run(batch, wrong, save_kv_cache=False)
    torch.testing.assert_close(out, operator(tensors), rtol=1e-4, atol=1e-5)


def test_a_slot_that_holds_another_token_has_no_probe(monkeypatch):
    """A request's slots are freed, and another one's keys are written there."""
    served = Served(monkeypatch)
    tensors, others = served.tensors(640), served.tensors(320)
    served.run(served.batch([(1, 0, 320)]), part(tensors, 0, 320))
    served.runner.token_to_kv_pool.set_kv_buffer(
        served.runner.model.layers[0], served.batch([(1, 0, 320)]).out_cache_loc, *others[1:]
    )
    out = served.run(served.batch([(1, 320, 320)]), part(tensors, 320, 640))
    mixed = [torch.cat((one, two[320:])) for one, two in zip(others, tensors, strict=True)]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in mixed)
    expected = token_sparse_attention(query[:, :, 320:], key, value, CONFIG, chunk=Chunk(None))
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_layers_keep_their_own_probes_and_settings(monkeypatch):
    config = dataclasses.replace(CONFIG, sparse_layers=(1,))
    served = Served(monkeypatch, config=config)
    first, second = served.tensors(800), served.tensors(800)
    everything = dataclasses.replace(CONFIG, num_samples=2000)
    for start, stop in ((0, 410), (410, 800)):
        batch = served.batch([(1, start, stop - start)])
        out = served.run(batch, part(first, start, stop), layer=0)
        torch.testing.assert_close(
            out, operator(first, everything)[start:stop], rtol=1e-4, atol=1e-5
        )
        out = served.run(batch, part(second, start, stop), layer=1)
        torch.testing.assert_close(out, operator(second)[start:stop], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"sliding_window_size": 64}, DenseReason.SLIDING_WINDOW),
        ({"logit_cap": 30.0}, DenseReason.SOFT_CAP),
        ({"v_head_dim": 8}, DenseReason.HEAD_DIM),
        ({"is_cross_attention": True}, DenseReason.NOT_CAUSAL),
        ({"use_irope": True}, f"{DenseReason.UNKNOWN_ARGUMENT}: use_irope"),
        ({"kv_dtype": torch.float8_e4m3fn}, DenseReason.QUANTISED_CACHE),
    ],
    ids=str,
)
def test_layers_that_cannot_run_sparse_say_why(changes, reason):
    configs, obstacles = usable_layers(Settings(config=CONFIG), Runner(**changes))
    if reason is None:
        assert (len(configs), obstacles) == (2, {})
    else:
        assert (configs, obstacles) == ({}, dict.fromkeys(("layers.0", "layers.1"), str(reason)))


def test_an_encoders_layer_is_not_causal():
    from sglang.srt.layers.radix_attention import AttentionType

    runner = Runner(attn_type=AttentionType.ENCODER_ONLY)
    _, obstacles = usable_layers(Settings(config=CONFIG), runner)
    assert set(obstacles.values()) == {str(DenseReason.NOT_CAUSAL)}


@pytest.mark.parametrize("given", [{"sinks": torch.zeros(HEADS)}, {"sinks": None}], ids=["", "n"])
def test_an_argument_that_is_not_known_goes_to_the_stock_backend(monkeypatch, caplog, given):
    served, calls = Served(monkeypatch), []
    prefills = served.backend.forward_extend.__self__
    prefills._stock = lambda *_, **others: calls.append(others) or torch.zeros(600, HEADS, DIM)
    served.run(served.batch([(1, 0, 600)]), served.tensors(600), **given)
    asks = given["sinks"] is not None
    assert calls == [given] * asks
    assert ("stay dense: layer passes an attention argument" in caplog.text) == asks
