"""SGLang's engine with the plugin says what the Hugging Face integration says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sglang_plugin.engines import CONFIG, distance
from vllm_plugin.engines import hf_logprobs, prompt_ids

pytestmark = pytest.mark.sglang
CLOSE = 0.001  # in nats
PROMPT = prompt_ids(1500, 3)
SHARED = 1000  # tokens of the prompt that others begin with
NEW_TOKENS = 6
ENDS_DENSE = dataclasses.replace(CONFIG, dense_queries=64)


def other(seed):
    """A prompt of another text behind the shared prefix."""
    return PROMPT[:SHARED] + prompt_ids(600, seed)


@pytest.fixture(scope="module")
def whole(engines):
    """Prompts are not cut; pages of one token."""
    return engines()


@pytest.fixture(scope="module")
def cut(engines):
    """Chunks of 512 tokens, larger pages, and dense queries at the end of a prompt."""
    return engines(config=ENDS_DENSE, chunked_prefill_size=512, page_size=16)


@pytest.fixture(scope="module")
def hf_model():
    from transformers import AutoModelForCausalLM

    from token_sparse_attention import bundled

    return AutoModelForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(hf_model):
    """Logprobs of a reply after a whole prompt, whose tokens are decoded densely."""

    def get(config, reply):
        logprobs, _ = hf_logprobs(hf_model, PROMPT, config, reply, len(PROMPT))
        return logprobs

    return get


def cold(engine, new_tokens=NEW_TOKENS):
    engine.forget()
    ((reply, logprobs, cached),) = engine.generate([PROMPT], new_tokens)
    assert cached == 0
    return reply, logprobs


def same(logprobs, tensor):
    """Whether an engine's logprobs are those of a tensor [tokens, vocabulary]."""
    return max(
        abs(value - row[token].item())
        for entries, row in zip(logprobs, tensor, strict=True)
        for token, value in entries.items()
    )


def test_a_prompt_and_its_reply_are_those_of_hugging_face(whole, expected):
    before = whole.counts()
    reply, logprobs = cold(whole)
    after = whole.counts()
    assert after["prefills", "", "sparse"] == before.get(("prefills", "", "sparse"), 0) + 1
    calls = ("layer_calls", "", "sparse")
    assert after[calls] == before.get(calls, 0) + len(CONFIG.sparse_layers)
    assert same(logprobs, expected(CONFIG, reply)) < CLOSE
    assert same(logprobs, expected(None, reply)) > 0.1, "else it says nothing"


def test_chunks_say_what_the_whole_prompt_says(cut, expected):
    before = cut.counts()
    reply, logprobs = cold(cut)
    after = cut.counts()
    chunks = -(-len(PROMPT) // 512)
    assert after["prefills", "", "sparse"] - before.get(("prefills", "", "sparse"), 0) == chunks
    assert not any("layer_calls" in key and "dense" in key for key in after)
    assert same(logprobs, expected(ENDS_DENSE, reply)) < CLOSE
    assert same(logprobs, expected(CONFIG, reply)) > 10 * CLOSE, "else the end is not dense"


@pytest.mark.parametrize("how", ["whole", "cut"])
def test_a_warm_prefix_of_another_prompt_changes_nothing(how, request):
    engine = request.getfixturevalue(how)
    _, alone = cold(engine)
    warm = []
    for seed in (21, 22):
        engine.forget()
        engine.generate([other(seed)])
        ((_, logprobs, cached),) = engine.generate([PROMPT], NEW_TOKENS)
        assert SHARED - 16 < cached <= SHARED
        warm.append(logprobs)
    assert warm[0] == warm[1], "the text of the other prompt"
    for one, two in zip(warm[0], alone, strict=True):
        assert distance(one, two) < CLOSE


def test_requests_beside_it_change_nothing(whole):
    reply, alone = cold(whole)
    whole.forget()
    short = prompt_ids(60, 5)
    together = whole.generate([short, PROMPT, prompt_ids(900, 6), short[:20]], NEW_TOKENS)
    assert together[1][0] == reply
    for one, two in zip(together[1][1], alone, strict=True):
        assert distance(one, two) < CLOSE
    for ids, beside in ((short, together[0]), (short[:20], together[3])):
        whole.forget()
        ((lone, logprobs, _),) = whole.generate([ids], NEW_TOKENS)
        assert lone == beside[0]
        for one, two in zip(logprobs, beside[1], strict=True):
            assert distance(one, two) < CLOSE


@torch.no_grad()
def test_a_second_turn_goes_on_from_a_reply(whole, hf_model):
    """The cache then holds tokens that were decoded, which left no probes."""
    from transformers import DynamicCache

    from token_sparse_attention.integrations.transformers import apply

    reply, _ = cold(whole)
    turn = [reply[-1], *prompt_ids(300, 9)]  # the last token of a reply was never run
    ((_, logprobs, cached),) = whole.generate([PROMPT + reply[:-1] + turn])
    assert cached == len(PROMPT) + NEW_TOKENS - 1
    cache = DynamicCache()
    with apply(hf_model, CONFIG):
        for ids in (PROMPT, *([token] for token in reply[:-1]), turn):
            out = hf_model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    assert same(logprobs, out.logits[0, -1:].log_softmax(-1)) < CLOSE
