"""Settings, the host's decisions and the counters, which need no vLLM."""

from __future__ import annotations

import json

import pytest
import torch

from token_sparse_attention import (
    DenseReason,
    KVSamplingConfig,
    LayerProfile,
    TokenSelection,
    TokenSelectionConfig,
)
from token_sparse_attention.crossover import NEVER_DENSE, BreakEven
from token_sparse_attention.integrations.serving.counters import Counters, describe
from token_sparse_attention.integrations.serving.plan import Prefill, list_prefills
from token_sparse_attention.integrations.serving.settings import Settings, read_settings
from token_sparse_attention.integrations.vllm.engine import layer_number
from token_sparse_attention.methods import method_of

CONFIG = TokenSelectionConfig(drop_mass=0.1, observation_window=16, min_tokens=64)


def given(**entries):
    return {"token_sparse_attention": entries}


def test_settings_from_values_and_from_files(tmp_path):
    profile = LayerProfile(base=CONFIG, layers={2: {}, 5: {"drop_mass": 0.2}})
    file = tmp_path / "profile.json"
    file.write_text(profile.to_json())
    expected = Settings(config=profile, prefix_caching="allow")
    assert read_settings(given(profile=str(file), prefix_caching="allow")) == expected
    inline = json.loads(profile.to_json())
    assert read_settings(given(config=inline, prefix_caching="allow")) == expected
    assert read_settings(given(config=CONFIG.to_dict())) == Settings(config=CONFIG)
    assert expected.layer_configs(8)[5].drop_mass == 0.2
    assert read_settings({}) is read_settings({"other": 1}) is None


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({}, ValueError, "one of 'profile'.*got nothing"),
        ({"profile": "a", "config": {}}, ValueError, "got profile, config"),
        ({"profil": "a"}, ValueError, "unknown entry 'profil'; did you mean 'profile'"),
        ({"profile": 3}, TypeError, "profile must be a path, got 3"),
        ({"config": []}, TypeError, "config must be an object"),
        ({"config": {}, "prefix_caching": "yes"}, ValueError, "refuse, allow; got 'yes'"),
        (
            {"config": {"fallback_samples": 9}},
            ValueError,
            "config has the field names of version 1",
        ),
        (
            {"config": {"method": "kv_sampling", "drop_mass": 0.1}},
            ValueError,
            "'drop_mass', which the method kv_sampling does not have",
        ),
        ({"config": {"dense_queries": -1}}, ValueError, "dense_queries must be at least 0"),
        ({"config": {}, "impl": "cuda"}, ValueError, "impl must be one of"),
        ({"config": {}, "attention_backend": "fa9"}, ValueError, "fa9"),
        (
            {
                "config": {},
                "attention_backend": 'minference:{"layers": [[["stream_llm", 9, 9]]]}',
            },
            ValueError,
            "must be the same in all layers, got settings that name layers",
        ),
        ({"config": {}, "log_interval": -1}, ValueError, "at least 0"),
        ({"config": {}, "log_interval": "9"}, TypeError, "number of seconds"),
        ({"config": {}, "warm_up": 1}, TypeError, "warm_up must be True or False, got 1"),
    ],
)
def test_bad_settings_say_what_was_expected(entries, error, message):
    with pytest.raises(error, match=message):
        read_settings(given(**entries))


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.31.self_attn.attn", 31), ("model.norm", -1), ("layers.2.experts.7.attn", -1)],
)
def test_layer_numbers(name, number):
    assert layer_number(name) == number


def test_prefills_of_a_step():
    starts, kv_lens = [0, 1, 151, 451, 459, 460], [900, 150, 1500, 320, 64]
    assert list_prefills(starts, kv_lens, [False, True, True, False, True], 9) == [
        Prefill(1, 1, 151, 150),
        Prefill(2, 151, 451, 1500),
    ]
    whole, chunk = list_prefills(starts, kv_lens, [False, True, True, False, True], 9)
    assert whole.whole
    assert not chunk.whole
    assert chunk.query_len == 300


def test_only_a_prompts_own_last_queries_are_dense():
    """Its reply's too, which a resumed request goes through again."""
    config = KVSamplingConfig(dense_queries=128)
    cases = {512: 0, 1872: 0, 1900: 28, 2000: 128, 2300: 428, 3000: 512}
    found = {end: Prefill(0, 0, 512, end, 2000).settings(config).dense_queries for end in cases}
    assert found == cases
    assert Prefill(0, 0, 512, 512).settings(config) is config, "its length is not known"
    assert Prefill(0, 0, 512, 512, 2000).settings(CONFIG) is CONFIG, "it selects by its own last"
    short = list_prefills([0, 90, 90], [90, 0], None, 1, [100])
    assert short == [Prefill(0, 0, 90, 90, 100)], "padding has no prompt"
    assert short[0].settings(config).dense_queries == 90


def test_a_resumed_request_is_a_prefill_again():
    """It goes through its prompt and its reply at once; speculation does not."""
    assert list_prefills([0, 200, 204], [200, 300], [False, False], 4) == [Prefill(0, 0, 200, 200)]


def test_a_later_chunk_of_a_resumed_reply_is_a_prefill():
    """vLLM calls only tokens of the prompt prefilling."""
    assert list_prefills([0, 512], [1536], [False], 1) == [Prefill(0, 0, 512, 1536)]
    assert list_prefills([0, 5], [1536], [False], 5) == [], "five tokens of a draft"


@pytest.mark.parametrize(
    ("query_len", "kv_len", "break_even", "reason"),
    [
        (81, 81, NEVER_DENSE, None),
        (16, 81, NEVER_DENSE, None),
        (80, 80, NEVER_DENSE, DenseReason.SHORT_CONTEXT),
        (15, 900, NEVER_DENSE, DenseReason.SHORT_CHUNK),
        (900, 900, BreakEven(1000, 1.0, 0.0), DenseReason.CROSSOVER_LENGTH),
    ],
)
def test_lengths_decide(query_len, kv_len, break_even, reason):
    gate = method_of(CONFIG).gate(torch.device("cpu"), 4, 16)._replace(break_even=break_even)
    found = Prefill(0, 7, 7 + query_len, kv_len).dense_reason(gate)
    assert found == (None if reason is None else str(reason))


def selection(lengths, kv_len, ran_sparse=True, reason=None, num_blocks=None):
    return TokenSelection(
        torch.zeros(1, len(lengths), 1),
        torch.tensor([lengths]),
        torch.tensor([ran_sparse]),
        kv_len,
        torch.tensor([0 if reason is None else reason.code]),
        None if num_blocks is None else torch.tensor([num_blocks]),
    )


def test_counters_add_up():
    counters = Counters()
    for reason in (None, "too short", None, "too short", "other"):
        counters.add_prefill(reason)
    counters.add_layer(selection([30, 50], 100, num_blocks=7))
    met = [(60, DenseReason.NO_PROBES), (70, DenseReason.CROSSOVER_KEPT)]
    for kv_len, reason in [*met, (70, DenseReason.NOTHING_TO_DROP)]:
        counters.add_layer(selection([kv_len] * 2, kv_len, ran_sparse=False, reason=reason))
    counts = counters.read()
    assert counts == {
        "prefills_sparse": 2,
        "prefills_dense": {"too short": 2, "other": 1},
        "layer_calls_sparse": 1,
        "layer_calls_dense": {
            str(DenseReason.NOTHING_TO_DROP): 1,
            str(DenseReason.NO_PROBES): 1,
            str(DenseReason.CROSSOVER_KEPT): 1,
        },
        "tokens_seen": 600,
        "tokens_kept": 480,
        "blocks_sampled": 7,
    }
    assert describe(counts) == (
        "Token sparse attention: 2 prefills sparse, 3 dense (1 other; 2 too short); "
        "1 of 4 calls of sparse layers ran sparse, 80.0% of tokens kept, 7 blocks sampled keys"
    )


def test_counts_that_cannot_be_published_are_still_logged(monkeypatch):
    counters, lines, tries = Counters(), [], []

    def full(counts):
        tries.append(counts)
        raise OSError("No space left on device")

    monkeypatch.setattr(counters, "_publish", full)
    for _ in range(2):
        counters.add_prefill(None)
        counters.report(lambda form, *arguments: lines.append(form % arguments), 0)
    assert len(tries) == 1, "not tried again"
    assert [line for line in lines if "OSError: No space left" in line] == [lines[1]]
    assert lines[2].startswith("Token sparse attention: 2 prefills sparse")


def test_reports_wait_for_news_and_for_the_interval(monkeypatch):
    counters, lines = Counters(), []
    monkeypatch.setattr(counters, "_publish", lambda _: None)

    def log(form, *arguments):
        lines.append(form % arguments)

    counters.report(log, 0)
    assert lines == [], "there is no news"
    counters.add_prefill(None)
    counters.report(log, 3600)
    counters.report(log, 0)
    assert len(lines) == 1
    counters.add_prefill(None)
    counters.report(log, 3600)
    assert len(lines) == 1, "the last report is too recent"
    counters.report(log, 0)
    assert len(lines) == 2
