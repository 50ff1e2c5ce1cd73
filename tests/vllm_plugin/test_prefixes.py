"""KV sampling: however a prompt is cut, and whoever left its prefix, it gives the same."""

from __future__ import annotations

import dataclasses

import pytest

from token_sparse_attention.integrations.serving.counters import COUNTERS
from vllm_plugin.engines import SAMPLING, additional_config, gained, prompt_ids, sampling

pytestmark = pytest.mark.vllm
CLOSE = 0.001  # in nats
# In few layers: else a rounding error that changes one sample changes everything after it.
CONFIG = dataclasses.replace(SAMPLING, sparse_layers=(2, 5, 8))
PROMPT = prompt_ids(1500, 3)
SHARED = 1000  # tokens of the prompt that others begin with


def others(seeds):
    """Prompts of one length that begin as `PROMPT` does."""
    return [PROMPT[:SHARED] + prompt_ids(600, seed) for seed in seeds]


@pytest.fixture
def start(engines):
    def get(dense_queries=0, **changes):
        config = dataclasses.replace(CONFIG, dense_queries=dense_queries)
        given = additional_config(config=config.to_dict())
        return engines(enable_prefix_caching=True, additional_config=given, **changes)

    return get


def logprobs(engine, ids, before=()):
    """Return the logprobs after a prompt of the likeliest tokens, and what the counters gained.

    The prompts `before` come first, in an empty cache.
    """
    engine.reset_prefix_cache()
    how = sampling(max_tokens=1, logprobs=20, detokenize=False)
    for one in before:
        engine.generate([{"prompt_token_ids": one}], how, use_tqdm=False)
    counts = COUNTERS.read()
    (output,) = engine.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)
    (entries,) = output.outputs[0].logprobs
    found = {token: entry.logprob for token, entry in entries.items()}
    return found, gained(counts, COUNTERS.read())


def distance(one, other):
    """The largest difference between tokens that both list."""
    both = one.keys() & other.keys()
    assert both
    return max(abs(one[token] - other[token]) for token in both)


def test_chunks_and_warm_prefixes_say_what_a_cold_prompt_says(engines, start):
    cold, gain = logprobs(start(), PROMPT)
    assert gain["prefills_sparse"] == 1
    dense, _ = logprobs(engines(additional_config={}, attention_backend=None), PROMPT)
    assert distance(cold, dense) > 0.1, "else it says nothing"
    (other,) = others([21])
    warm, gain = logprobs(start(), PROMPT, before=[other])
    assert gain["prefills_sparse"] == 1
    assert gain["layer_calls_sparse"] == len(CONFIG.sparse_layers)
    assert distance(warm, cold) < CLOSE
    for chunk in (512, 300):
        cut, gain = logprobs(start(max_num_batched_tokens=chunk), PROMPT)
        assert gain["prefills_sparse"] == -(-len(PROMPT) // chunk)
        assert gain["layer_calls_dense"] == {}
        assert distance(cut, cold) < CLOSE


def test_the_text_of_one_request_does_not_change_another(start):
    """The last queries of a prompt attend to every key, but only where it ends counts."""
    engine = start(dense_queries=700)  # more than the others add to the prefix
    first, second = (logprobs(engine, PROMPT, before=[other])[0] for other in others([21, 22]))
    assert first == second
