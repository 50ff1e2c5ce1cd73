"""The rows of the tables, against sums by hand and simulations with a known truth."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch

from evaluation.results import DENSE, HEADER, SPARSE, pair, results
from support import counts_behind, make_problem, with_selection
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig, reference
from token_sparse_attention.evaluation.record import EvalResults
from token_sparse_attention.evaluation.show import ran_dense
from token_sparse_attention.evaluation.summary import (
    attention_work,
    difference_interval,
    kept_share,
    relative_loss_bound,
    summarise,
)
from token_sparse_attention.methods import method_of


def rows_of(*samples):
    return {(row.task, row.length, row.configuration): row for row in summarise(results(*samples))}


def test_kept_share_and_work_are_means_over_layers_and_heads():
    sample = dataclasses.replace(SPARSE, kept=[40, [10, 20, 30, 100]])
    configs = HEADER.layer_configs("sparse")
    assert kept_share(sample) == pytest.approx((0.4 + (0.1 + 0.2 + 0.3 + 1) / 4) / 2)
    pairs = 40 * 41, (10 * 11 + 20 * 21 + 30 * 31 + 100 * 101) / 4
    assert attention_work(sample, configs) == pytest.approx(sum(pairs) / 2 / (100 * 101))
    assert attention_work(SPARSE, configs) == pytest.approx((50 * 51 / (100 * 101) + 1) / 2)
    assert kept_share(DENSE) == attention_work(DENSE, {}) == 1


def literal_share(scores, config):
    """What is recorded of a head, and the entries of its mask against all causal ones."""
    kv_len = scores.shape[1] + 8
    position = torch.arange(kv_len)
    causal = position <= position[:, None]
    seen = position > position[:, None] - config.sliding_window
    keep = reference.keep_tokens(scores, config)[0]
    windows = seen if config.fallback == "window" else torch.zeros_like(causal)
    seen = torch.where(keep[:, None], keep, windows)
    seen[kv_len - config.dense_queries :] = True
    return int(keep.sum()), float((causal & seen).sum() / causal.sum())


def selections():
    for fields in (
        {},
        {"fallback": "window"},
        {"fallback": "window", "sliding_window": 500},
        {"dense_queries": 5},
        {"dense_queries": 30},
        {"dense_queries": 500},
        {"fallback": "window", "dense_queries": 5},
        {"fallback": "window", "dense_queries": 30},
    ):
        for drop_mass in (0.02, 0.3, 0.8):
            small = {"observation_window": 8, "pool_size": 1, "min_tokens": 4}
            small |= {"drop_mass": drop_mass, "sliding_window": 16}
            yield TokenSelectionConfig(**small | fields)


def samplings():
    for fields in (
        {},
        {"sink_size": 4},
        {"sliding_window": 500},
        {"sink_size": 3, "num_samples": 20},
        {"sink_size": 4, "num_samples": 20, "dense_queries": 30},
        {"num_samples": 500},
        {"num_samples": 11, "dense_queries": 500},
    ):
        small = {"block_size": 16, "num_probes": 8, "sliding_window": 16, "sink_size": 0}
        small |= {"num_samples": 0}
        yield KVSamplingConfig(**small | {"dense_queries": 0, "crossover": "off"} | fields)


@pytest.mark.parametrize("config", [*selections()], ids=str)
def test_work_counts_what_a_literal_mask_allows(config):
    work = method_of(config).work
    falling = torch.linspace(2.0, 1.0, 192)[None]  # the last are dropped
    kept, share = literal_share(falling, config)
    assert 12 < kept < 200
    assert work(kept, 200) == pytest.approx(share)
    random_scores = torch.rand(1, 192, generator=torch.Generator().manual_seed(0))
    kept, share = literal_share(random_scores, config)
    early = config.sliding_window**2 / (200 * 201)
    late = max(config.dense_queries - 8, 0) * 200 / (200 * 201 / 2)
    counted = work(kept, 200)
    assert share - 1e-6 <= counted <= min(share + early + late, 1)
    if config.fallback == "zero" and not late:
        assert counted == pytest.approx(share)


@pytest.mark.parametrize("length", [200, 208, 209, 40])
@pytest.mark.parametrize("config", [*samplings()], ids=str)
def test_work_of_samples_counts_what_the_operator_attends_to(config, length):
    """Queries of one block attend to its sinks and samples where they lie behind the window."""
    problem = make_problem(heads=1, kv_heads=1, query_len=length)
    position = torch.arange(length)
    causal = position <= position[:, None]
    near = position > position[:, None] - config.sliding_window
    _, selection = with_selection(problem, config)
    chosen = int(selection.lengths[0, 0]) if selection.ran_sparse.all() else config.sink_size
    seen = causal & (near | (counts_behind(problem, config)[0] > 0))
    seen[max(length - config.dense_queries, 0) :] = True
    share = float((causal & seen).sum() / causal.sum())
    counted = method_of(config).work(chosen, length)
    assert share - 2e-2 <= counted <= share + 2e-1


def test_a_layer_without_sinks_and_samples_is_its_window_alone():
    config = KVSamplingConfig(
        block_size=16, num_probes=8, sliding_window=16, sink_size=0, num_samples=0,
        dense_queries=0,
    )  # fmt: skip
    sample = dataclasses.replace(SPARSE, kept=[0, None])
    window = (16 * 17 / 2 + 84 * 16) / (100 * 101 / 2)
    assert attention_work(sample, {0: config}) == pytest.approx((window + 1) / 2)
    assert kept_share(sample) == 0.5


def test_dense_heads_do_all_the_work_of_theirs():
    config = KVSamplingConfig(
        block_size=16, num_probes=8, sliding_window=16, dense_queries=0, dense_heads=(1, 2)
    )
    sample = dataclasses.replace(SPARSE, kept=[[5, 100, 100, 5], None])
    sparse = method_of(config).work(5, 100)
    assert sparse < 0.4
    assert attention_work(sample, {0: config}) == pytest.approx(((2 + 2 * sparse) / 4 + 1) / 2)


def test_work_follows_each_layers_own_settings():
    base = TokenSelectionConfig(observation_window=8)
    changes = {"fallback": "window", "sliding_window": 10}
    profile = json.loads(LayerProfile(base, {0: {}, 1: changes}).to_json())
    both = {"pattern": {"name": "streaming"}, "settings": profile}
    header = dataclasses.replace(
        HEADER,
        configurations={"dense": None, "a": profile, "b": both, "c": {**both, "settings": None}},
    )
    assert header.layer_configs("dense") == header.layer_configs("c") == {}
    configs = header.layer_configs("a")
    assert configs == header.layer_configs("b")
    sample = dataclasses.replace(SPARSE, configuration="a", kept=[20, 20])
    alone, windowed = (method_of(configs[layer]).work(20, 100) for layer in (0, 1))
    assert windowed == pytest.approx(alone + 80 * 10 / (100 * 101 / 2))
    assert attention_work(sample, configs) == pytest.approx((alone + windowed) / 2)
    (row,) = summarise(EvalResults(header, (sample,)))[:1]
    assert row.work == attention_work(sample, configs)


def test_every_group_has_its_rows():
    rows = rows_of(
        *pair(1.0, 1.0),
        *pair(1.0, 0.0, index=1),
        *pair(0.5, 0.0, task="count", length=200, prompt_tokens=200),
    )
    assert list(rows) == [
        (task, length, name)
        for task, length in [
            (None, None),
            (None, 100),
            (None, 200),
            ("recall", None),
            ("count", None),
            ("recall", 100),
            ("count", 200),
        ]
        for name in ("dense", "sparse")
    ]
    everything, recall = rows[None, None, "sparse"], rows["recall", 100, "sparse"]
    assert everything.samples == everything.pairs == 3
    assert everything.score == pytest.approx(1 / 3)
    assert everything.difference == pytest.approx(-0.5)
    assert everything.relative_loss == pytest.approx(0.6)
    assert everything.seconds == 0.25
    assert recall.difference == -0.5
    assert everything.kept_share == pytest.approx((0.75 + 0.75 + 0.625) / 3)
    assert rows[None, None, "dense"].difference is None


def test_only_scored_pairs_count():
    unfinished = dataclasses.replace(DENSE, index=2, score=0.0)
    rows = rows_of(*pair(1.0, 1.0), *pair(None, None, index=1), unfinished)
    assert (rows[None, None, "sparse"].samples, rows[None, None, "sparse"].pairs) == (2, 1)
    assert rows[None, None, "sparse"].score == 1
    assert rows[None, None, "dense"].score == 0.5
    unscored = rows_of(*pair(None, None))[None, None, "sparse"]
    assert unscored.score is unscored.difference is unscored.relative_loss_upper is None
    assert unscored.work == pytest.approx((50 * 51 / (100 * 101) + 1) / 2)


def test_no_relative_loss_where_dense_is_always_wrong():
    row = rows_of(*pair(0.0, 1.0))[None, None, "sparse"]
    assert row.difference == 1
    assert row.relative_loss is row.relative_loss_upper is None


def test_the_interval_is_that_of_agresti_and_min():
    right, lost, won, wrong = 40, 6, 2, 12
    pairs = [(1.0, 1.0)] * right + [(1.0, 0.0)] * lost + [(0.0, 1.0)] * won + [(0.0, 0.0)] * wrong
    n, b, c = len(pairs) + 2, lost + 0.5, won + 0.5  # half a sample in each of the four cells
    centre = (c - b) / n
    margin = 1.959964 * math.sqrt((b + c) - (c - b) ** 2 / n) / n
    assert difference_interval(pairs) == pytest.approx((centre - margin, centre + margin), 1e-6)


def test_agreement_of_few_samples_proves_little():
    widths = [difference_interval([(1.0, 1.0)] * n)[1] for n in (1, 10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 0.5
    assert widths[-1] < 0.005
    assert relative_loss_bound([(1.0, 1.0)] * 10) > 0.05


@pytest.mark.parametrize(("dense", "lost", "won"), [(0.9, 0.01, 0.01), (0.6, 0.1, 0.05)])
def test_intervals_hold_the_truth_as_often_as_they_say(dense, lost, won):
    """`lost` of all samples are right only densely, `won` only sparsely."""
    draw = random.Random(0)
    outcomes = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    weights = [dense - lost, lost, won, 1 - dense - won]
    rounds, inside, below = 400, 0, 0
    for _ in range(rounds):
        pairs = draw.choices(outcomes, weights, k=200)
        low, high = difference_interval(pairs)
        inside += low <= won - lost <= high
        below += (lost - won) / dense <= relative_loss_bound(pairs)
    assert inside / rounds > 0.93
    assert below / rounds > 0.93


def test_a_configuration_that_left_nothing_out_is_noticed():
    kept = {"dense": [None, None], "idle": [None, None], "busy": [None, 40]}
    published = TokenSelectionConfig().to_dict()
    configurations = {"dense": None, "idle": published, "busy": published}
    header = dataclasses.replace(HEADER, configurations=configurations)
    samples = tuple(
        dataclasses.replace(SPARSE, configuration=name, kept=layers)
        for name, layers in kept.items()
    )
    rows = summarise(EvalResults(header, samples))
    noticed = {row.configuration for row in rows if ran_dense(row)}
    assert noticed == {"idle"}
