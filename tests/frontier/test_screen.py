"""The screen's result file against that of `tsa eval`."""

from __future__ import annotations

import json
import sys

from benchmarks.frontier import screen

from evaluation.small import CONFIG, make_samples, run_eval, save_model
from token_sparse_attention.evaluation import harness
from token_sparse_attention.evaluation.record import load_results


def test_a_result_is_one_of_tsa_eval_that_also_says_the_variants(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    model, config = save_model(tmp_path / "model"), json.loads(CONFIG)
    samples, points = tmp_path / "samples.jsonl.gz", tmp_path / "points.json"
    make_samples(1).save(samples)
    points.write_text(
        json.dumps(
            {
                "plain": {"config": config, "variant": {}},
                "varied": {
                    "config": config,
                    "variant": {"selected": "dense", "fallback": "dense"},
                },
            }
        )
    )
    asked = ["--samples", str(samples), "--out", str(tmp_path / "screened.jsonl")]
    command = ["screen", "--model", model, "--points", str(points), *asked, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    screen.main()
    evaluated = tmp_path / "evaluated.jsonl"
    configs = ["--config", f"plain={CONFIG}", "--config", f"varied={CONFIG}"]
    run_eval(model, *asked[:2], *configs, "--out", str(evaluated), "--device", "cpu")

    ours, theirs = load_results(tmp_path / "screened.jsonl"), load_results(evaluated)
    arguments = dict(ours.header.arguments)
    variants = arguments.pop("variants")
    assert list(variants) == ["varied"]
    assert variants["varied"]["selected"] == "dense"
    assert arguments == theirs.header.arguments
    assert ours.header.configurations == theirs.header.configurations
    assert ours.header.provenance.keys() == theirs.header.provenance.keys()
    dense, plain, varied = ours.samples
    assert (dense.reply, plain.reply) == tuple(s.reply for s in theirs.samples[:2])
    assert varied.reply == dense.reply, "all of its queries attend densely"
