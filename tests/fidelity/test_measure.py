"""What is measured is what a prefill by hand and decoding token by token give."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from integrations.models import make_model
from support import SAMPLING
from token_sparse_attention import TokenSelectionConfig, bundled
from token_sparse_attention.evaluation.evaluate import Runner
from token_sparse_attention.evaluation.settings import Configuration
from token_sparse_attention.fidelity.measure import compare, make_header, measure
from token_sparse_attention.fidelity.prompts import SHAPES, PromptMaker
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.records import read_text

SELECTING = TokenSelectionConfig(
    drop_mass=0.4, observation_window=8, pool_size=3, min_tokens=8, crossover="off"
)
LENGTH = 300


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=4096)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    text = read_text(bundled.SAMPLE[0])[:20_000]
    return PromptMaker(tokenizer, {"code": text}).make(LENGTH, 1, tuple(SHAPES))


def measured(model, prompts, **configs):
    runner = Runner(model, None, {name: Configuration(c) for name, c in configs.items()})
    header = make_header(runner, None, {})
    results = measure(runner, prompts, header, None)
    return {(a.shape, a.configuration): a for a in results.answers}


@torch.no_grad()
def by_hand(model, prompt, config) -> torch.Tensor:
    """Log-probabilities of each token that follows, from one decode step each."""
    cache = DynamicCache()
    ids = torch.tensor([prompt.ids])
    if config is None:
        logits = model(ids, past_key_values=cache).logits[0, -1]
    else:
        with apply(model, config):
            logits = model(ids, past_key_values=cache).logits[0, -1]
    rows = [logits]
    for token in prompt.follow[:-1]:
        rows.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize("config", [SAMPLING, SELECTING], ids=lambda config: config.method)
def test_it_is_what_decoding_token_by_token_gives(model, prompts, config):
    found = measured(model, prompts, sparse=config)
    for prompt in prompts:
        dense, sparse = by_hand(model, prompt, None), by_hand(model, prompt, config)
        for shape, begin, end in prompt.parts:
            answer = found[shape, "sparse"]
            assert len(answer.divergence) == end - begin
            for number in range(begin, end):
                p, q = dense[number].exp(), sparse[number].exp()
                expected = math.fsum((p * (p / q).log()).tolist())
                assert answer.divergence[number - begin] == pytest.approx(
                    expected, rel=0.01, abs=2e-6
                )
                assert answer.agreement[number - begin] == (p.argmax() == q.argmax())
                loss = -math.log(q[prompt.follow[number]])
                assert answer.loss[number - begin] == pytest.approx(loss, rel=1e-4)
                loss = -math.log(p[prompt.follow[number]])
                assert found[shape, "dense"].loss[number - begin] == pytest.approx(loss, rel=1e-4)
            assert max(answer.divergence) > 1e-6, "nothing was left out"


def test_nothing_diverges_where_every_query_sees_every_key(model, prompts):
    window = dataclasses.replace(SAMPLING, sliding_window=2 * LENGTH)
    found = measured(model, prompts, window=window)
    assert {shape for shape, _ in found} == set(SHAPES)
    for (shape, name), answer in found.items():
        assert max(answer.divergence) < 1e-9, (shape, name)
        assert all(answer.agreement)
        assert answer.loss == pytest.approx(found[shape, "dense"].loss, abs=1e-5)


def test_shapes_of_one_cache_share_their_prefill(model, prompts):
    found = measured(model, prompts, sparse=SAMPLING)
    lookup, second = found["lookup", "sparse"], found["second-turn", "sparse"]
    assert lookup.seconds == second.seconds
    assert lookup.kept == second.kept
    assert found["lookup", "dense"].kept is None


def test_log_probabilities_are_compared_by_hand():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    sparse = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    found = compare(dense, sparse, [0, 2])
    assert found.divergence == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-6)
    assert found.agreement == [False, True]
    assert found.loss == pytest.approx([math.log(4), math.log(10)], rel=1e-5)
    with pytest.raises(ValueError, match="must be finite"):
        compare(dense, sparse * math.nan, [0, 2])


def test_a_pattern_is_a_contender(model, prompts):
    runner = Runner(model, None, {"streaming": Configuration(pattern="streaming")})
    header = make_header(runner, None, {})
    results = measure(runner, prompts[:1], header, None)
    assert [answer.configuration for answer in results.answers] == ["dense", "streaming"]
