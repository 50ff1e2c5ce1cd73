"""Answers of a model: what is run before the first one."""

from __future__ import annotations

import dataclasses

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig, bundled, run
from token_sparse_attention.run import answer, shortest_sparse_prompt, warm_up


def test_the_warm_up_is_the_shortest_prompt_that_runs_sparse(monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(bundled.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    ids = torch.arange(3, 3000)[None]
    config = KVSamplingConfig(num_probes=32, sliding_window=300, num_samples=50)
    shortest = shortest_sparse_prompt(model, dataclasses.replace(config, crossover="off"))
    assert shortest == 305, "a window, 4 sinks and one key that is left out"
    assert shortest_sparse_prompt(model, config) > 20_000, "the crossover"
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
