"""Draft tokens are no prompt: assisted and prompt lookup decoding give greedy's reply."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from integrations.models import CONFIG, LAYERS, SAMPLING, make_ids, make_model
from integrations.test_transformers import CLOSE
from token_sparse_attention import DenseReason
from token_sparse_attention.integrations.transformers import apply, register_dense_attention

# As few probes and so small a window that verifying passes would be long enough to run sparse.
EAGER = dataclasses.replace(SAMPLING, num_probes=2, dense_queries=1)
CONFIGS = {"selection": CONFIG, "sampling": SAMPLING, "few probes": EAGER}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "dense_auto"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["assisted", "lookup"])
def test_the_reply_is_greedys(kind, config, implementation):
    register_dense_attention()
    model, ids = make_model(), make_ids(120).repeat(1, 2)
    model.set_attn_implementation(implementation)
    extra = {"prompt_lookup_num_tokens": 9}
    if kind == "assisted":
        extra = {"assistant_model": make_model(seed=3)}
    greedy = {"max_new_tokens": 24, "do_sample": False}
    with apply(model, config) as report:
        plain = model.generate(ids, **greedy)
        prompt = [(record.kept, record.query_len, record.kv_len) for record in report]
        report.clear()
        drafted = model.generate(ids, **greedy, **extra)
    assert drafted.tolist() == plain.tolist()
    first, *later = report.prefills()
    assert [(record.kept, record.query_len, record.kv_len) for record in first] == prompt
    assert all(record.paths == ["sparse"] for record in first)
    assert later, "drafts were verified"
    for record in (record for records in later for record in records):
        assert record.dense_reason is DenseReason.DRAFTS


def test_a_continuation_is_scored_as_if_it_were_decoded():
    model, ids = make_model(), make_ids(230)
    with apply(model, SAMPLING) as report:
        cache = DynamicCache()
        model(ids[:, :200], past_key_values=cache)
        expected = [
            model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(200, 230)
        ]
        report.clear()
        scored = model(ids, logits_to_keep=31).logits[:, 1:]
    torch.testing.assert_close(scored, torch.cat(expected, 1), **CLOSE)
    assert [(record.paths, record.query_len) for record in report] == [(["sparse"], 200)] * LAYERS


@pytest.mark.parametrize("wanted", [0, 1, 200, 500])
def test_a_prompt_whose_logits_are_all_wanted_is_a_prompt(wanted):
    model, ids = make_model(), make_ids()
    with apply(model, SAMPLING) as report:
        expected = model(ids).logits
        logits = model(ids, logits_to_keep=wanted).logits
    torch.testing.assert_close(logits, expected[:, -logits.shape[1] :])
    assert [record.query_len for record in report] == [200] * 2 * LAYERS


def test_what_is_called_without_the_model_has_no_drafts():
    model, ids = make_model(), make_ids()
    with apply(model, SAMPLING) as report:
        model(ids, logits_to_keep=5)
        model.model(ids)
    assert [records[0].query_len for records in report.prefills()] == [196, 200]
