"""The plugin in vLLM's engine: what it says, against transformers and against itself."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig

from token_sparse_attention.integrations.serving.counters import COUNTERS
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.integrations.vllm.backend import SparsePrefillBuilder
from token_sparse_attention.integrations.vllm.engine import engine_settings, most_decode_tokens
from vllm_plugin.engines import (
    CONFIG,
    NEW_TOKENS,
    SAMPLING,
    additional_config,
    engine_arguments,
    gained,
    gaps,
    generate,
    hf_generate,
    hf_logprobs,
    prompt_ids,
    sampling,
    start_engine,
)

pytestmark = pytest.mark.vllm
# In nats: so few samples leave the model unsure, and the last digits decide between two tokens.
NEARLY_EQUAL = 0.05


class Counted:
    """What the counters gained inside the block."""

    def __enter__(self):
        self._before = COUNTERS.read()
        return self

    def __exit__(self, *_):
        self.gain = gained(self._before, COUNTERS.read())
        self.dense = self.gain.pop("prefills_dense")


PROMPTS = [prompt_ids(length, seed) for seed, length in enumerate((900, 1301, 2048, 1777))]
SHORT = [prompt_ids(90, 9), prompt_ids(80, 10)]


@pytest.fixture(scope="module")
def alone(engines):
    """The replies to each prompt when it is the only one."""
    return [generate(engines(), [ids])[0] for ids in PROMPTS]


@pytest.fixture(scope="module")
def short_alone(engines):
    return [generate(engines(), [ids])[0] for ids in SHORT]


def test_unchunked_prompts_say_what_transformers_says(engines, hf_model, alone):
    differ = 0
    for ids, reply in zip(PROMPTS, alone):
        expected, report = hf_generate(hf_model, ids)
        assert reply == expected
        with Counted() as counted:
            generate(engines(), [ids], max_tokens=1)
        assert counted.gain["tokens_kept"] == sum(
            sum(record.kept[0]) for record in report if record.kept
        )
        assert counted.gain["prefills_sparse"] == 1
        assert counted.gain["layer_calls_sparse"] == len(CONFIG.sparse_layers)
        differ += hf_generate(hf_model, ids, None)[0] != expected
    assert differ, "the settings change nothing, so equal replies mean nothing"


def test_short_prompts_and_decoding_stay_dense(engines, hf_model, short_alone):
    for ids, reply in zip(SHORT, short_alone):
        assert reply == hf_generate(hf_model, ids, None)[0]
    with Counted() as counted:
        generate(engines(), SHORT)
    assert counted.gain["prefills_sparse"] == counted.gain["layer_calls_sparse"] == 0
    assert sum(counted.dense.values()) == 2


def test_without_settings_nothing_runs_sparse(engines, hf_model):
    with Counted() as counted:
        reply = generate(engines(additional_config={}, attention_backend=None), [PROMPTS[0]])
    assert reply == [hf_generate(hf_model, PROMPTS[0], None)[0]]
    assert not any(counted.gain.values())


def test_prompts_in_one_step_keep_to_themselves(engines, alone, short_alone, stock_parts):
    prompts = [PROMPTS[0], SHORT[0], PROMPTS[1], PROMPTS[2], SHORT[1], PROMPTS[3]]
    expected = [alone[0], short_alone[0], alone[1], alone[2], short_alone[1], alone[3]]
    with Counted() as counted:
        assert generate(engines(), prompts) == expected
    assert counted.gain["prefills_sparse"] == 4
    assert [len(part.tokens) for part in stock_parts] == [len(SHORT[0]) + len(SHORT[1])]


@pytest.fixture
def stock_parts(monkeypatch):
    """The parts of steps that the stock backend attends next to sparse prefills."""
    listed = []
    build = SparsePrefillBuilder._stock_part

    def spy(self, common, sparse):
        part = build(self, common, sparse)
        if part is not None:
            listed.append(part)
        return part

    monkeypatch.setattr(SparsePrefillBuilder, "_stock_part", spy)
    return listed


def run_steps(engine, requests, aborted=()):
    """Add prompts at given steps, abort some after theirs; return the finished replies."""
    llm_engine, replies, step = engine.llm_engine, {}, 0
    waiting = sorted(requests, key=lambda request: request[1])
    while waiting or llm_engine.has_unfinished_requests():
        while waiting and waiting[0][1] <= step:
            name, _, ids = waiting.pop(0)
            llm_engine.add_request(name, {"prompt_token_ids": ids}, sampling())
        for output in llm_engine.step():
            if output.finished:
                replies[output.request_id] = list(output.outputs[0].token_ids)
        for name, at in aborted:
            if at == step:
                llm_engine.abort_request([name])
        step += 1
    return replies


def test_a_prefill_joins_requests_that_decode(engines, alone, short_alone, stock_parts):
    replies = run_steps(
        engines(),
        [("a", 0, SHORT[0]), ("b", 2, PROMPTS[0]), ("c", 4, PROMPTS[1]), ("d", 4, SHORT[1])],
    )
    assert replies == {"a": short_alone[0], "b": alone[0], "c": alone[1], "d": short_alone[1]}
    assert [part.metadata.num_actual_tokens for part in stock_parts] == [1, 2 + len(SHORT[1])]


def test_an_aborted_request_leaves_the_others_alone(engines, alone):
    replies = run_steps(
        engines(),
        [("a", 0, PROMPTS[0]), ("b", 0, PROMPTS[1]), ("c", 1, SHORT[0]), ("d", 4, PROMPTS[2])],
        aborted=[("b", 2), ("c", 3)],
    )
    assert replies == {"a": alone[0], "d": alone[2]}


CHUNK = 512


def test_each_chunk_selects_for_itself(engines, hf_model):
    """As transformers does it: the same model, fed the same chunks."""
    engine = engines(max_num_batched_tokens=CHUNK)
    for ids in PROMPTS:
        with Counted() as counted:
            reply = generate(engine, [ids])
        expected, report = hf_generate(hf_model, ids, prefill_chunk_size=CHUNK)
        assert reply == [expected]
        assert counted.gain["prefills_sparse"] + sum(counted.dense.values()) == -(
            -len(ids) // CHUNK
        )
        kept = [sum(record.kept[0]) for record in report if record.kept]
        assert counted.gain["tokens_kept"] == sum(kept)


def test_a_chunk_shares_its_step_with_decoding(engines, hf_model, short_alone):
    engine = engines(max_num_batched_tokens=CHUNK)
    replies = run_steps(engine, [("a", 0, SHORT[0]), ("b", 1, PROMPTS[2])])
    assert replies["a"] == short_alone[0]
    # One token of every step was for the other request.
    assert replies["b"] == hf_generate(hf_model, PROMPTS[2], prefill_chunk_size=CHUNK - 1)[0]


def test_sampling_serves_prompts_chunks_and_neighbours(engines, hf_model):
    """As transformers does it, where every query is kept."""
    chunk = 2300  # room for two prompts at once, but not for the last one
    engine = engines(
        max_num_batched_tokens=chunk,
        additional_config=additional_config(config=SAMPLING.to_dict()),
    )
    prompts = [*PROMPTS[:2], prompt_ids(3000, 5)]
    kept, changed = [], False
    for ids in prompts:
        with Counted() as counted:
            reply = generate(engine, [ids])[0]
        expected, report = hf_logprobs(hf_model, ids, SAMPLING, reply, chunk)
        assert max(gaps(expected, reply)) < NEARLY_EQUAL
        kept.append(sum(sum(record.kept[0]) for record in report if record.kept))
        # Rounding differs, and with it which keys of equal scores are sampled.
        assert counted.gain["tokens_kept"] == pytest.approx(kept[-1], rel=0.01)
        assert counted.gain["layer_calls_sparse"] == len(SAMPLING.sparse_layers) * (
            -(-len(ids) // chunk)
        )
        dense, _ = hf_logprobs(hf_model, ids, None, reply, chunk)
        changed |= bool((dense - expected).abs().max() > 20 * NEARLY_EQUAL)
    assert changed, "else it says nothing"
    heads = hf_model.config.num_attention_heads * len(SAMPLING.sparse_layers)
    assert 2 * heads <= kept[0] <= 8 * heads, "a sink, and 6 samples in the mean"
    few = SHORT[0][:30]  # than probes
    with Counted() as counted:
        first, short, second = generate(engine, [prompts[0], few, prompts[1]])
    assert [short] == generate(engines(), [few])
    for ids, reply in ((prompts[0], first), (prompts[1], second)):
        expected, _ = hf_logprobs(hf_model, ids, SAMPLING, reply, chunk)
        assert max(gaps(expected, reply)) < NEARLY_EQUAL
    assert counted.gain["prefills_sparse"] == 2


def test_a_chunked_request_can_be_aborted(engines):
    engine = engines(max_num_batched_tokens=CHUNK)
    expected = generate(engine, [PROMPTS[3]])[0]
    replies = run_steps(engine, [("a", 0, PROMPTS[2]), ("b", 3, PROMPTS[3])], aborted=[("a", 1)])
    assert replies == {"b": expected}


def test_preempted_requests_start_over(engines, alone):
    """With room for about one and a half, requests push each other out of the cache."""
    engine = engines(num_gpu_blocks_override=20, max_model_len=2048, disable_log_stats=False)
    prompts, lengths = PROMPTS[:2], {"max_tokens": 200, "ignore_eos": True}
    undisturbed = [generate(engine, [ids], **lengths)[0] for ids in prompts]
    assert [reply[: len(one)] for reply, one in zip(undisturbed, alone)] == alone[:2]
    before = preemptions(engine)
    with Counted() as counted:
        replies = generate(engine, prompts, **lengths)
    preempted = preemptions(engine) - before
    assert preempted >= 1
    # A resumed request prefills its own reply too, and selects anew.
    assert counted.gain["prefills_sparse"] == len(prompts) + preempted
    assert replies[0] == undisturbed[0], "the first one is never preempted"
    assert len(replies[1]) == 200
    assert replies[1][: len(alone[1])] == alone[1]


def preemptions(engine):
    return next(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")


def test_a_cached_prefix_is_what_the_earlier_prompt_left(engines, hf_model):
    """As transformers does it: a second turn on the first prompt's cache."""
    engine = engines(
        enable_prefix_caching=True, additional_config=additional_config(prefix_caching="allow")
    )
    first = PROMPTS[2]
    second = first[:1800] + prompt_ids(400, 21)
    hit = 1800 // 128 * 128  # whole blocks
    assert generate(engine, [first]) == [hf_generate(hf_model, first)[0]]
    with Counted() as counted:
        reply = generate(engine, [second])[0]
    assert counted.gain["tokens_seen"] == 8 * len(CONFIG.sparse_layers) * len(second)
    cache = DynamicCache()
    with torch.no_grad(), apply(hf_model, CONFIG) as report:
        hf_model(torch.tensor([first]), past_key_values=cache, use_cache=True)
        cache.crop(hit)
        report.clear()
        out = hf_model.generate(
            torch.tensor([second]), past_key_values=cache, max_new_tokens=NEW_TOKENS
        )
    assert reply == out[0, len(second) :].tolist()
    assert counted.gain["tokens_kept"] == sum(sum(r.kept[0]) for r in report if r.kept)


def test_layers_that_cannot_run_sparse_stay_on_the_stock_backend(tmp_path):
    """Gemma 3 has layers with a sliding window, which transformers leaves dense as well."""
    model = tiny_gemma()
    model.save_pretrained(tmp_path)
    config = dataclasses.replace(CONFIG, sparse_layers=(0, 1))
    ids = [5 + i * i % 190 for i in range(400)]
    engine = start_engine(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        additional_config=additional_config(config=config.to_dict()),
    )
    with Counted() as counted:
        (output,) = engine.generate(
            [{"prompt_token_ids": ids}],
            sampling(detokenize=False, max_tokens=1, logprobs=1),
            use_tqdm=False,
        )
    assert counted.gain["layer_calls_sparse"] == 1
    ((token, entry),) = output.outputs[0].logprobs[0].items()
    with torch.no_grad():
        dense = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]
        with apply(model, config):
            sparse = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]
    assert entry.logprob == pytest.approx(float(sparse), abs=1e-5)
    assert abs(float(sparse - dense)) > 1e-3


def tiny_gemma():
    config = Gemma3TextConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        vocab_size=199,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"additional_config": {}}, "needs additional_config"),
        ({"additional_config": additional_config(config={"num_sample": 9})}, "'num_samples'"),
        ({"additional_config": additional_config(config={"sparse_layers": [14]})}, "below 14"),
        ({"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    from vllm import EngineArgs

    config = EngineArgs(**engine_arguments(**changes)).create_engine_config()
    with pytest.raises(ValueError, match=message):
        engine_settings(config)


def test_a_connector_that_shares_prefixes_is_refused():
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    config = EngineArgs(**engine_arguments(kv_transfer_config=transfer)).create_engine_config()
    with pytest.raises(ValueError, match="kv_transfer_config, got 'ExampleConnector'"):
        engine_settings(config)
    config.additional_config["token_sparse_attention"]["prefix_caching"] = "allow"
    assert engine_settings(config) is not None


def test_a_draft_model_stays_dense():
    """Its layers have numbers of their own, and the settings are for the other model's."""
    from vllm import EngineArgs

    config = EngineArgs(**engine_arguments()).create_engine_config()
    assert engine_settings(config) is not None
    config.speculative_config = SimpleNamespace(
        draft_model_config=config.model_config, num_speculative_tokens=3
    )
    assert engine_settings(config) is None
    assert most_decode_tokens(config) == 4


def test_a_refusal_stops_the_start():
    """Last of this file: vLLM takes its process groups down with an engine that failed."""
    with pytest.raises(ValueError, match="--no-enable-prefix-caching"):
        start_engine(enable_prefix_caching=True)
