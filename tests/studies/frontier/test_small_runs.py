"""The studies that run a model, from end to end on a tiny one."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from benchmarks.block_sparse import density
from benchmarks.frontier import heads, layer_times, positions, prompts

from evaluation.small import CONFIG, make_samples, save_model
from token_sparse_attention.evaluation.samples import Sample, pack_doc


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_samples(1).save(folder / "samples.jsonl.gz")
    model = save_model(folder / "model")
    return ["--model", model, "--samples", str(folder / "samples.jsonl.gz"), "--device", "cpu"]


def run(module, asked, tmp_path, *more):
    out = tmp_path / "out.json"
    assert module.main([*asked, *more, "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_layer_times(asked, tmp_path):
    given = ("--config", f"sparse={CONFIG}", "--budget-seconds", "0.001")
    (sample,) = json.loads(run(layer_times, asked, tmp_path, *given))["samples"]
    assert set(sample["layers"]) == {"dense", "sparse"}
    assert sample["speed_up"]["sparse"] > 0


def test_density(asked, tmp_path):
    (sample,) = json.loads(run(density, asked, tmp_path, "--lengths", "512"))["samples"]
    assert all(0 < share <= 1 for shares in sample["density"].values() for share in shares)


def test_heads(asked, tmp_path):
    (row,) = json.loads(run(heads, asked, tmp_path, "--num-samples", "16"))["rows"]
    assert all(0 <= share <= 1 for layer in row["layers"] for share in layer["far"])


def test_positions(asked, tmp_path):
    noise = "".join(f"One special magic uuid for k-{n} is: v-{n}. " for n in range(20))
    doc, prompt = {"input": noise, "outputs": ["v-7"], "max_length": 512}, f"{noise}What is k-7?"
    sample = Sample("niah_multikey_3", 512, 0, prompt, [], 6, pack_doc(doc, prompt))
    path = tmp_path / "samples.jsonl.gz"
    dataclasses.replace(make_samples(1), samples=[sample]).save(path)
    given = ("--length", "512", "--layer", "1", "--num-samples", "16")
    asked = [*asked[:3], str(path), *asked[4:]]
    header, row = map(json.loads, run(positions, asked, tmp_path, *given).splitlines())
    assert header["kind"] == "frontier-positions"
    assert set(row["layers"]["1"]) == {"everywhere", "elsewhere", "sentence", "name", "answer"}
    assert all(math.isfinite(nats) for nats in row["layers"]["1"].values())


def test_prompts(asked, tmp_path):
    out = tmp_path / "prompts.jsonl"
    assert prompts.main(["--samples", asked[3], "--out", str(out)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["continuation"] == " 0"
