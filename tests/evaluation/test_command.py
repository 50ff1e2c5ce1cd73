"""`tsa eval` from end to end on a tiny model."""

from __future__ import annotations

import json

import pytest

from evaluation.small import CONFIG, make_samples, run_eval, save_model
from token_sparse_attention.benchmark.record import UsageError
from token_sparse_attention.evaluation import evaluate, harness
from token_sparse_attention.evaluation.record import load_results
from token_sparse_attention.evaluation.samples import SampleSet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl.gz"
    make_samples().save(path)
    return str(path)


@pytest.fixture
def without_lm_eval(monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)


def untimed(path):
    return [result.__dict__ | {"seconds": 0} for result in load_results(path).samples]


@pytest.mark.usefixtures("without_lm_eval")
def test_without_lm_eval_replies_are_kept_unscored(model, samples, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    asked = (model, "--samples", samples, "--config", f"a={CONFIG}", "--out", str(out))
    assert run_eval(*asked, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["unscored"] == 6
    assert {row["configuration"]: row["score"] for row in shown["rows"]} == {
        "dense": None,
        "a": None,
    }
    results = load_results(out)
    assert [result.configuration for result in results.samples] == ["dense", "a"] * 3
    for result in results.samples:
        assert result.score is None
        assert result.prompt_tokens > 300
        assert 1 <= result.new_tokens <= 6
        assert (result.kept is None) == (result.configuration == "dense")
    assert all(8 < kept < result.prompt_tokens for kept in results.samples[1].kept)
    header = results.header
    assert header.model == {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    assert header.configurations["a"]["drop_mass"] == 0.4
    assert header.provenance["versions"]["lm-eval"] == "0.4.13"
    assert header.arguments["samples_sha256"] == make_samples().digest()
    with pytest.raises(UsageError, match="needs lm-eval"):
        run_eval("--score", str(out), "--samples", samples)


@pytest.mark.usefixtures("without_lm_eval")
@pytest.mark.parametrize("finished", [1, 2, 5])
def test_a_run_goes_on_where_it_was_cut_off(
    model, samples, tmp_path, monkeypatch, capsys, finished
):
    out, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    asked = (model, "--samples", samples, "--config", f"a={CONFIG}", "--out")
    run_eval(*asked, str(whole))
    reply, replies = evaluate.Runner.reply, []

    def failing(self, *arguments):
        replies.append(arguments)
        if len(replies) == finished + 1:
            raise RuntimeError("the device is gone")
        return reply(self, *arguments)

    monkeypatch.setattr(evaluate.Runner, "reply", failing)
    assert run_eval(*asked, str(out)) == 1
    assert "the device is gone" in capsys.readouterr().err
    assert len(load_results(out).samples) == finished
    assert run_eval(*asked, str(out)) == 0
    assert len(replies) == 1 + 6  # the one that failed was asked for twice
    assert untimed(out) == untimed(whole)
    drafts = {
        name: [draft for _, asked, draft in replies if asked == name] for name in ("a", "dense")
    }
    assert not any(drafts["dense"])
    assert any(drafts["a"])
    before = out.read_bytes()
    assert run_eval(*asked, str(out)) == 0
    assert out.read_bytes() == before
    with pytest.raises(UsageError, match=r"configurations\.a"):
        run_eval(model, "--samples", samples, "--config", "a=default", "--out", str(out))


def test_samples_come_back_from_their_file(tmp_path):
    made, path = make_samples(), tmp_path / "s.jsonl.gz"
    made.save(path)
    assert SampleSet.load(path) == made
    assert made.samples[2].unpack_doc()["input"] == made.samples[2].prompt[: -len("The number is")]
    assert "prompt_slice" in made.samples[2].doc["input"]
    first = path.read_bytes()
    made.save(path)
    assert path.read_bytes() == first
    path.write_bytes(first[:-9])
    with pytest.raises(UsageError, match="cannot be read"):
        SampleSet.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "S", "--out", "r", "--limit", "3"], "--limit only matters"),
        (["--samples", "S", "--out", "r", "--apply-chat-template"], "--apply-chat-template only"),
        (["--prepare-only"], "need --samples"),
        (["--score", "r"], "need --samples"),
        ([], "--out FILE is needed"),
        (["no/such/model", "--samples", "S", "--out", "r"], "no/such/model cannot be loaded"),
        (["--samples", "absent", "--out", "r"], "--samples absent cannot be read"),
        (["--samples", "S", "--out", "r", "--config", "defalt"], "did you mean 'default'"),
        (
            ["--samples", "S", "--out", "r", "--config", "llama-3.1-8b-instruct"],
            "below 14, the model's number of layers",
        ),
        (["--apply-chat-template", "--out", "r"], "needs a tokenizer with a chat template"),
    ],
)
def test_bad_input_is_named(samples, arguments, message):
    with pytest.raises(UsageError, match=message):
        run_eval(*(samples if argument == "S" else argument for argument in arguments))
