"""What ships with the package: the model's size, the document's needles, and the demo."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from token_sparse_attention import (
    KVSamplingConfig,
    TokenSelection,
    TokenSelectionConfig,
    bundled,
    demo,
    load_config,
)
from token_sparse_attention.cli import main
from token_sparse_attention.cli.demo import show
from token_sparse_attention.integrations.record import (
    LayerRecord,
    PrefillReport,
    SelectionRecord,
)
from token_sparse_attention.profile import PROFILE_FILE
from token_sparse_attention.run import Answer, Reading


@pytest.fixture(scope="module")
def document():
    return bundled.DEMO_DOCUMENT.read_text(encoding="utf-8")


def test_the_model_keeps_its_limits():
    model = AutoModelForCausalLM.from_pretrained(bundled.MODEL)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 12_000_000
    assert (bundled.MODEL / "model.safetensors").stat().st_size <= 24_000_000
    assert model.config.tie_word_embeddings
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.max_position_embeddings == 131072


def test_the_document_is_long_and_says_where_it_is_from(document):
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    assert len(tokenizer(document)["input_ids"]) >= 4000
    source = (bundled.FOLDER / "demo" / "SOURCE.md").read_text(encoding="utf-8")
    assert "licence" in source.lower()


def test_the_needles_stand_in_the_document(document):
    needles = bundled.demo_needles()
    assert len(needles) >= 5
    for needle in needles:
        assert document.count(needle.line) == 1
        assert document.count(needle.answer) == 1, "the answer is found nowhere else"
        assert needle.line.startswith("[needle"), "visibly marked"
        assert needle.answer in needle.line
        assert needle.answer not in needle.question
        assert document.index(needle.line) / len(document) == pytest.approx(needle.depth, abs=0.03)
    depths = [needle.depth for needle in needles]
    assert depths == sorted(depths)
    assert depths[0] < 0.2
    assert depths[-1] > 0.8


def test_the_demo_passes(monkeypatch, capsys):
    """With the first and the last needle; ``make demo`` asks for all."""
    needles = [BUNDLED_NEEDLES[0], BUNDLED_NEEDLES[-1]]
    monkeypatch.setattr(bundled, "demo_needles", lambda: needles)
    monkeypatch.setattr(demo, "MIN_CORRECT", len(needles))
    assert main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"]
    assert result["failures"] == []
    assert result["seen_share"] <= 0.9
    assert len(result["findings"]) == len(needles)
    for finding in result["findings"]:
        assert finding["dense"]["time_to_first_token_s"] > 0
        assert any("sparse" in layer["paths"] for layer in finding["sparse"]["layers"])


def test_the_demos_settings_are_the_profiles_in_proportion():
    """A document of 8K tokens is to its settings what 128K tokens are to the profile's."""
    profile = load_config(bundled.MODEL / PROFILE_FILE)
    shrunk, source = demo.demo_settings(str(bundled.MODEL))
    whole, small = profile.layer_configs(14), shrunk.layer_configs(14)
    assert set(whole) == set(small) == set(range(14))
    assert {n: c.dense_heads for n, c in whole.items() if c.dense_heads} == {0: (5,), 6: (4,)}
    for layer, config in whole.items():
        assert config == dataclasses.replace(
            small[layer],
            block_size=16 * small[layer].block_size,
            sliding_window=16 * small[layer].sliding_window,
            num_samples=16 * small[layer].num_samples,
            crossover="auto",
        )
    assert source.startswith(PROFILE_FILE)
    assert "a sixteenth" in source


def make_result(dense_texts, sparse_texts):
    needles = bundled.demo_needles()[: len(dense_texts)]
    report = PrefillReport()
    report.add(LayerRecord(0, 10, 10))
    dense, sparse = (
        [Answer(text.format(needle.answer), 10, 1, 0.1, 0.2, report) for text, needle in pairs]
        for pairs in (zip(dense_texts, needles), zip(sparse_texts, needles))
    )
    return demo.DemoResult(
        [demo.Finding(*row) for row in zip(needles, dense, sparse)], "a test", "cpu"
    )


@pytest.mark.parametrize(
    ("dense", "sparse", "slower"), [(2.0, 3.0, True), (3.0, 2.0, False), (2.0, 2.0, False)]
)
def test_the_demo_says_why_it_was_slower(dense, sparse, slower, capsys):
    made = make_result(["{}"] * 3, ["{}"] * 3)
    seconds = {"dense": dense, "sparse": sparse}
    result = dataclasses.replace(made, provenance={}, reading_seconds=seconds)
    assert ("gains no time" in str(result.to_dict()["note"])) == slower
    show(result)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("note: so short a document" in printed) == slower
    for path, taken in seconds.items():
        assert f"{path}: read the document in {taken:.2f} s (one run)" in printed


def test_the_demo_fails_on_wrong_answers_and_without_sparsity():
    right, wrong = "it is {}.", "it is 5."
    good = make_result([right] * 4 + [wrong], [right] * 4 + [wrong])
    assert good.failures == [
        "no layer left out 10%: the heads of layer 0 kept 100.0% of the prompt's tokens"
    ]
    bad = make_result([right] * 3 + [wrong] * 2, [wrong] * 5)
    assert bad.failures[0] == "the dense run answered 3 questions of 5, expected at least 4"
    assert bad.failures[1] == "the sparse run answered 0 questions of 5, expected at least 4"


@pytest.mark.parametrize(
    ("config", "share", "summary"),
    [
        (
            TokenSelectionConfig(fallback="window", sliding_window=40),
            0.25,
            "the heads of layer 3 kept 25.0% of the prompt's tokens",
        ),
        (
            KVSamplingConfig(block_size=32, sliding_window=40, dense_queries=4),
            0.25 + 0.1,
            "the queries of layer 3 saw at most 35.0% of the prompt's tokens, windows included, "
            "the last 4 aside",
        ),
        (
            KVSamplingConfig(block_size=32, sliding_window=500, dense_queries=0),
            1.0,
            "the queries of layer 2 saw at most 100.0% of the prompt's tokens, windows included",
        ),
    ],
)
def test_the_demo_says_what_was_seen(config, share, summary):
    """Of the sparsest layer of the prompt where it saw most; a window counts as seen."""
    findings = []
    for kept, others in ((60, 200), (100, 300)):
        report = PrefillReport()
        for layer, count in ((2, others), (3, kept)):
            lengths = torch.tensor([[count - 20, count + 20]])
            selection = TokenSelection(
                lengths[..., None], lengths, torch.tensor([True]), reasons=torch.tensor([0])
            )
            record = SelectionRecord.of(selection, 400, None)
            report.add(LayerRecord(layer, 400, 400, selection=record, config=config))
        reply = Answer("", 400, 1, 0.1, 0.2, report)
        findings.append(demo.Finding(BUNDLED_NEEDLES[0], reply, reply))
    result = demo.DemoResult(findings, "a test", {})
    assert result.to_dict()["seen_share"] == pytest.approx(share)
    assert result.summary == summary
    assert ("left out" in str(result.failures)) == (share > demo.MAX_SEEN)


def test_the_command_fails_when_the_demo_does(monkeypatch, capsys):
    """Nothing sparse, and wrong answers."""
    report = PrefillReport()
    report.add(LayerRecord(0, 10, 10))
    monkeypatch.setattr(demo, "read", lambda *_: Reading(None, 10, 0.1, report))
    monkeypatch.setattr(demo, "ask", lambda *_: Answer("?", 10, 1, 0.1, 0.2, report))
    monkeypatch.setattr(demo, "warm_up", lambda *_: None)
    assert main(["demo"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    said = " ".join(out.split())
    assert "the sparse run answered 0 questions" in said
    assert "no layer left out 10%" in said


BUNDLED_NEEDLES = bundled.demo_needles()
