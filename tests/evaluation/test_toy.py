"""A method from outside the package goes through `tsa eval` to its tables."""

from __future__ import annotations

import json

import pytest
import torch

from evaluation.small import make_samples, run_eval, save_model
from token_sparse_attention.evaluation.record import load_results
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.methods import method_of
from token_sparse_attention.run import load_model
from toy_method import ToyConfig

CONFIG = ToyConfig(width=8)


def test_a_toy_method_is_evaluated(tmp_path, capsys):
    model, samples = save_model(tmp_path / "model"), make_samples()
    path, out = tmp_path / "samples.jsonl.gz", tmp_path / "out.jsonl"
    samples.save(path)
    asked = ("--config", f"toy={CONFIG.to_json()}", "--config", 'wide={"method": "toy"}')
    asked += ("--dtype", "float32", "--samples", str(path), "--out", str(out), "--json")
    assert run_eval(model, *asked) == 0

    results = load_results(out)
    assert results.header.configurations["toy"] == CONFIG.to_dict()
    assert set(results.header.layer_configs("wide").values()) == {ToyConfig()}
    of = {
        name: [s for s in results.samples if s.configuration == name] for name in ("dense", "toy")
    }
    assert [sample.kept for sample in of["toy"]] == [[0, 0, 0]] * len(samples.samples)
    assert [s.reply for s in of["toy"]] != [s.reply for s in of["dense"]]

    loaded, tokenizer = load_model(model, dtype="float32")
    for sample, result in zip(samples.samples, of["toy"], strict=True):
        ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad(), apply(loaded, CONFIG):
            first = loaded(ids).logits[0, -1].argmax()
        assert result.reply.startswith(tokenizer.decode([int(first)], skip_special_tokens=True))

    rows = {row["configuration"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    works = [method_of(CONFIG).work(0, sample.prompt_tokens) for sample in of["toy"]]
    assert rows["toy"]["work"] == pytest.approx(sum(works) / len(works))
    assert rows["toy"]["work"] < rows["wide"]["work"] < rows["dense"]["work"] == 1
    assert rows["toy"]["kept_share"] == 0
