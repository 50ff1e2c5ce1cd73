"""Settings that no method has any more: their names, their work, what is said of them."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.frontier import version_1, words

from evaluation.results import HEADER, pair
from token_sparse_attention import TokenSelectionConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation import summary
from token_sparse_attention.evaluation.record import EvalResults
from token_sparse_attention.profile import convert_settings

OLD = {
    "drop_mass": 0.4,
    "window_size": 4,
    "budget": "shared",
    "select_queries": True,
    "dense_queries": 0,
    "fallback": "window",
    "fallback_window": 10,
    "fallback_sinks": 1,
    "fallback_landmarks": 2,
    "fallback_samples": 3,
    "crossover": "off",
    "sparse_layers": None,
}


def test_settings_with_a_config_are_left_as_they_are():
    today = TokenSelectionConfig().to_dict()
    assert version_1.renamed(today) == today
    profile = {"version": 2, "base": today, "layers": {"0": {}}}
    assert version_1.renamed(profile) == profile


def test_old_settings_keep_every_number():
    with pytest.raises(ValueError, match="has no meaning"):
        convert_settings(OLD)
    renamed = version_1.renamed(OLD)
    shown = [renamed[name] for name in ("sliding_window", "sink_size", "landmarks", "num_samples")]
    assert shown == [10, 1, 2, 3]
    said = words.describe(OLD)
    for part in ("drop mass 0.4", "window 10", "1 sinks", "2 landmarks", "3 sampled keys"):
        assert part in said


def test_their_work_is_an_upper_bound_of_what_dropped_queries_saw():
    configurations = HEADER.configurations | {"sparse": OLD}
    header = dataclasses.replace(HEADER, configurations=configurations)
    (dense, sparse) = pair(1.0, 1.0, kept=[20, None])
    dense = dataclasses.replace(dense, kept=None)
    results = EvalResults(header, (dense, sparse))
    with pytest.raises(UsageError, match="version 1"):
        summary.summarise(results)
    work = {row.configuration: row.work for row in version_1.summarise(results)}
    # Of 100 queries 20 see each other; the others 10 of their window and 6 keys behind it.
    layer = (20 * 21 / 2 + 80 * (10 + 6)) / (100 * 101 / 2)
    assert work == {"dense": 1.0, "sparse": pytest.approx((layer + 1) / 2)}


def test_all_else_is_summarised_as_everywhere():
    results = EvalResults(HEADER, tuple(pair(1.0, 0.5)))
    assert version_1.summarise(results) == summary.summarise(results)
