"""A prompt in parts gives what it gives whole: probes stay with the cache, or are not used."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from integrations.models import LAYERS, SAMPLING, make_ids, make_model, sharp
from integrations.test_transformers import paths
from token_sparse_attention import DenseReason
from token_sparse_attention.integrations.past_probes import store_of
from token_sparse_attention.integrations.transformers import apply

CONFIG = dataclasses.replace(SAMPLING, dense_queries=0)
CONFIGS = {
    "shared": CONFIG,
    "per head": dataclasses.replace(CONFIG, budget="per_head", dense_heads=(1,)),
    "larger": dataclasses.replace(CONFIG, block_size=32, num_probes=4, sliding_window=40),
}
CLOSE = {"rtol": 1e-7, "atol": 1e-7}
LENGTH = 150


@pytest.fixture(scope="module")
def model():
    return sharp().double()


def in_parts(model, ids, ends, cache=None, **arguments):
    """The logits of a prompt that is prefilled in parts, each up to one of `ends`."""
    cache = DynamicCache() if cache is None else cache
    start, logits = cache.get_seq_length(), []
    for end in ends:
        part = ids[:, int(start) : end]
        logits.append(model(part, past_key_values=cache, **arguments).logits)
        start = end
    return torch.cat(logits, 1)


def forget(cache):
    """A copy of the cache without probes."""
    cache = copy.deepcopy(cache)
    store_of(cache).clear()
    return cache


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_split_equals_one_call(model, name, data):
    steps = st.lists(st.integers(2, 70), min_size=1, max_size=12)
    ends = [sum(steps[: i + 1]) for steps in [data.draw(steps)] for i in range(len(steps))]
    ends = [end for end in ends if end <= LENGTH - 2] + [LENGTH]
    ids, cache, whole = make_ids(LENGTH), DynamicCache(), DynamicCache()
    with apply(model, CONFIGS[name]):
        expected = in_parts(model, ids, [LENGTH], whole)
        logits = in_parts(model, ids, ends, cache)
    torch.testing.assert_close(logits, expected, **CLOSE)
    for mine, theirs in zip(cache.layers, whole.layers):
        torch.testing.assert_close(mine.keys, theirs.keys, **CLOSE)
        torch.testing.assert_close(mine.values, theirs.values, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_of_generate_equal_one_call(model, kind):
    ids = make_ids(LENGTH)
    greedy = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": kind}
    with apply(model, CONFIG) as report:
        whole = model.generate(ids, **greedy)
        report.clear()
        chunked = model.generate(ids, **greedy, prefill_chunk_size=40)
    assert chunked.tolist() == whole.tolist()
    assert [len(records) for records in report.prefills()] == [LAYERS] * 4
    assert all(record.paths == ["sparse"] for record in report)


@pytest.mark.parametrize("padded", [False, True])
def test_static_caches_keep_probes(model, padded):
    ids, mask = make_ids(LENGTH, batch=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, : 37 * padded] = 0
    cache = StaticCache(config=model.config, max_cache_len=200)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, CONFIG) as report:
        expected = model(ids, attention_mask=mask, position_ids=position).logits
        for part in (slice(0, 70), slice(70, LENGTH)):
            logits = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=position[:, part],
                past_key_values=cache,
            ).logits
            real = mask[:, part].bool()
            torch.testing.assert_close(logits[real], expected[:, part][real], **CLOSE)
        assert report.last_prefill()[0].paths == ["sparse"] * 2
        cache.reset()
        other = make_ids(LENGTH, batch=2, seed=5)
        logits = in_parts(model, other, [90, LENGTH], cache)
        torch.testing.assert_close(logits, in_parts(model, other, [LENGTH]), **CLOSE)


def test_only_a_prompt_s_last_queries_attend_to_every_key(model):
    config, ids = dataclasses.replace(CONFIG, dense_queries=6), make_ids(LENGTH)
    applied, cache = apply(model, config), DynamicCache()
    with applied:
        whole = model(ids).logits
        apart = in_parts(model, ids, [83, LENGTH])
        with applied.prompt_continues():
            first = in_parts(model, ids, [40, 83], cache)
        logits = torch.cat((first, in_parts(model, ids, [LENGTH], cache)), 1)
    torch.testing.assert_close(logits, whole, **CLOSE)
    changed = (apart - whole).abs().amax((0, 2)) > 1e-6
    assert not changed[:77].any()
    assert changed[77:83].all()


def test_two_questions_on_copies_of_a_cache(model):
    """The documented way to reuse a prefix; a pickle carries the probes as well."""
    text, cache = make_ids(90), DynamicCache()
    with apply(model, CONFIG):
        model(text, past_key_values=cache)
        pickled = pickle.dumps(cache)
        for seed, copied in enumerate((copy.deepcopy(cache), pickle.loads(pickled), cache)):
            ids = torch.cat((text, make_ids(50, seed=seed + 7)), 1)
            logits = in_parts(model, ids, [110, 140], copied)
            torch.testing.assert_close(logits, model(ids).logits[:, 90:], **CLOSE)


def test_a_cache_that_the_model_makes_keeps_probes(model):
    ids = make_ids(LENGTH)
    with apply(model, CONFIG):
        whole = model(ids).logits
        cache = model(ids[:, :83]).past_key_values
        as_tuple = model(ids[:, :83], return_dict=False)[1]
        for one in (cache, as_tuple):
            logits = model(ids[:, 83:], None, None, one).logits  # by its position
            torch.testing.assert_close(logits, whole[:, 83:], **CLOSE)


def test_what_has_no_probes_runs_its_first_block_dense(model):
    ids, cache = make_ids(LENGTH), DynamicCache()
    model(ids[:, :96], past_key_values=cache)
    dense = in_parts(model, ids, [LENGTH], copy.deepcopy(cache))
    with apply(model, dataclasses.replace(CONFIG, sparse_layers=(0,))) as report:
        logits = in_parts(model, ids, [LENGTH], copy.deepcopy(cache))
        assert report.last_prefill()[0].paths == ["sparse"]
        changed = (logits - dense).abs().amax((0, 2)) > 1e-9
        assert not changed[:16].any()
        assert changed[16:].any()
        in_parts(model, ids, [110], cache)
    assert report.last_prefill()[0].reasons == [str(DenseReason.NO_PROBES)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_companions_and_padding_change_nothing(model, side):
    lengths, ids = (LENGTH, 101, 64), make_ids(LENGTH, batch=3)
    mask = torch.stack([torch.arange(LENGTH) < length for length in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    position = (mask.cumsum(1) - 1).clamp(min=0)
    parts = [slice(0, 97), slice(97, LENGTH)] if side == "left" else [slice(0, LENGTH)]
    cache, logits = DynamicCache(), []
    with apply(model, CONFIG) as report:
        for part in parts:
            out = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=position[:, part],
                past_key_values=cache,
            )
            logits.append(out.logits)
        assert paths(report) == [["sparse"] * 3] * LAYERS
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            torch.testing.assert_close(torch.cat(logits, 1)[row, real], alone, **CLOSE)


def test_a_later_token_changes_nothing_before_it(model):
    ids, caches, hidden = make_ids(LENGTH), [], []
    with apply(model, CONFIG):
        for position in (LENGTH, 97, 130, 149):
            changed = ids.clone()
            changed[:, position:] = make_ids(LENGTH, seed=9)[:, position:]
            cache = DynamicCache()
            out = model(changed, past_key_values=cache, output_hidden_states=True)
            hidden.append((position, out.hidden_states))
            caches.append(cache)
    for (position, states), cache in zip(hidden, caches):
        for mine, theirs in zip(states, hidden[0][1]):
            assert torch.equal(mine[:, :position], theirs[:, :position])
        for mine, theirs in zip(cache.layers, caches[0].layers):
            assert torch.equal(mine.keys[:, :, :position], theirs.keys[:, :, :position])
            assert torch.equal(mine.values[:, :, :position], theirs.values[:, :, :position])


CHANGES = {
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "one beam twice": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "one row": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "cropped": lambda cache: cache.crop(-60),
}


@pytest.mark.parametrize("name", CHANGES)
def test_probes_of_other_tokens_are_not_used(model, name):
    """Where the cache's tokens are others, it is as if there were no probes."""
    ids, cache = make_ids(LENGTH, batch=2), DynamicCache()
    with apply(model, CONFIG):
        model(ids[:, :112], past_key_values=cache)
        CHANGES[name](cache)
        rows, start = len(cache.layers[0].keys), cache.get_seq_length()
        new = make_ids(60, batch=rows, seed=3)
        expected = model(new, past_key_values=forget(cache)).logits
        if name == "one beam twice":  # the second row is what it was
            kept = copy.deepcopy(cache)
            kept.batch_select_indices(torch.tensor([1]))
            one = torch.cat((ids[1:, :start], new[1:]), 1)
            expected[1:] = model(one).logits[:, start:]
        logits = model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_probes_before_a_crop_stay(model):
    ids, other = make_ids(LENGTH), make_ids(LENGTH, seed=4)
    with apply(model, CONFIG):
        cropped, short = DynamicCache(), DynamicCache()
        in_parts(model, ids, [LENGTH], cropped)
        cropped.crop(-14)
        in_parts(model, ids, [136], short)
        for query, position, key in store_of(short).values():
            position[position < LENGTH - 32] = -1  # what the ring forgot
            assert (position >= 0).sum() == 9
            assert query.isfinite().all()
            assert key.isfinite().all()
        expected, logits = (in_parts(model, other, [LENGTH], one) for one in (short, cropped))
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_probes_of_replaced_tokens_are_not_used(model):
    """As when drafts that looked like a prompt were rejected, and other tokens came there."""
    ids, cache = make_ids(LENGTH), DynamicCache()
    with apply(model, CONFIG):
        in_parts(model, make_ids(LENGTH, seed=4), [122], cache)
        cache.crop(-12)
        in_parts(model, ids, range(111, 123), cache)
        expected = copy.deepcopy(cache)
        for _, position, _ in store_of(expected).values():
            assert (position >= 110).any()
            position[position >= 110] = -1
        logits = in_parts(model, ids, [LENGTH], cache)
        torch.testing.assert_close(logits, in_parts(model, ids, [LENGTH], expected), **CLOSE)


@pytest.mark.parametrize("prompt_len", [1, 40])
def test_rejected_drafts_leave_no_probes(model, prompt_len):
    """What verifies drafts, and is cropped, changes nothing of what follows."""
    ids, drafts = make_ids(LENGTH), make_ids(9, seed=8)
    end = 83 + prompt_len
    with apply(model, CONFIG):
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            in_parts(model, ids, [83], cache)
        in_parts(model, ids, [end], caches[0])
        drafted = torch.cat((ids[:, 83:end], drafts), 1)
        model(drafted, past_key_values=caches[1], logits_to_keep=10)
        caches[1].crop(-9)
        expected, logits = (in_parts(model, ids, [LENGTH], cache) for cache in caches)
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["greedy", "beams", "lookup"])
def test_a_turn_after_a_reply_continues(model, kind):
    """The reply's tokens leave no probes; where they are too many, a block is dense."""
    extra = {"greedy": {}, "beams": {"num_beams": 3}, "lookup": {"prompt_lookup_num_tokens": 5}}
    ids = make_ids(60).repeat(1, 2)
    with apply(model, CONFIG) as report:
        out = model.generate(
            ids,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            **extra[kind],
        )
        cache, rows = out.past_key_values, len(out.past_key_values.layers[0].keys)
        length = cache.get_seq_length()
        new = make_ids(60, batch=rows, seed=6)
        expected = model(new, past_key_values=forget(cache)).logits
        logits = model(new, past_key_values=cache).logits
        assert all(set(record.paths) == {"sparse"} for record in report.last_prefill())
    first_known = (length // 16 + 2) * 16 - length  # its block has all probes either way
    assert rows == (3 if kind == "beams" else 1)
    assert logits.shape == expected.shape
    assert (logits - expected).abs()[:, :first_known].amax() > 1e-9, "probes were used"


def test_autocast_and_other_dtypes():
    model, ids = sharp(), make_ids(LENGTH)
    with apply(model, CONFIG) as report, torch.autocast("cpu", dtype=torch.bfloat16):
        cache = DynamicCache()
        in_parts(model, ids, [96], cache)
        assert {kept[0].dtype for kept in store_of(cache).values()} == {torch.bfloat16}
        other = copy.deepcopy(cache)
        in_parts(model, ids, [111], cache)
        assert paths(report) == [["sparse"]] * LAYERS
    with apply(model, CONFIG) as report:
        in_parts(model, ids, [111], other)
        assert report.last_prefill()[0].reasons == [str(DenseReason.NO_PROBES)]


def test_nothing_is_kept_without_a_cache_or_samples():
    model, ids = make_model(), make_ids()
    applied = apply(model, CONFIG)
    with applied:
        model(ids, use_cache=False)
        assert applied.layers.current.store is None
        cache = DynamicCache()
        model(ids[:, :1], past_key_values=cache)
        for token in ids[:, 1:20].T:
            model(token[None], past_key_values=cache)
        assert not store_of(cache), "decode steps"
