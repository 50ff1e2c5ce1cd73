"""The operator with given numbers of tokens is the operator, and its measurements are checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmarks.replay.layers import LayerRun, Replayer, ReplayOptions, Shape, head_counts
from benchmarks.replay.method import Replayed, ReplayedConfig, make_selection, replayed

from token_sparse_attention import (
    AuxRequest,
    Execution,
    KVSamplingConfig,
    TokenSelectionConfig,
    token_sparse_attention,
)
from token_sparse_attention.benchmark import checks, timing
from token_sparse_attention.benchmark.checks import check_sparse, random_inputs
from token_sparse_attention.errors import UsageError
from token_sparse_attention.methods.selection import select_tokens
from token_sparse_attention.scoring import score_tokens

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 16)
CONFIG = TokenSelectionConfig(drop_mass=0.3, observation_window=16, pool_size=3, min_tokens=32)
WINDOWED = dataclasses.replace(CONFIG, budget="per_head", fallback="window", sliding_window=24)
LAST_DENSE = dataclasses.replace(WINDOWED, dense_queries=30)
SAMPLED = KVSamplingConfig(
    num_probes=16, sliding_window=24, sink_size=2, num_samples=40, budget="per_head",
    dense_queries=30, crossover="off",
)  # fmt: skip
OPTIONS = ReplayOptions(CPU, torch.float32, budget_seconds=0.001)
SELECTION = AuxRequest(selection=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(ReplayedConfig, method="own_selection"):
    """Settings of `Own`."""


class Own(Replayed, config=OwnConfig):
    """Replays what the operator itself selects."""

    def chosen(self, problem):
        scores = score_tokens(problem.query, problem.key, self.num_probes)
        plain = {one.name: getattr(self.config, one.name) for one in dataclasses.fields(CONFIG)}
        return select_tokens(scores, TokenSelectionConfig(**plain))


def make_inputs(seq_len=257):
    return random_inputs(seq_len, *SHAPE, CPU, torch.float32)


def run(inputs, config, counts, impl="reference"):
    """Replay counts; return the output and what was attended over."""
    config = replayed(config, counts, inputs.query.shape[2])
    how = {"execution": Execution(impl, "flash"), "return_aux": SELECTION}
    return token_sparse_attention(*inputs, config, **how)[:2]


@pytest.mark.parametrize("config", [CONFIG, WINDOWED, LAST_DENSE], ids=["zero", "window", "last"])
def test_with_its_own_selection_it_is_the_operator(config):
    inputs = make_inputs()
    out, selection, _ = token_sparse_attention(*inputs, config, return_aux=SELECTION)
    assert selection.ran_sparse.all()
    own = OwnConfig(**{one.name: getattr(config, one.name) for one in dataclasses.fields(config)})
    assert torch.equal(token_sparse_attention(*inputs, own), out)


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
    out, selection = run(inputs, WINDOWED, kept, impl)
    expected = [131] * 4 if kept is None else list(kept) * (4 // len(kept))
    assert selection.lengths.tolist() == [expected]
    assert selection.ran_sparse.tolist() == [kept is not None]
    assert check_sparse(inputs, out, selection, WINDOWED, reference_error=1e-6).passed
    assert not check_sparse(inputs, out * 1.01, selection, WINDOWED, reference_error=1e-6).passed


def test_selections_are_random_slots_and_the_window():
    selection = make_selection((20, 257, 16, 200), 16, 4, 257, CPU, padded=True)
    assert selection.indices.shape == (1, 4, 257)
    assert selection.indices.dtype == selection.lengths.dtype == torch.int32
    assert selection.lengths.tolist() == [[20, 257, 16, 200]]
    for slots, count in zip(selection.indices[0], (20, 257, 16, 200)):
        assert (slots[:count].diff() > 0).all()
        assert slots[count - 16 : count].tolist() == list(range(241, 257))
        assert (slots[count:] == -1).all()
    shared = make_selection((50,), 16, 4, 257, CPU, padded=False)
    assert shared.indices.shape == (1, 4, 50)
    assert len({tuple(slots) for slots in shared.indices[0].tolist()}) == 4


def test_counts_that_leave_out_the_window_are_refused():
    with pytest.raises(ValueError, match="counts must be at least 16, got 15"):
        replayed(CONFIG, (15,), 257)


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


def test_dense_heads_are_repeated_to_fit_and_checked():
    config = dataclasses.replace(SAMPLED, dense_heads=(1,))
    replayer = Replayer(OPTIONS, Shape(8, 2, 16), 257)
    point = replayer.point(LayerRun(config, (0.2, 1.0, 0.2, 0.2)))
    assert point.passed
    assert point.settings["dense_heads"] == [2, 3]
    assert [count == 257 for count in point.kept] == [head in (2, 3) for head in range(8)]
    few = Replayer(OPTIONS, Shape(2, 1, 16), 257).point(LayerRun(config, (0.2, 1.0, 0.2, 0.2)))
    assert few.settings["dense_heads"] == [], "thinned out"
    out, selection, _ = token_sparse_attention(*replayer.inputs, SAMPLED, return_aux=SELECTION)
    dense = dataclasses.replace(SAMPLED, dense_heads=(2, 3))
    wrong = check_sparse(replayer.inputs, out, selection, dense, reference_error=1e-6)
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


def test_layers_that_sample_keys_are_timed_as_they_are(monkeypatch):
    """There are no counts to replay, so what is timed is the operator, and sparse."""
    timed = []
    monkeypatch.setattr(
        timing,
        "kernel_times",
        lambda calls, *_: timed.extend(calls) or [timing.summarize("graph", [1.0])] * len(calls),
    )
    replayer = Replayer(OPTIONS, SHAPE, 600)
    shared = dataclasses.replace(SAMPLED, crossover="auto", budget="shared")
    for config in (SAMPLED, shared):
        point = replayer.point(LayerRun(config, (0.1,)))
        assert (point.passed, point.settings) == (True, config.to_dict())
        sparse = dataclasses.replace(config, crossover="off")
        out, selection, _ = token_sparse_attention(*replayer.inputs, sparse, return_aux=SELECTION)
        assert torch.equal(timed[-1](), out)
        assert selection.ran_sparse.all()
        assert set(point.kept) == set(selection.lengths[0].tolist())
        assert replayer.point(LayerRun(config, (0.2, 0.3, 0.4, 0.5))) is point
        assert replayer.point(LayerRun(config, ())) is replayer.dense, "only lengths made it so"
    alone = dataclasses.replace(SAMPLED, num_samples=0, sink_size=0, budget="shared")
    assert replayer.point(LayerRun(alone, (0.0,))).kept == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replayer(OPTIONS, Shape(3, 2, 16), 64), "--heads must be a multiple"),
        (lambda: ReplayOptions(CPU, share_within=1.0), r"--share-within must be in \[0, 1\)"),
        (
            lambda: Replayer(OPTIONS, SHAPE, 16).point(LayerRun(CONFIG, (0.5,))),
            "must exceed the 16 queries that score keys, got 16",
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
