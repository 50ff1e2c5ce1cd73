"""The screen's result file: one of `tsa eval`, its scores the answers' probabilities."""

from __future__ import annotations

import json
import math

import pytest
from benchmarks.frontier import screen
from benchmarks.frontier.answers import likelihood

from evaluation.small import CONFIG, make_samples, run_eval, save_model
from token_sparse_attention import run
from token_sparse_attention.config import config_from_dict
from token_sparse_attention.evaluation import generate, harness
from token_sparse_attention.evaluation.record import load_results
from token_sparse_attention.evaluation.samples import SampleSet


def test_a_result_is_one_of_tsa_eval_with_probabilities_as_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    model, config = save_model(tmp_path / "model"), json.loads(CONFIG)
    samples, points = tmp_path / "samples.jsonl.gz", tmp_path / "points.json"
    make_samples(1).save(samples)
    points.write_text(json.dumps({"plain": config}))
    asked = ["--samples", str(samples), "--device", "cpu"]
    out = str(tmp_path / "screened.jsonl")
    command = ["--model", model, "--points", str(points), *asked, "--out", out]
    assert screen.main(command) == 0
    evaluated = tmp_path / "evaluated.jsonl"
    run_eval(model, *asked, "--config", f"plain={CONFIG}", "--out", str(evaluated))

    ours, theirs = load_results(tmp_path / "screened.jsonl"), load_results(evaluated)
    assert ours.header.arguments == theirs.header.arguments | {"answers": True}
    assert ours.header.configurations == theirs.header.configurations
    assert ours.header.provenance.keys() == theirs.header.provenance.keys()
    loaded, tokenizer = run.load_model(model, device="cpu")
    (sample,) = SampleSet.load(samples).samples
    ids = generate.encode(loaded, tokenizer, sample.prompt, sample.max_new_tokens)
    for result, settings in zip(ours.samples, (None, config_from_dict(config))):
        expected = likelihood(loaded, tokenizer, ids, sample, settings)
        assert float(result.reply) == pytest.approx(float(expected.text), abs=1e-4)
        assert result.score == pytest.approx(math.exp(-float(result.reply)))
