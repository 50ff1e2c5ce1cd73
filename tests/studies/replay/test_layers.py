"""The operator with given numbers of tokens is the operator, and its measurements are checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmarks.replay.layers import (
    LayerRun,
    Replayer,
    ReplayOptions,
    Shape,
    head_counts,
    make_selection,
    run_with,
)

from token_sparse_attention import TokenSparseConfig, functional, token_sparse_attention
from token_sparse_attention.benchmark import checks, timing
from token_sparse_attention.benchmark.checks import check_sparse, random_inputs
from token_sparse_attention.crossover import NEVER_DENSE
from token_sparse_attention.errors import UsageError

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 16)
CONFIG = TokenSparseConfig.published(
    drop_mass=0.3, window_size=16, pool_size=3, min_tokens=32, crossover="off"
)
WINDOWED = dataclasses.replace(
    CONFIG, budget="per_head", fallback="window", fallback_window=24, fallback_sinks=2
)
SAMPLED = dataclasses.replace(
    WINDOWED, fallback_samples=40, fallback_landmarks=5, dense_queries=30
)
EVERY_QUERY = dataclasses.replace(SAMPLED, drop_mass=None, select_queries=False)
OPTIONS = ReplayOptions(CPU, torch.float32, budget_seconds=0.001)


def make_inputs(seq_len=257):
    return random_inputs(seq_len, *SHAPE, CPU, torch.float32)


def run(inputs, config, selection, impl="reference"):
    how = {"even": NEVER_DENSE, "impl": impl, "backend": "flash", "kept": 0.5}
    return run_with(inputs, config, selection, **how)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED, SAMPLED], ids=["zero", "window", "samples"])
def test_with_its_own_selection_it_is_the_operator(config):
    inputs = make_inputs()
    out, selection = token_sparse_attention(*inputs, config, return_selection=True)
    assert selection.ran_sparse.all()
    assert torch.equal(run(inputs, config, selection), out)


@pytest.mark.parametrize(
    ("kept", "impl"),
    [
        ((100,), "reference"),
        ((16, 40, 99, 130), "reference"),
        (None, "reference"),
        ((16, 40, 99, 130), "triton"),
    ],
    ids=str,
)
def test_it_attends_over_what_was_given(kept, impl):
    inputs = make_inputs(131)
    selection = make_selection(kept, 16, inputs, padded=impl == "triton")
    out = run(inputs, WINDOWED, selection, impl)
    assert check_sparse(inputs, out, selection, WINDOWED, reference_error=1e-6).passed
    assert not check_sparse(inputs, out * 1.01, selection, WINDOWED, reference_error=1e-6).passed


def test_selections_are_random_slots_and_the_window():
    inputs = make_inputs()
    selection = make_selection((20, 257, 16, 200), 16, inputs, padded=True)
    assert selection.indices.shape == (1, 4, 257)
    assert selection.indices.dtype == selection.lengths.dtype == torch.int32
    assert selection.lengths.tolist() == [[20, 257, 16, 200]]
    for slots, count in zip(selection.indices[0], (20, 257, 16, 200)):
        assert (slots[:count].diff() > 0).all()
        assert slots[count - 16 : count].tolist() == list(range(241, 257))
        assert (slots[count:] == -1).all()
    shared = make_selection((50,), 16, inputs, padded=False)
    assert shared.indices.shape == (1, 4, 50)
    assert len({tuple(slots) for slots in shared.indices[0].tolist()}) == 4


def test_recorded_heads_are_repeated_or_thinned_out():
    def counts(shares, num_heads):
        return head_counts(LayerRun(CONFIG, shares), num_heads, 1000)

    assert counts((0.1, 0.2), 4) == (100, 100, 200, 200)
    assert counts((0.1, 0.2, 0.3, 0.4), 2) == (100, 300)
    assert counts((0.5,), 32) == (500,)
    assert counts((0.001, 1.0), 2) == (16, 1000), "the window is always kept"
    assert counts((), 4) is None


def test_nearly_the_same_is_measured_once():
    replayer = Replayer(OPTIONS, SHAPE, 600)
    point = replayer.point(LayerRun(CONFIG, (0.5,)))
    assert (point.kept, point.passed, point.settings) == ((300,), True, CONFIG.to_dict())
    assert point.samples >= timing.MIN_SAMPLES
    assert point.dense_ms > 0
    assert 0 < point.low_ms <= point.median_ms <= point.high_ms
    assert replayer.point(LayerRun(CONFIG, (0.504,))) is point
    for run in (LayerRun(CONFIG, (0.51,)), LayerRun(WINDOWED, (0.5,))):
        assert replayer.point(run) is not point
    assert len(replayer.point(LayerRun(WINDOWED, (0.5, 0.5, 0.5, 0.6))).kept) == 4


def test_dense_layers_cost_scoring_where_they_were_scored():
    replayer = Replayer(OPTIONS, SHAPE, 600)
    assert replayer.dense.settings is None
    assert replayer.dense.median_ms == replayer.dense.dense_ms
    assert replayer.point(None) is replayer.dense
    scored = replayer.point(LayerRun(CONFIG, ()))
    assert (scored.kept, scored.passed, scored.settings) == (None, True, CONFIG.to_dict())
    short = dataclasses.replace(CONFIG, min_tokens=600)
    below = dataclasses.replace(CONFIG, crossover="auto")
    for config in (short, below, dataclasses.replace(CONFIG, drop_mass=0.0)):
        assert replayer.point(LayerRun(config, ())) is replayer.dense


def test_more_than_the_crossover_allows_is_still_replayed():
    config = dataclasses.replace(CONFIG, crossover="auto")  # nothing so short would run sparse
    assert Replayer(OPTIONS, SHAPE, 600).point(LayerRun(config, (0.9,))).passed


def test_dense_heads_are_repeated_to_fit_and_checked(monkeypatch):
    config = dataclasses.replace(EVERY_QUERY, dense_heads=(1,))
    replayer = Replayer(OPTIONS, Shape(8, 2, 16), 257)
    point = replayer.point(LayerRun(config, (0.2, 1.0, 0.2, 0.2)))
    assert point.passed
    assert point.settings["dense_heads"] == [2, 3]
    assert [count == 257 for count in point.kept] == [head in (2, 3) for head in range(8)]
    few = Replayer(OPTIONS, Shape(2, 1, 16), 257).point(LayerRun(config, (0.2, 1.0, 0.2, 0.2)))
    assert few.settings["dense_heads"] == [], "thinned out"
    monkeypatch.setattr(functional, "_attend_dense_heads", lambda *_: None)
    wrong = Replayer(OPTIONS, Shape(8, 2, 16), 257).point(LayerRun(config, (0.2, 1.0, 0.2, 0.2)))
    assert not wrong.passed, "heads that are not dense do not pass for it"


def test_wrong_results_and_lack_of_memory_are_recorded(monkeypatch):
    replayer = Replayer(OPTIONS, SHAPE, 600)

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("too large\nby far")

    with monkeypatch.context() as patched:
        patched.setattr(checks, "exact_rows", lambda *given: torch.ones(len(given[2]), 1))
        wrong = replayer.point(LayerRun(CONFIG, (0.5,)))
    assert not wrong.passed
    assert "exceeds" in wrong.note
    with monkeypatch.context() as patched:
        patched.setattr(timing, "kernel_times", out_of_memory)
        skipped = replayer.point(LayerRun(CONFIG, (0.2,)))
    assert (skipped.kind, skipped.passed, skipped.median_ms) == ("skipped", False, None)
    assert skipped.note == "OutOfMemoryError: too large"


def test_layers_that_select_no_queries_are_timed_as_they_are(monkeypatch):
    """There are no counts to replay, so what is timed is the operator, and sparse."""
    timed = []
    monkeypatch.setattr(
        timing,
        "kernel_times",
        lambda calls, *_: timed.extend(calls) or [timing.summarize("graph", [1.0])] * len(calls),
    )
    replayer = Replayer(OPTIONS, SHAPE, 600)
    shared = dataclasses.replace(EVERY_QUERY, crossover="auto", budget="shared")
    for config in (EVERY_QUERY, shared):
        point = replayer.point(LayerRun(config, (0.1,)))
        assert (point.passed, point.settings) == (True, config.to_dict())
        sparse = dataclasses.replace(config, crossover="off", min_tokens=0)
        out, selection = token_sparse_attention(*replayer.inputs, sparse, return_selection=True)
        assert torch.equal(timed[-1](), out)
        assert selection.ran_sparse.all()
        assert set(point.kept) == set(selection.lengths[0].tolist())
        assert replayer.point(LayerRun(config, (0.2, 0.3, 0.4, 0.5))) is point
        assert replayer.point(LayerRun(config, ())) is replayer.dense, "only lengths made it so"
    alone = dataclasses.replace(CONFIG, fallback="window", drop_mass=None, select_queries=False)
    assert replayer.point(LayerRun(alone, (0.0,))).kept == (0,)
    too_long = dataclasses.replace(EVERY_QUERY, min_tokens=1000)
    assert replayer.point(LayerRun(too_long, (0.1,))).passed, "it ran sparse where it was recorded"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replayer(OPTIONS, Shape(3, 2, 16), 64), "--heads must be a multiple"),
        (lambda: ReplayOptions(CPU, share_within=1.0), r"--share-within must be in \[0, 1\)"),
        (
            lambda: Replayer(OPTIONS, SHAPE, 16).point(LayerRun(CONFIG, (0.5,))),
            "must exceed the settings' window_size 16, got 16",
        ),
        (
            lambda: Replayer(dataclasses.replace(OPTIONS, attention_backend="fa4"), SHAPE, 64),
            "--attention-backend: attention_backend 'fa4'",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()
