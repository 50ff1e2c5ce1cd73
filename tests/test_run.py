"""Answers of a model: what is run before the first one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig, bundled, run
from token_sparse_attention.crossover import SPARSE_FROM
from token_sparse_attention.run import answer, shortest_sparse_prompt, warm_up


def test_the_warm_up_is_the_shortest_prompt_that_runs_sparse(monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(bundled.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    ids = torch.arange(3, 3000)[None]
    config = KVSamplingConfig(block_size=256, sliding_window=300, num_samples=50)
    shortest = shortest_sparse_prompt(model, dataclasses.replace(config, crossover="off"))
    assert shortest == 257, "a query beyond the block whose queries score"
    assert SPARSE_FROM < shortest_sparse_prompt(model, config) < SPARSE_FROM + 600
    reports = []
    monkeypatch.setattr(
        run, "answer", lambda *given, **options: reports.append(answer(*given, **options))
    )
    warm_up(model, tokenizer, ids, config)
    dense, sparse = reports
    assert dense.report is None
    assert sparse.prompt_tokens == shortest
    assert [record.paths for record in sparse.report] == [["sparse"]] * 14
    assert shortest_sparse_prompt(model, TokenSelectionConfig(drop_mass=0.0)) == 1, "never"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_half_precision_without_units_runs_in_float32_unless_asked_for(
    monkeypatch, dtype, expected
):
    monkeypatch.setattr(run, "lacks_units", lambda stored: stored == torch.bfloat16)
    said = []
    model, _ = run.load_model(str(bundled.MODEL), device="cpu", dtype=dtype, say=said.append)
    assert model.dtype == expected
    told = ["this processor has no bfloat16 units, so the model runs in float32"]
    assert said == (told if dtype == "auto" else [])


def test_a_processor_with_units_keeps_the_checkpoints_dtype(monkeypatch):
    monkeypatch.setattr(run, "lacks_units", lambda _: False)
    assert run.load_model(str(bundled.MODEL), device="cpu")[0].dtype == torch.bfloat16


def test_units_are_those_of_the_processor(monkeypatch):
    assert not run.lacks_units(torch.float32)
    assert not run.lacks_units(None)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for supported in (False, True):
            probe = f"_is_mkldnn_{name}_supported"
            monkeypatch.setattr(torch.ops.mkldnn, probe, lambda supported=supported: supported)
            assert run.lacks_units(dtype) == (not supported)


def test_questions_on_a_document_read_once_are_answered_as_when_read_whole():
    """Densely: what is asked attends to the cache, which stays as it is."""
    model, tokenizer = run.load_model(str(bundled.MODEL), device="cpu", dtype="float32")
    document = "\n".join(needle.line for needle in bundled.demo_needles()[:3])
    prompts = [
        run.encode_prompt(tokenizer, document, needle.question)
        for needle in bundled.demo_needles()[:2]
    ]
    reading = run.read(model, prompts[0][:, :40], None)
    assert reading.tokens == 40
    for prompt in (*prompts, prompts[0]):
        whole = run.answer(model, tokenizer, prompt, None, max_new_tokens=12)
        assert run.ask(model, tokenizer, reading, prompt, 12).text == whole.text
        assert reading.cache.get_seq_length() == 40
