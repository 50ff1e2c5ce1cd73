"""From recorded counts to speed-ups: with made-up times, and from end to end on a CPU."""

from __future__ import annotations

import dataclasses
import json
import re
from statistics import fmean

import pytest
import torch
from benchmarks.replay.__main__ import main
from benchmarks.replay.accuracy import frontier_table, join, target_of
from benchmarks.replay.layers import LayerRun, ReplayOptions, Shape
from benchmarks.replay.method import ReplayedConfig
from benchmarks.replay.results import Replay, chosen_samples, layer_runs, replay

from evaluation.results import DENSE, HEADER, SPARSE
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig
from token_sparse_attention.benchmark import checks, timing
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import EvalResults, save_results
from token_sparse_attention.evaluation.summary import layer_shares

CONFIG = TokenSelectionConfig(observation_window=8, pool_size=3, min_tokens=8)
PER_HEAD = dataclasses.replace(CONFIG, budget="per_head", fallback="window", sliding_window=16)
PROFILE = LayerProfile(CONFIG, {1: {"drop_mass": 0.2}})
RESULTS_HEADER = dataclasses.replace(
    HEADER,
    configurations={
        "dense": None,
        "shared": CONFIG.to_dict(),
        "heads": PER_HEAD.to_dict(),
        "profile": json.loads(PROFILE.to_json()),
    },
)
KEPT = {
    "dense": [None, None],
    "shared": [[60, None], [80, 40]],
    "heads": [[[50, 60, 70, 80], 90], [100, [20, 30, 40, 50]]],
    "profile": [[None, 50], [None, 50]],
}
OPTIONS = ReplayOptions(torch.device("cpu"), torch.float32, budget_seconds=0.001)
TARGET = Shape(8, 2, 16)


def make_results(length=128, scores=(1.0, 0.5)) -> EvalResults:
    samples = []
    for name, counts in KEPT.items():
        for index, kept in enumerate(counts):
            base = DENSE if name == "dense" else SPARSE
            changes = {"index": index, "length": length, "score": scores[index], "kept": kept}
            samples.append(
                dataclasses.replace(base, configuration=name, prompt_tokens=120, **changes)
            )
    return EvalResults(RESULTS_HEADER, tuple(samples))


def made(evaluations, target=TARGET, **how) -> Replay:
    *_, (points, rows) = replay(evaluations, OPTIONS, target, **how)
    return Replay({"device": "a device"}, {}, tuple(points), tuple(rows))


@pytest.fixture
def in_theory(monkeypatch):
    """Times that are attention's work: 100 ms for dense, and 1 ms more for all else."""

    def times(calls, *_):
        return [timing.summarize("graph", [one]) for one in map(theoretical_ms, calls)]

    monkeypatch.setattr(timing, "kernel_times", times)


def theoretical_ms(call) -> float:
    config = next((a for a in call.args if isinstance(a, ReplayedConfig)), None)
    if config is None:
        return 100.0
    shares = [count / 128 for count in config.counts or (128,)]
    return fmean(share**2 for share in shares) * 100 + 1


@pytest.mark.parametrize("name", list(KEPT))
def test_replayed_squares_are_recorded_squares(name):
    results = make_results()
    works = []
    for parts in layer_runs(results, name, chosen_samples(results, name, 128)):
        assert sum(share for share, _ in parts) == pytest.approx(1)
        for share, run in parts:
            shares = (1.0,) if run is None else run.shares or (1.0,)
            works.append(share * sum(s * s for s in shares) / len(shares))
    recorded = [
        fmean(share**2 for share in layer_shares(kept, 120))
        for sample in KEPT[name]
        for kept in sample or [None, None]
    ]
    assert sum(works) / 2 == pytest.approx(fmean(recorded))


def test_layers_are_what_they_did():
    results = make_results()

    def runs(name):
        return layer_runs(results, name, chosen_samples(results, name, 128))

    assert runs("dense") == [[(1.0, None)]] * 2
    first, second = runs("shared")
    ((share, run),) = first
    assert (share, run.config, len(run.shares)) == (1.0, CONFIG, 1)
    assert 70 / 120 < run.shares[0] < 71 / 120
    assert second == [
        (0.5, LayerRun(CONFIG, (pytest.approx(40 / 120),))),
        (0.5, LayerRun(CONFIG, ())),
    ]
    assert [len(run.shares) for ((_, run),) in runs("heads")] == [4, 4]
    unlisted, listed = runs("profile")
    assert unlisted == [(1.0, None)]
    assert listed[0][1].config.drop_mass == 0.2


@pytest.mark.usefixtures("in_theory")
def test_speed_ups_are_of_all_layers_together():
    results = make_results()
    made_now = made([("run", results)])
    found = {row.configuration: made_now.times(row) for row in made_now.rows}
    assert found["dense"].speed_up == 1
    assert found["dense"].dense_ms == 200
    # Layer 0 keeps the root of the mean square of 60 and 80; layer 1 once 40, once all.
    sparse = [(60**2 + 80**2) / 2 / 120**2, 0.5 * (40**2 / 120**2) + 0.5 * 1]
    expected = 200 / (100 * sum(sparse) + 2)
    assert found["shared"].speed_up == pytest.approx(expected, rel=0.01)
    assert found["profile"].speed_up == pytest.approx(
        200 / (101 + 100 * (50 / 120) ** 2), rel=0.01
    )
    heads = next(row for row in made_now.rows if row.configuration == "heads")
    (point,) = (made_now.points[part.point] for part in heads.layers[0])
    assert len(point.kept) == TARGET.num_heads
    assert point.kept[0::2] == point.kept[1::2], "each recorded head stands for two"


@pytest.mark.usefixtures("in_theory")
def test_equal_layers_share_measurements_and_say_so():
    results = make_results()
    samples = [s for s in results.samples if s.configuration in ("dense", "shared")]
    constant = [dataclasses.replace(s, kept=s.kept and [60, 60]) for s in samples]
    replayed = made([("a", EvalResults(RESULTS_HEADER, tuple(constant)))])
    assert len(replayed.points) == 2
    assert {row.configuration: row.reused for row in replayed.rows} == {"dense": 0, "shared": 1}


@pytest.mark.usefixtures("in_theory")
def test_files_keep_everything_and_refuse_the_rest(tmp_path):
    replayed = made([("run", make_results())], own_shape=True)
    path = tmp_path / "deep" / "replay.json"
    replayed.save(path)
    assert Replay.load(path) == replayed
    content = json.loads(path.read_text())
    points = content["points"]
    broken = {
        "must have version 1, got 2": {"version": 2},
        "suite must be one of replay; got 'op'": {"suite": "op"},
        "has no entry 'points'": {"points": ...},
        r"points\[0\].kept must be array of length >= 1": {"points": [points[1] | {"kept": []}]},
        r"points\[0\].passed must be bool, got 1": {"points": [points[0] | {"passed": 1}]},
        "number of a point, below 0": {"points": []},
        r"rows\[0\] must be object, got 1": {"rows": [1]},
        "layers must not be empty": {"rows": [content["rows"][0] | {"layers": []}]},
        "number of a point": {"rows": [content["rows"][0] | {"layers": [[[0.4, 0]]]}]},
    }
    for message, change in broken.items():
        changed = {k: v for k, v in {**content, **change}.items() if v is not ...}
        path.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=message):
            Replay.load(path)


@pytest.mark.usefixtures("in_theory")
def test_accuracy_joins_the_replay_of_the_same_counts():
    before, after = make_results(scores=(None, None)), make_results()
    replayed = made([("run", before)], own_shape=True)
    rows = {row.accuracy.configuration: row for row in join([("run", after)], [replayed])}
    assert rows["shared"].accuracy.score == 0.75
    assert rows["shared"].times.speed_up > 1
    assert rows["shared"].own_times.speed_up == pytest.approx(rows["shared"].times.speed_up)
    assert target_of([replayed]) == ("8 heads, 2 KV heads, head size 16, float32, flash, a device")

    def notes(results):
        return {r.accuracy.configuration: r.note for r in join([("run", results)], [replayed])}

    settings = {**RESULTS_HEADER.configurations, "shared": PER_HEAD.to_dict()}
    changed = dataclasses.replace(RESULTS_HEADER, configurations=settings)
    assert notes(EvalResults(changed, after.samples)) == {
        **dict.fromkeys(KEPT, ""),
        "shared": "not replayed",
    }
    fewer = EvalResults(RESULTS_HEADER, after.samples[:-1])
    assert notes(fewer)["profile"] == "not replayed"
    assert set(notes(make_results(length=256)).values()) == {"not replayed"}
    with pytest.raises(UsageError, match="must share their settings; got 4 heads"):
        join([("run", after)], [replayed, made([("run", before)], Shape(4, 2, 16))])


@pytest.mark.usefixtures("in_theory")
def test_the_table_shows_what_is_known():
    results = make_results()
    some = EvalResults(
        RESULTS_HEADER,
        tuple(s for s in results.samples if s.configuration in ("dense", "profile")),
    )
    replayed = made([("run", some)])
    table = frontier_table(join([("run", some)], [replayed]))
    assert table.splitlines() == [
        "| length | configuration | n | score | loss | loss below | kept | work | dense, ms "
        "| sparse, ms | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 128 | dense | 2 | 0.750 | - | - | 100.0% | 1.000 | 200 | 200 | 1.00x |",
        "| 128 | profile | 2 | 0.750 | +0.0% | +65.8% | 70.8% | 0.588 | 200 | 118 | 1.69x |",
    ]
    wrong = dataclasses.replace(replayed.points[1], passed=False)
    failed = dataclasses.replace(replayed, points=(replayed.points[0], wrong))
    table = frontier_table(join([("a", some), ("b", some)], [failed]))
    assert "| a | 128 | profile | 2 | 0.750 | +0.0% | +65.8% | 70.8% | 0.588 | - | - | **" in table
    assert "**check failed**" in table
    assert "| b | 128 | dense |" in table


def test_patterns_are_shown_but_not_replayed():
    """The inputs are random, and which blocks a pattern takes depends on them."""
    settings = {"pattern": {"name": "streaming"}, "settings": CONFIG.to_dict()}
    header = dataclasses.replace(
        RESULTS_HEADER, configurations={**RESULTS_HEADER.configurations, "shared": settings}
    )
    some = EvalResults(header, make_results().samples)
    replayed = made([("run", some)])
    assert "shared" not in {row.configuration for row in replayed.rows}
    table = frontier_table(join([("run", some)], [replayed]))
    (line,) = [line for line in table.splitlines() if "| shared |" in line]
    assert "| ≤0." in line
    assert line.endswith(
        "| - | - | **not replayed: the blocks of a pattern depend on the text** |"
    )
    with pytest.raises(
        ValueError, match=r"attention_backend must be one of auto.*got 'streaming'"
    ):
        dataclasses.replace(OPTIONS, attention_backend="streaming")


def test_layers_that_sample_keys_are_replayed(tmp_path):
    """Counts differ from sample to sample, but what is timed does not depend on them."""
    every = KVSamplingConfig(
        num_probes=8, sliding_window=16, sink_size=0, num_samples=20, budget="per_head",
        dense_queries=4, crossover="off",
    )  # fmt: skip
    settings = {**RESULTS_HEADER.configurations, "shared": every.to_dict()}
    header = dataclasses.replace(RESULTS_HEADER, configurations=settings)
    kept = iter([[[19, 20, 21, 20], 20], [20, None]])
    samples = [
        dataclasses.replace(sample, kept=next(kept))
        for sample in make_results().samples
        if sample.configuration == "shared"
    ]
    results = EvalResults(header, tuple(samples))
    replayed = made([("run", results)])
    (row,) = replayed.rows
    assert row.layers == (((1.0, 0),), ((0.5, 0), (0.5, 1)))
    assert row.reused == 1
    sparse, dense = replayed.points
    assert (sparse.settings, sparse.passed) == (every.to_dict(), True)
    assert (dense.settings, dense.kept) == (None, None)
    assert 19 <= min(sparse.kept) <= max(sparse.kept) <= 21
    replayed.save(tmp_path / "replay.json")
    (found,) = join([("run", results)], [Replay.load(tmp_path / "replay.json")])
    assert found.times == replayed.times(row)


def command(*arguments: object) -> int:
    return main([*map(str, arguments)])


SMALL = ("--device", "cpu", "--dtype", "float32", "--heads", "4", "--kv-heads", "2")
SMALL += ("--head-dim", "16", "--budget-seconds", "0.001")


def test_the_command_from_end_to_end(tmp_path, capsys):
    result, out = tmp_path / "result.jsonl", tmp_path / "replay.json"
    save_results(result, make_results())
    assert command(result, *SMALL, "--own-shape", "--out", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["failed_checks"] == 0
    rows = {row["configuration"]: row for row in shown["rows"]}
    assert list(rows) == list(KEPT)
    assert rows["dense"]["speed_up"] == rows["dense"]["own_speed_up"] == 1
    for row in rows.values():
        assert row["speed_up"] == row["dense_ms"] / row["sparse_ms"] > 0
    replayed = Replay.load(out)
    assert replayed.arguments["num_heads"] == 4
    assert {point.head_dim for point in replayed.points} == {8, 16}
    assert all(point.kind == "eager" and point.passed for point in replayed.points)
    assert replayed.provenance["versions"]["torch"] == torch.__version__
    assert command(result, "--table", out) == 0
    printed = capsys.readouterr().out
    assert (
        "attention of all layers at 4 heads, 2 KV heads, head size 16, float32, flash" in printed
    )
    assert f"{rows['heads']['speed_up']:.2f}x" in printed


def test_a_failed_check_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checks, "exact_rows", lambda *given: torch.ones(len(given[2]), 1))
    result = tmp_path / "result.jsonl"
    save_results(result, make_results())
    assert command(result, *SMALL, "--out", tmp_path / "replay.json") == 1
    printed = capsys.readouterr().out
    assert "check failed" in printed
    assert "x |" not in printed
    assert command(result, "--table", tmp_path / "replay.json", "--json") == 1


def test_bad_input_is_named(tmp_path, capsys):
    result, other = tmp_path / "result.jsonl", tmp_path / "other.jsonl"
    save_results(result, make_results())
    settings = {**RESULTS_HEADER.configurations, "profile": {"abacus": 1}}
    header = dataclasses.replace(RESULTS_HEADER, configurations=settings)
    save_results(other, EvalResults(header, make_results().samples))
    out = ("--out", tmp_path / "r.json")
    for arguments, message in [
        ((result,), "--out FILE is needed"),
        ((result, *out, "--table", other), "--out is for a new replay"),
        ((result, "--table", result), "is not valid JSON"),
        ((result, *SMALL, *out, "--lengths", "64"), "no results to replay"),
        ((other, *SMALL, *out), "configuration 'profile' cannot be read.*abacus"),
        ((tmp_path / "absent", *out), "absent cannot be read"),
        ((result, *SMALL, "--out", "/dev/null/x"), "--out /dev/null/x cannot be written"),
        ((result, *SMALL, *out, "--device", "abacus"), "--device abacus cannot be used"),
    ]:
        assert command(*arguments) == 2
        assert re.search(message, capsys.readouterr().err), message
    unlisted = [dataclasses.replace(s, kept=s.kept and [9, 9]) for s in make_results().samples]
    save_results(other, EvalResults(RESULTS_HEADER, tuple(unlisted)))
    assert command(other, *SMALL, *out) == 2
    assert "ran layer 0 sparse, but does not list it" in capsys.readouterr().err
