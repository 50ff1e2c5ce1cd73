"""The tables of patterns' accuracy and speed."""

from __future__ import annotations

import pytest
import torch
from benchmarks.block_sparse import accuracy, density
from benchmarks.block_sparse.accuracy import name_of, table

from evaluation.results import pair, results
from integrations.models import make_ids, make_model
from token_sparse_attention.attention.patterns.streaming import StreamingConfig, streaming_mask


def test_accuracy_and_the_median_of_the_speed_ups_stand_side_by_side():
    of = results(*pair(1.0, 1.0), *pair(1.0, 0.0, index=1))
    length = of.samples[0].length
    times = {"samples": [{"length": length, "speed_up": {"sparse": x}} for x in (2.0, 3.0, 7.0)]}
    times["samples"].append({"length": length + 1, "speed_up": {"sparse": 99.0}})
    heading, _, *rows = table(of, {"2 heads": times, "8 heads": {"samples": []}}).splitlines()
    assert "| speed-up, 2 heads | speed-up, 8 heads |" in heading
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert cells[1:4] == ["sparse", "0.500 of 1.000", "-0.500"]
    assert cells[4:6] == ["3.00x (3)", "-"]
    assert cells[7] == "2"


def test_one_length_is_shown_alone():
    of = results(*pair(1.0, 1.0), *pair(1.0, 0.0, index=1), *pair(1.0, 1.0, length=64))
    length = of.samples[0].length
    times = {"2 heads": {"samples": [{"length": length, "speed_up": {"sparse": 2.0}}]}}
    (row,) = accuracy.at_length(of, times, length).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:2] == ["sparse", "0.500, 1.000"]
    assert cells[3:] == ["2", "2.00x (1)"]


def test_names_are_words():
    assert name_of("xattention") == "xattention"
    assert name_of("flexprefill+published") == "flexprefill + token selection"


def test_densities_are_those_of_each_layers_own_mask(monkeypatch):
    def make(query, key, config, scale, block_size):
        assert scale == pytest.approx(query.shape[-1] ** -0.5)
        return streaming_mask(query, key, config, scale, block_size)

    half = StreamingConfig(sink_size=0, local_size=128)
    whole = StreamingConfig(sink_size=0, local_size=10**6)
    monkeypatch.setattr(density, "MASKS", {"half": (make, half), "whole": (make, whole)})
    model, ids = make_model("Llama"), make_ids(500)
    found = density.densities(model, ids)
    layers = model.config.num_hidden_layers
    assert found["whole"] == [1.0] * layers
    query = torch.zeros(1, 1, 500, 8)
    kept = streaming_mask(query, query, half, 1.0).density().mean()
    assert 0 < kept < 1
    assert found["half"] == pytest.approx([float(kept)] * layers)
