"""`tsa eval` from end to end on a tiny model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from evaluation.small import CONFIG, make_samples, run_eval, save_model
from token_sparse_attention.cli import main
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation import evaluate, harness
from token_sparse_attention.evaluation.record import (
    MODEL_FACTS,
    EvalHeader,
    EvalResults,
    SampleResult,
    load_results,
    save_results,
)
from token_sparse_attention.evaluation.samples import SampleSet
from token_sparse_attention.result_lines import LineFile


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


class Right:
    """Scores every reply 1."""

    def __init__(self, samples):
        del samples

    def score(self, sample, reply):
        del sample, reply
        return 1.0


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_scores_replace_a_file_that_no_run_writes(samples, tmp_path, monkeypatch, name):
    monkeypatch.setattr(harness, "Scorer", Right)
    out = tmp_path / name
    made = make_samples()
    replies = [
        SampleResult(one.task, one.length, one.index, "dense", None, "a", 9, None, 1, 0.1)
        for one in made.samples
    ]
    arguments = {"samples_sha256": made.digest()}
    model = dict.fromkeys(MODEL_FACTS, 1)
    header = EvalHeader({}, arguments, model, {"dense": None}, made.tasks)
    save_results(out, EvalResults(header, tuple(replies)))
    before = out.read_bytes()
    with LineFile(out), pytest.raises(UsageError, match="another run is writing it"):
        run_eval("--score", str(out), "--samples", samples)
    assert out.read_bytes() == before
    assert run_eval("--score", str(out), "--samples", samples) == 0
    assert {result.score for result in load_results(out).samples} == {1.0}
    with pytest.raises(UsageError, match=r"absent/r cannot be read: No such file"):
        run_eval("--score", str(tmp_path / "absent" / "r"), "--samples", samples)
    assert not (tmp_path / "absent").exists()


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
    assert main(["eval", *asked, str(out)]) == 1
    assert "the device is gone" in capsys.readouterr().err
    assert len(load_results(out).samples) == finished
    assert run_eval(*asked, str(out)) == 0
    assert len(replies) == 1 + 6  # the one that failed was asked for twice
    assert untimed(out) == untimed(whole)
    tried = {
        name: [drafts for *_, asked, drafts in replies if asked == name] for name in ("a", "dense")
    }
    assert not any(tried["dense"])
    assert any(tried["a"])
    before = out.read_bytes()
    assert run_eval(*asked, str(out)) == 0
    assert out.read_bytes() == before
    with pytest.raises(UsageError, match=r"configurations\.a"):
        run_eval(model, "--samples", samples, "--config", "a=default", "--out", str(out))


PATTERN = 'streaming:{"sink_size": 0, "local_size": 1}'


@pytest.mark.usefixtures("without_lm_eval")
def test_a_pattern_alone_and_composed_in_one_run(model, samples, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    configurations = ("--config", f"a={CONFIG}", "--config", f"p={PATTERN}")
    configurations += ("--config", f"both={PATTERN}+{CONFIG}", "--config", "all=streaming")
    assert run_eval(model, "--samples", samples, *configurations, "--out", str(out), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["configuration"]: row["work_is_bound"] for row in rows} == {
        "dense": False,
        "a": False,
        "p": True,
        "both": True,
        "all": True,
    }
    results = load_results(out)
    header = results.header.configurations
    assert header["p"]["pattern"] == {"name": "streaming", "sink_size": 0, "local_size": 1}
    assert header["both"] == {"pattern": header["p"]["pattern"], "settings": header["a"]}
    for first in range(0, 15, 5):
        dense, a, p, both, everything = results.samples[first : first + 5]
        assert dense.kept is p.kept is everything.kept is None
        assert a.kept[0] == both.kept[0], "the first layer sees the same tokens"
        assert dense.reply == everything.reply, "a window of 4096 tokens is the whole prompt"
    for names in (("dense", "p"), ("a", "both"), ("p", "both")):
        assert any(one.reply != other.reply for one, other in pairs(results, *names)), names
    run_eval(model, "--samples", samples, *configurations, "--out", str(out))
    assert "≤1.000" in capsys.readouterr().out


@pytest.mark.usefixtures("without_lm_eval")
@pytest.mark.parametrize(("length", "of"), [(512, " of 512 tokens"), (0, "")])
def test_configurations_that_left_nothing_out_are_noted(model, tmp_path, capsys, length, of):
    made = make_samples()
    samples = [dataclasses.replace(sample, length=length) for sample in made.samples]
    path = tmp_path / "s.jsonl.gz"
    dataclasses.replace(made, samples=samples).save(path)
    small = '{"block_size": 16, "num_probes": 8, "sliding_window": 16, "num_samples": 8, '
    small += '"crossover": "off"}'
    wide = small.replace('"num_samples": 8', '"num_samples": 4096')
    given = (f"wide={wide}", f"small={small}", "idle=default", "patterned=streaming+default")
    configurations = [word for value in given for word in ("--config", value)]
    asked = ("--samples", str(path), *configurations, "--out", str(tmp_path / "r.jsonl"))
    assert run_eval(model, *asked) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert notes == [
        f"note: {what} in every layer of every sample{of}: this compares dense with dense"
        for what in ("'wide' left nothing out", "'idle' ran dense")
    ]


def pairs(results, *names):
    return zip(*([s for s in results.samples if s.configuration == name] for name in names))


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
        (["no", "--samples", "S", "--dense-from", "absent", "--out", "r"], "absent cannot be rea"),
        (["--samples", "S", "--out", "r", "--attention-backend", "cudn"], "did you mean 'cudnn'"),
        (
            ["--samples", "S", "--out", "r", "--attention-backend", "flexprefill"],
            "patterns are configurations: --config flexprefill or --config NAME=flexprefill",
        ),
        (["--samples", "S", "--out", "r", "--config", "defalt"], "did you mean 'default'"),
        (
            ["--samples", "S", "--out", "r", "--config", "llama-3.1-8b-instruct"],
            "below 14, the model's number of layers",
        ),
        (
            ["--samples", "S", "--out", "r", "--config", 'a={"dense_heads": [8]}'],
            "--config a does not fit the model: dense_heads must be below the layer's 8 query",
        ),
        (["--apply-chat-template", "--out", "r"], "needs a tokenizer with a chat template"),
    ],
)
def test_bad_input_is_named(samples, arguments, message):
    with pytest.raises(UsageError, match=message):
        run_eval(*(samples if argument == "S" else argument for argument in arguments))
