"""KV sampling in all layers: a prompt's reply does not depend on how the engine serves it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from token_sparse_attention.integrations.serving.counters import COUNTERS
from token_sparse_attention.integrations.vllm import backend
from vllm_plugin.engines import SAMPLING, additional_config, gained, prompt_ids, sampling

pytestmark = pytest.mark.vllm
CLOSE = 0.001  # in nats
# Few samples for large blocks: a rounding error seldom changes one, and then all that follows.
CONFIG = dataclasses.replace(
    SAMPLING, block_size=256, sliding_window=256, num_samples=8, dense_queries=96
)
PROMPTS = [prompt_ids(1500, 3), prompt_ids(1330, 4)]
SHORT = prompt_ids(90, 9)
NEW_TOKENS = 12


class Reply(NamedTuple):
    """A reply's tokens, and the logprobs of the likeliest ones before each."""

    tokens: list[int]
    logprobs: list[dict[int, float]]

    @classmethod
    def of(cls, output):
        (one,) = output.outputs
        found = [
            {token: entry.logprob for token, entry in place.items()} for place in one.logprobs
        ]
        return cls(list(one.token_ids), found)

    def distance(self, other):
        """The largest difference between logprobs that both list; the tokens are the same."""
        assert self.tokens == other.tokens
        return max(
            abs(here[token] - there[token])
            for here, there in zip(self.logprobs, other.logprobs)
            for token in here.keys() & there.keys()
        )


def asking(**changes):
    return sampling(
        **{"max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 20, "detokenize": False}
        | changes
    )


def say(engine, prompts, before=(), **changes):
    """Return the replies to prompts that come at once, after others in an empty cache."""
    engine.reset_prefix_cache()
    for one in before:
        engine.generate([{"prompt_token_ids": one}], asking(max_tokens=1), use_tqdm=False)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    return [Reply.of(one) for one in engine.generate(given, asking(**changes), use_tqdm=False)]


@pytest.fixture(scope="module")
def start(engines):
    def get(config=CONFIG, **changes):
        given = additional_config(config=config.to_dict())
        usual = {"enable_prefix_caching": True, "additional_config": given}
        return engines(**usual | changes)

    return get


@pytest.fixture(scope="module")
def cold(start):
    """The replies to each prompt when it is the only one, whole, in an empty cache."""
    return [say(start(), [ids])[0] for ids in PROMPTS]


@pytest.fixture(scope="module")
def dense(engines):
    engine = engines(additional_config={}, attention_backend=None)
    return [say(engine, [ids], max_tokens=1)[0] for ids in PROMPTS]


def test_the_settings_change_what_the_model_says(cold, dense):
    for sparse, other in zip(cold, dense):
        first = Reply(sparse.tokens[:1], sparse.logprobs[:1])
        assert first.distance(other._replace(tokens=first.tokens)) > 0.1


@pytest.mark.parametrize("size", [512, 301, 177, 97])
def test_chunks_of_any_size(start, cold, size):
    """Only the last queries of the prompt attend to every key, not those of each chunk."""
    engine, counts = start(max_num_batched_tokens=size), COUNTERS.read()
    (reply,) = say(engine, PROMPTS[:1])
    assert reply.distance(cold[0]) < CLOSE
    gain = gained(counts, COUNTERS.read())
    chunks = -(-len(PROMPTS[0]) // size)
    assert gain["prefills_sparse"] == chunks - CONFIG.block_size // size
    assert gain["layer_calls_dense"] == {}
    layers, heads = len(CONFIG.sparse_layers), 8
    ends = [min(end, len(PROMPTS[0])) for end in range(size, len(PROMPTS[0]) + size, size)]
    blocks = [
        -(-end // 256) - max((end - 1) // size * size // 256, 1) for end in ends if end > 256
    ]
    assert gain["blocks_sampled"] == layers * sum(blocks)
    assert gain["tokens_seen"] == layers * heads * sum(end for end in ends if end > 256)
    most = CONFIG.sink_size + CONFIG.num_samples
    assert 0.8 < gain["tokens_kept"] / (layers * heads * len(blocks) * most) <= 1


def test_long_prompts_in_turns(start, cold):
    """The threshold cuts prompts only while another request waits or runs."""
    engine, counts = start(long_prefill_token_threshold=333), COUNTERS.read()
    replies = say(engine, PROMPTS)
    assert gained(counts, COUNTERS.read())["prefills_sparse"] >= 8
    assert [one.distance(other) < CLOSE for one, other in zip(replies, cold)] == [True] * 2


def test_without_the_prompts_length_chunks_differ(start, cold, monkeypatch):
    """So the tests of chunks can fail: each chunk's last queries are then dense."""
    monkeypatch.setattr(backend, "prompt_lengths", lambda _: None)
    (reply,) = say(start(max_num_batched_tokens=301), PROMPTS[:1], max_tokens=1)
    first = Reply(reply.tokens, cold[0].logprobs[:1])
    assert first.distance(reply) > 2 * CLOSE


def test_prompts_in_one_step(start, cold):
    replies = say(start(), [PROMPTS[0], SHORT, PROMPTS[1]])
    assert replies[0].distance(cold[0]) < CLOSE
    assert replies[2].distance(cold[1]) < CLOSE


def test_beside_decodes_and_in_chunks(start, cold):
    """A full step holds the decodes of some and what there is room for of the next."""
    engine = start(max_num_batched_tokens=301)
    engine.reset_prefix_cache()
    llm_engine, replies, step = engine.llm_engine, {}, 0
    waiting = [("short", 0, SHORT), ("first", 2, PROMPTS[0]), ("second", 3, PROMPTS[1])]
    both = 0
    while waiting or llm_engine.has_unfinished_requests():
        while waiting and waiting[0][1] <= step:
            name, _, ids = waiting.pop(0)
            llm_engine.add_request(name, {"prompt_token_ids": ids}, asking(max_tokens=NEW_TOKENS))
        before = COUNTERS.read()["prefills_sparse"]
        outputs = llm_engine.step()
        both += bool(outputs) and COUNTERS.read()["prefills_sparse"] > before
        replies |= {one.request_id: Reply.of(one) for one in outputs if one.finished}
        step += 1
    assert both >= 3, "some steps held a decode and a sparse chunk"
    assert replies["first"].distance(cold[0]) < CLOSE
    assert replies["second"].distance(cold[1]) < CLOSE


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_and_resumed(start, caching):
    """With room for about one and a half, requests push each other out of the cache.

    A resumed request goes through its reply again, which attends to every key as it did before.
    """
    long = {"max_tokens": 150}
    engine = start(
        num_gpu_blocks_override=24, max_model_len=2048, disable_log_stats=False,
        enable_prefix_caching=caching,
    )  # fmt: skip
    alone = [say(engine, [ids], **long)[0] for ids in PROMPTS]
    before, counts = preemptions(engine), COUNTERS.read()
    replies = say(engine, PROMPTS, **long)
    preempted = preemptions(engine) - before
    assert preempted >= 1
    gain = gained(counts, COUNTERS.read())
    assert gain["prefills_sparse"] == len(PROMPTS) + preempted
    assert [one.distance(other) < CLOSE for one, other in zip(replies, alone)] == [True] * 2


def preemptions(engine):
    return next(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")


def test_the_prefix_of_another_users_prompt(start, cold):
    """Here the other's last queries are behind the prefix that both have."""
    shared = PROMPTS[0][:1000]
    others = [shared + prompt_ids(length, length) for length in (600, 311)]
    for other in others:
        (reply,) = say(start(), PROMPTS[:1], before=[other])
        assert reply.distance(cold[0]) < CLOSE


def test_where_another_prompt_ended_in_the_prefix_only_more_is_dense(start, dense):
    """Its last queries attended to every key, and stay so in the cache: the one difference."""
    every = dataclasses.replace(CONFIG, dense_queries=1024)
    own = dense[0]

    def apart(reply):
        here, there = reply.logprobs[0], own.logprobs[0]
        return max(abs(here[token] - there[token]) for token in here.keys() & there.keys())

    (reply,) = say(start(every), PROMPTS[:1], before=[PROMPTS[0][:1152]], max_tokens=1)
    (alone,) = say(start(every), PROMPTS[:1], max_tokens=1)
    assert apart(alone) > 2 * CLOSE
    assert apart(reply) < 0.5 * apart(alone), "nearly all of the prompt was dense"


SCRIPT = """
import json
from vllm_plugin.engines import additional_config, prompt_ids, start_engine
from vllm_plugin.test_exactness import CONFIG, PROMPTS, say
if __name__ == "__main__":
    engine = start_engine(
        tensor_parallel_size=2,
        enable_prefix_caching=True,
        max_num_batched_tokens=512,
        additional_config=additional_config(config=CONFIG.to_dict()),
    )
    other = PROMPTS[0][:1000] + prompt_ids(600, 21)
    cases = {"cold": [], "warm": [other]}
    replies = {name: say(engine, PROMPTS[:1], before=before)[0] for name, before in cases.items()}
    print("REPLIES", json.dumps(replies))
"""


def test_two_ranks(cold, tmp_path):
    """In chunks, cold and on the prefix of another prompt."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    for tokens, logprobs in json.loads(re.search(r"REPLIES (.*)", printed).group(1)).values():
        found = [{int(token): one for token, one in place.items()} for place in logprobs]
        assert Reply(tokens, found).distance(cold[0]) < CLOSE
