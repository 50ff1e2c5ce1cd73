"""Rows are means over prompts, and intervals come from resampling pieces of text."""

from __future__ import annotations

import json

import pytest

from token_sparse_attention import KVSamplingConfig, bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.fidelity.record import (
    FILES,
    AnswerResult,
    FidelityHeader,
    FidelityResults,
    load_results,
)
from token_sparse_attention.fidelity.summary import Resample, summarise
from token_sparse_attention.methods import method_of

CONFIG = KVSamplingConfig(block_size=16, num_probes=8, sliding_window=16, num_samples=16)
HEADER = FidelityHeader(
    provenance={"device": "cpu"},
    arguments={"model": bundled.NAME},
    model={"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    configurations={"dense": None, "a": CONFIG.to_dict(), "b": CONFIG.to_dict()},
    texts={},
)


def answer(index, configuration, divergence, loss, shape="lookup", seconds=1.0):
    return AnswerResult(
        shape=shape, length=100, index=index, configuration=configuration, source="text",
        divergence=divergence, agreement=[one < 0.5 for one in divergence], loss=loss,
        kept=None if configuration == "dense" else [12, None], seconds=seconds,
    )  # fmt: skip


RESULTS = FidelityResults(
    HEADER,
    (
        answer(0, "dense", [0.0, 0.0], [1.0, 2.0]),
        answer(0, "a", [0.1, 0.3], [1.5, 2.0], seconds=0.5),
        answer(0, "b", [0.2, 0.8], [1.0, 2.0]),
        answer(1, "dense", [0.0], [1.0], seconds=3.0),
        answer(1, "a", [0.6], [2.0], seconds=1.5),
        answer(1, "b", [0.7], [1.0]),
        answer(2, "a", [9.0], [9.0]),  # its dense one is not there yet
    ),
)


def test_rows_by_hand():
    every, _, a, b = summarise(RESULTS)
    assert (every.shape, a.shape) == (None, "lookup")
    assert (a.prompts, a.tokens) == (2, 3)
    assert a.divergence == pytest.approx((0.2 + 0.6) / 2)
    assert a.answer_divergence == pytest.approx((0.4 + 0.6) / 2)
    assert a.agreement == pytest.approx((1 + 0) / 2)
    assert a.loss_change == pytest.approx((0.25 + 1.0) / 2)
    assert a.tail == pytest.approx(0.3 + 0.9 * 0.3)
    assert (a.worst, a.worst_index) == (pytest.approx(0.6), 1)
    assert (a.ratio, b.ratio) == (1, pytest.approx((0.5 + 0.7) / (0.2 + 0.6)))
    assert (a.seconds, a.dense_seconds) == (1.0, 2.0)
    assert a.kept_share == pytest.approx((0.12 + 1) / 2)
    assert a.work == pytest.approx((method_of(CONFIG).work(12, 100) + 1) / 2)


def test_pieces_are_resampled_whole():
    values = [0.0, 1.0, 10.0, 11.0]
    low, high = Resample([0, 0, 1, 1]).interval(values)
    assert (low, high) == (0.5, 10.5), "each piece twice"
    assert Resample([0, 1, 2, 3]).interval([2.0] * 4) == (2.0, 2.0)
    assert Resample([3, 3]).interval([1.0, 2.0]) is None
    low, high = Resample(list(range(8))).interval(list(range(8)), [2 * n for n in range(8)])
    assert (low, high) == (0.5, 0.5), "a ratio of paired values"


def test_files_are_checked(tmp_path):
    path = tmp_path / "r.jsonl"
    _, file = FILES.open(path, HEADER)
    with file:
        for one in RESULTS.answers:
            file.write(one)
    assert load_results(path) == RESULTS
    header, first = path.read_text().splitlines()[:2]
    for changes, message in (
        ({"shape": "recal"}, "shape must be one of continue, recall"),
        ({"configuration": "c"}, "configuration 'c' is not in the header"),
        ({"loss": []}, "must have a number per token"),
        ({"kept": [12]}, "kept must have 2 entries"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(f"{header}\n{json.dumps(json.loads(first) | changes)}\n")
        with pytest.raises(UsageError, match=message):
            load_results(bad)
