"""apply() on real architectures: what runs sparse, what runs dense, and what it equals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import DynamicCache, StaticCache

from integrations.models import CONFIG, LAYERS, make_ids, make_model, oracle
from token_sparse_attention import DenseReason, LayerProfile, TokenSelectionConfig
from token_sparse_attention.integrations.transformers import apply

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def paths(report):
    return [record.paths for record in report.last_prefill()]


def reasons(report):
    return [record.reasons[0] for record in report.last_prefill()]


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GptOss", "DeepseekV3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_rules_equal_the_model_alone(family, attention):
    model, ids = make_model(family), make_ids(batch=2)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("this transformers version offers no sdpa for this family")
    model.set_attn_implementation(attention)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    dense = model(ids, attention_mask=mask).logits
    with apply(model, TokenSelectionConfig()) as report:  # min_tokens is 1024
        short = model(ids, attention_mask=mask).logits
    assert torch.equal(short, dense)
    assert all(path == ["dense"] for path in paths(report))


def test_eager_models_read_their_additive_mask():
    model, ids = make_model(), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    with apply(model, CONFIG):
        expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    with apply(model, CONFIG) as report:
        eager = model(ids, attention_mask=mask).logits
    assert paths(report) == [["sparse"] * 2] * LAYERS
    torch.testing.assert_close(eager[0, 30:], expected[0, 30:], **CLOSE)
    torch.testing.assert_close(eager[1], expected[1], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, ids = make_model(), make_ids(batch=3)
    mask = torch.ones_like(ids)
    lengths = [200, 150, 20]
    for row, length in enumerate(lengths):
        mask[row, : 200 - length] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, CONFIG) as report:
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        record = report.last_prefill()[0]
        assert record.paths == ["sparse", "sparse", "dense"]
        assert record.reasons[2] == "context too short for the method to leave any key out"
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            torch.testing.assert_close(batch[row, real], alone, **CLOSE)


def greedy(model, ids, cache, new_tokens, **kwargs):
    """Greedy decoding by hand, from logits already in the cache's prompt."""
    out = model(ids, past_key_values=cache, **kwargs)
    tokens = [out.logits[:, -1].argmax(-1)]
    for _ in range(new_tokens - 1):
        out = model(tokens[-1][:, None], past_key_values=cache)
        tokens.append(out.logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1)


def test_generate_prefills_sparse_and_decodes_dense():
    model, ids = make_model(), make_ids()
    with oracle(model):
        expected = greedy(model, ids, DynamicCache(), 6)
    with apply(model, CONFIG) as report:
        generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert generated[:, 200:].tolist() == expected.tolist()
    assert report.decode_calls == 5 * LAYERS
    assert len(report.prefills()) == 1
    assert paths(report) == [["sparse"]] * LAYERS


def test_the_cache_keeps_every_token():
    model, ids = make_model(), make_ids()
    cache = DynamicCache()
    with apply(model, CONFIG):
        model(ids, past_key_values=cache)
    assert cache.layers[-1].keys.shape[2] == 200


def test_a_second_turn_is_a_chunk_over_the_whole_cache():
    model, ids = make_model(), make_ids(260)

    def two_turns():
        cache = DynamicCache()
        first = model(ids[:, :200], past_key_values=cache).logits
        return first, model(ids[:, 200:], past_key_values=cache).logits

    with oracle(model):
        expected = two_turns()
    with apply(model, CONFIG) as report:
        got = two_turns()
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert [len(one) for one in report.prefills()] == [LAYERS, LAYERS]
    assert report.last_prefill()[0].query_len == 60
    assert report.last_prefill()[0].kv_len == 260
    assert paths(report) == [["sparse"]] * LAYERS


def test_a_static_cache_gives_what_a_dynamic_one_gives():
    model, ids = make_model(), make_ids(260)

    def two_turns(cache):
        first = model(ids[:, :200], past_key_values=cache).logits
        return torch.cat([first, model(ids[:, 200:], past_key_values=cache).logits], 1)

    with apply(model, CONFIG) as report:
        dynamic = two_turns(DynamicCache())
        static = two_turns(StaticCache(config=model.config, max_cache_len=512))
    torch.testing.assert_close(static, dynamic, **CLOSE)
    assert [(one[0].query_len, one[0].kv_len) for one in report.prefills()] == [
        (200, 200),
        (60, 260),
    ] * 2
    assert all(record.paths == ["sparse"] for record in report)


def test_a_static_cache_with_left_padding_in_both_turns():
    model, ids = make_model(), make_ids(260, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :45] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def two_turns(cache):
        turns = []
        for part in (slice(0, 200), slice(200, 260)):
            logits = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            ).logits
            turns.append(logits)
        return torch.cat(turns, 1)

    with apply(model, CONFIG) as report:
        static = two_turns(StaticCache(config=model.config, max_cache_len=400))
        assert all(record.paths == ["sparse", "sparse"] for record in report)
        dynamic = two_turns(DynamicCache())
    real = mask.bool()
    torch.testing.assert_close(static[real], dynamic[real], **CLOSE)


def test_generate_with_a_static_cache():
    model, ids = make_model(), make_ids()
    with apply(model, CONFIG) as report:
        dynamic = model.generate(ids, max_new_tokens=5, do_sample=False)
        static = model.generate(
            ids, max_new_tokens=5, do_sample=False, cache_implementation="static"
        )
    assert static.tolist() == dynamic.tolist()
    assert all(record.paths == ["sparse"] for record in report)


def test_chunked_prefill_equals_its_definition():
    model, ids = make_model(), make_ids(250)

    def chunked():
        cache = DynamicCache()
        for start in (0, 100):
            model(ids[:, start : start + 100], past_key_values=cache)
        return greedy(model, ids[:, 200:], cache, 4)

    with oracle(model):
        expected = chunked()
    with apply(model, CONFIG) as report:
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=100)
    assert generated[:, 250:].tolist() == expected.tolist()
    assert [one[0].query_len for one in report.prefills()] == [100, 100, 50]
    assert all(record.paths == ["sparse"] for record in report)


def test_left_padded_generation_equals_each_prompt_alone():
    model, ids = make_model(), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    with apply(model, CONFIG):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        first = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        second = model.generate(ids[1:, 60:], max_new_tokens=5, do_sample=False)
    assert both[0, 200:].tolist() == first[0, 200:].tolist()
    assert both[1, 200:].tolist() == second[0, 140:].tolist()


def test_beam_search():
    model, ids = make_model(), make_ids()
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with oracle(model):
        expected = model.generate(ids, **settings)
    with apply(model, CONFIG) as report:
        beams = model.generate(ids, **settings)
        assert beams.tolist() == expected.tolist()
    assert all(path.count("sparse") == len(path) for path in paths(report))
    assert report.decode_calls == 4 * LAYERS


def test_layers_and_profiles():
    model, ids = make_model(), make_ids()
    with apply(model, dataclasses.replace(CONFIG, sparse_layers=(1,))) as report:
        only = model(ids).logits
    assert paths(report) == [["dense"], ["sparse"], ["dense"]]
    assert reasons(report)[0] == "layer is not among the sparse layers"
    profile = LayerProfile(base=CONFIG, layers={1: {}})
    with apply(model, profile) as report:
        assert torch.equal(model(ids).logits, only)
    profile = LayerProfile(base=CONFIG, layers={1: {}, 2: {"drop_mass": 0.6}})
    with apply(model, profile) as report:
        model(ids)
    kept = [record.kept_share for record in report.last_prefill()]
    assert kept[0] == 1
    assert kept[2] < kept[1] < 1
    with pytest.raises(ValueError, match=r"sparse_layers must be below 3.*got \[3\]"):
        apply(model, dataclasses.replace(CONFIG, sparse_layers=(3,)))


def test_windowed_fallback_and_per_head_budgets():
    model, ids = make_model(initializer_range=0.2), make_ids()
    config = dataclasses.replace(CONFIG, fallback="window", sliding_window=32, budget="per_head")
    dense = model(ids).logits
    with apply(model, CONFIG):
        zeros = model(ids).logits
    with apply(model, config) as report:
        windowed = model(ids).logits
    assert len(set(report.last_prefill()[0].kept[0])) > 1
    assert (windowed - dense).norm() < (zeros - dense).norm()


def test_report_reads_and_prints():
    model, ids = make_model(), make_ids(batch=2)
    with apply(model, dataclasses.replace(CONFIG, sparse_layers=(1, 2))) as report:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        model(ids[:, :20])
    record = report.prefills()[0][1]
    assert isinstance(record.selection.lengths, torch.Tensor)
    assert [len(heads) for heads in record.kept] == [4, 4]
    assert record.kept_share == pytest.approx(sum(map(sum, record.kept)) / 8 / 200)
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["decode_calls"] == LAYERS
    assert as_json["prefills"][0][1]["paths"] == ["sparse", "sparse"]
    assert "context too short" in str(report)
    assert len(report) == 2 * LAYERS
    report.clear()
    assert len(report) == 0
    assert report.last_prefill() == []


def test_the_report_forgets_the_oldest():
    from token_sparse_attention.integrations.record import MAX_RECORDS, LayerRecord, PrefillReport

    report = PrefillReport()
    for number in range(MAX_RECORDS + 10):
        report.add(LayerRecord(number % LAYERS, 1, 1))
    assert len(report) == MAX_RECORDS


def test_the_crossover_is_reported_with_its_reason(monkeypatch):
    from token_sparse_attention import crossover
    from token_sparse_attention.integrations.transformers import register_dense_attention

    auto = dataclasses.replace(CONFIG, crossover="auto")
    model, ids = make_model(), make_ids(batch=2)
    model.set_attn_implementation(register_dense_attention())
    expected = model(ids).logits
    with apply(model, auto) as report:
        logits = model(ids).logits
    assert {record.dense_reason for record in report} == {DenseReason.CROSSOVER_LENGTH}
    assert torch.equal(logits, expected)

    # The slots would be enough, the real tokens are too few: decided past the layer's checks.
    monkeypatch.setitem(crossover.MIN_LENGTH, "cpu", ids.shape[1] - 20)
    mask = torch.ones_like(ids)
    mask[:, :40] = 0
    with apply(model, auto) as report:
        model(ids, attention_mask=mask)
    reasons = {reason for record in report for reason in record.reasons}
    assert reasons == {str(DenseReason.CROSSOVER_LENGTH)}

    monkeypatch.setitem(crossover.MIN_LENGTH, "cpu", 10)
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 0.9 * ids.shape[1])
    with apply(model, auto) as report:
        model(ids)
    reasons = {reason for record in report for reason in record.reasons}
    assert reasons == {str(DenseReason.CROSSOVER_KEPT)}
    with apply(model, dataclasses.replace(auto, keep_ratio=0.5)) as report:
        model(ids)
    assert {tuple(record.paths) for record in report} == {("sparse", "sparse")}
