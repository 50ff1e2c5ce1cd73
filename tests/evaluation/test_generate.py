"""Replies against `model.generate` and against decoding token by token."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from integrations.models import make_ids, make_model
from token_sparse_attention import TokenSelectionConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.generate import Ending, encode, ending, reply
from token_sparse_attention.integrations.transformers import apply

# A window so small that a draft's forward pass would pass for a prefill.
CONFIG = TokenSelectionConfig(drop_mass=0.4, observation_window=4, pool_size=3, min_tokens=8)
TOKENIZER = SimpleNamespace(decode=lambda tokens, **_: "".join(f"<{token}>" for token in tokens))
NEW = 12


@pytest.fixture(scope="module")
def model():
    return varied_model("Llama")


def varied_model(family):
    """A model that does not repeat itself, so that a wrong draft would show."""
    made = make_model(family, tie_word_embeddings=False)
    for parameter in made.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return made


def end(new=NEW, until=(), ends=()):
    return Ending(TOKENIZER, until, frozenset(ends), new)


def generated(model, ids, new=NEW):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


def one_by_one(model, ids, config):
    """A sparse prefill without a draft or a crop: decoding by `generate` from its cache."""
    with apply(model, config):
        out = model(ids, use_cache=True)
    first = out.logits[:, -1:].argmax(-1)
    both = torch.cat([ids, first], 1)
    more = model.generate(
        both,
        past_key_values=out.past_key_values,
        attention_mask=torch.ones_like(both),
        max_new_tokens=NEW - 1,
        do_sample=False,
    )
    return more[0, ids.shape[1] :].tolist()


def drafts(right):
    """Right, partly right at every length, wrong, too short, and none."""
    yield right
    for position in range(1, len(right)):
        yield [*right[:position], (right[position] + 1) % 199, *right[position + 1 :]]
    yield [(token + 1) % 199 for token in right]
    yield right[:1]
    yield []


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_dense_replies_are_those_of_generate_whatever_the_draft(family):
    model, ids = varied_model(family), make_ids(90)
    right = generated(model, ids)
    assert len(set(right)) > 3
    for draft in drafts(right):
        said = reply(model, ids, None, end(), drafts=[draft])
        assert said.tokens == right, draft
        assert said.kept is None
        assert said.prompt_tokens == 90


def test_sparse_replies_decode_densely_whatever_the_draft(model):
    ids = make_ids(90)
    right = one_by_one(model, ids, CONFIG)
    dense = generated(model, ids)
    assert right != dense
    for draft in (dense, *drafts(right)):
        assert reply(model, ids, CONFIG, end(), drafts=[draft]).tokens == right, draft
    assert model.config._attn_implementation == "sdpa"


def test_a_draft_costs_one_forward_pass(model):
    ids, calls = make_ids(90), []
    right = generated(model, ids)
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    reply(model, ids, None, end(), drafts=[right])
    assert len(calls) == 2
    wrong = [right[0], *((token + 1) % 199 for token in right[1:])]
    reply(model, ids, None, end(), drafts=[wrong, right])
    assert len(calls) == 2 + 3
    hook.remove()


def test_replies_end_at_end_tokens_and_stop_texts(model):
    ids = make_ids(90)
    right = generated(model, ids)
    at = next(n for n in range(2, NEW) if right[n] not in right[:n])
    said = reply(model, ids, None, end(ends=[right[at]]))
    assert said.tokens == right[: at + 1]
    across = f"{right[at - 1]}><{right[at]}"  # begins within one token and ends in the next
    said = reply(model, ids, None, end(until=[across]))
    assert said.tokens == right[: at + 1]
    assert said.text == "".join(f"<{token}>" for token in right[: at - 1]) + "<"
    assert reply(model, ids, None, end(new=1)).tokens == right[:1]


def test_the_generation_config_says_what_ends_a_reply(model):
    model.generation_config.eos_token_id = [5, 6]
    assert ending(model, TOKENIZER, ["", "a"], 3) == end(3, ["a"], [5, 6])
    model.generation_config.eos_token_id = None
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert ending(model, tokenizer, [], 3).end_tokens == {7}


def test_kept_is_a_number_where_heads_agree_and_null_where_dense(model):
    ids = make_ids(90)
    with apply(model, CONFIG) as report:
        model(ids)
    numbers = [record.kept[0][0] for record in report.last_prefill()]
    assert reply(model, ids, CONFIG, end(1)).kept == numbers
    one = dataclasses.replace(CONFIG, sparse_layers=(1,), budget="per_head")
    kept = reply(model, ids, one, end(1)).kept
    assert kept[0] is kept[2] is None
    assert len(kept[1]) == 4
    assert len(set(kept[1])) > 1
    short = reply(model, make_ids(10), CONFIG, end(1))
    assert short.kept == [None, None, None]


def test_prompts_are_encoded_as_lm_eval_does(model):
    class Tokenizer:
        bos_token = "^"

        def __call__(self, text, return_tensors, add_special_tokens):  # noqa: ARG002
            text = "^" * add_special_tokens + text
            return {"input_ids": torch.tensor([[ord(char) for char in text]])}

    assert encode(model, Tokenizer(), "ab", 5).tolist() == [[94, 97, 98]]
    assert encode(model, Tokenizer(), "^ab", 5).tolist() == [[94, 97, 98]]
    long = encode(model, Tokenizer(), "a" * 3000 + "b", 48)
    assert long.shape == (1, 2000)
    assert long[0, -1] == 98
    with pytest.raises(UsageError, match="2048 positions"):
        encode(model, Tokenizer(), "ab", 2048)
