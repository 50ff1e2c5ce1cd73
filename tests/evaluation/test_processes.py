"""Several processes give what one gives, and their failures are told."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from evaluation.failing import bad_input, sudden_death, unforeseen
from evaluation.small import CONFIG, make_samples, run_eval, save_model
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation import harness, processes
from token_sparse_attention.evaluation.record import load_results


def by_key(path):
    found = load_results(path).samples
    return {result.key: result.__dict__ | {"seconds": 0} for result in found}


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl.gz"
    make_samples(4).save(path)
    return str(path)


def test_two_processes_finish_what_one_began(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    model = save_model(tmp_path / "model")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    asked = (model, "--samples", samples, "--dtype", "float32", "--config", f"a={CONFIG}")
    assert run_eval(*asked, "--out", str(whole)) == 0
    lines = whole.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    header["arguments"]["processes"] = 2
    # The dense reply to the first sample is there, and everything about the last one.
    out.write_text("".join([json.dumps(header) + "\n", lines[1], *lines[-2:]]))
    capsys.readouterr()
    assert run_eval(*asked, "--out", str(out), "--processes", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["unscored"] == 8
    assert by_key(out) == by_key(whole)
    assert not multiprocessing.active_children()
    with pytest.raises(UsageError, match=r"arguments\.processes is 2, now it would be None"):
        run_eval(*asked, "--out", str(out))


def test_one_process_only_spreads_a_model(samples, tmp_path):
    asked = ("--samples", samples, "--out", str(tmp_path / "out.jsonl"), "--device-map", "auto")
    with pytest.raises(UsageError, match=r"--processes must be 1 with --device-map, .*got 2"):
        run_eval("absent", *asked, "--processes", "2")


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (bad_input, UsageError, "there is no such model"),
        (unforeseen, RuntimeError, "abacus"),
        (sudden_death, RuntimeError, "died with exit code 7"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_worker_that_fails_stops_the_run(load, error, message):
    one = make_samples(1).samples
    with pytest.raises(error, match=message):
        list(processes.spread(load, 9, one, set(), lambda _: None))
    assert not multiprocessing.active_children()


def test_workers_take_turns_with_the_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for number in range(5):
        ours, theirs = multiprocessing.Pipe()
        ours.send([])
        processes._work(bad_input, set(), number, 5, theirs)
        assert ours.recv() == processes.Failure("there is no such model", True)
    assert chosen == [0, 1, 2, 0, 1]


def test_some_of_the_samples_can_be_chosen(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    model = save_model(tmp_path / "model")
    asked = (model, "--samples", samples, "--config", f"a={CONFIG}", "--out")
    out = tmp_path / "r.jsonl"
    assert (
        run_eval(*asked, str(out), "--only-tasks", "niah_single_1", "--only-lengths", "512") == 0
    )
    assert len(load_results(out).samples) == 8
    with pytest.raises(UsageError, match="--only-lengths must be among 512"):
        run_eval(*asked, str(out), "--only-lengths", "64")
    with pytest.raises(UsageError, match="--only-tasks must be among niah_single_1"):
        run_eval(*asked, str(out), "--only-tasks", "abacus")
    with pytest.raises(UsageError, match="choose from --samples"):
        run_eval(model, "--out", str(out), "--only-lengths", "64")


def test_dense_replies_can_come_from_other_results(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    model = save_model(tmp_path / "model")
    asked = (model, "--samples", samples, "--dtype", "float32")
    first, out = tmp_path / "first.jsonl", tmp_path / "out.jsonl"
    assert run_eval(*asked, "--config", f"a={CONFIG}", "--out", str(first)) == 0
    lines = first.read_text().splitlines(keepends=True)
    # A reply that no run would give, and one that is missing.
    marked = json.loads(lines[1]) | {"reply": "from before"}
    assert marked["configuration"] == "dense"
    first.write_text("".join([lines[0], json.dumps(marked) + "\n", *lines[2:-2]]))
    again = (*asked, "--config", "b=published", "--dense-from", str(first), "--out", str(out))
    assert run_eval(*again) == 0
    results = load_results(out)
    found = {result.key: result for result in results.samples}
    assert {key[3] for key in found} == {"dense", "b"}
    assert len(found) == 8
    assert found[tuple(marked[n] for n in ("task", "length", "index", "configuration"))].reply == (
        "from before"
    )
    source = results.header.arguments["dense_from"]
    assert source == load_results(first).header.provenance
    before = out.read_bytes()
    assert run_eval(*again) == 0
    assert out.read_bytes() == before
    other = (model, "--samples", samples, "--dtype", "bfloat16", "--dense-from", str(first))
    with pytest.raises(UsageError, match="same dtype, 'bfloat16', but is of 'float32'"):
        run_eval(*other, "--out", str(tmp_path / "other.jsonl"))
    with pytest.raises(UsageError, match="--dense-from needs --samples"):
        run_eval(model, "--dense-from", str(first), "--out", str(out))
