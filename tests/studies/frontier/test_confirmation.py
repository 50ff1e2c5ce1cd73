"""The tables of what was calibrated and confirmed, from made-up results."""

from __future__ import annotations

import dataclasses

from benchmarks.frontier import calibrated as calibrated_tables
from benchmarks.frontier import confirmation
from benchmarks.replay.accuracy import join
from benchmarks.replay.results import Times

from evaluation.results import DENSE, HEADER
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig
from token_sparse_attention.calibration.record import (
    CalibrationResult,
    Choice,
    HeadSensitivity,
    LayerDrift,
    LayerSetting,
    Sensitivity,
)
from token_sparse_attention.evaluation.record import EvalResults


def cells(table: str, start: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def calibrated(**fields) -> CalibrationResult:
    """What a calibration measured and chose."""
    return CalibrationResult("both", "m", "bfloat16", {}, {}, KVSamplingConfig(), (), **fields)


def test_calibration_shows_each_number_and_the_choice(tmp_path):
    rows = [
        Sensitivity(
            layer, LayerSetting("num_samples", value, heads),
            10.0 ** -(layer + 1) / (1 + value + 5 * len(heads)), 2e-5, 0.1, 0.2, 1,
        )
        for heads in ((), (5,))
        for layer in (0, 1, 2)
        for value in (0, 9)
    ]  # fmt: skip
    layers = {1: {"num_samples": 9}, 2: {"num_samples": 0, "dense_heads": (3, 5)}}
    choice = Choice("target_speedup", 2.0, LayerProfile(KVSamplingConfig(), layers))
    path, drift = tmp_path / "measured.json", tmp_path / "drift.json"
    path.write_text(calibrated(sensitivity=tuple(rows), choices=(choice,)).to_json())
    drifts = [
        LayerDrift(layer, 1.0, value, None, layer == 0)
        for layer, value in enumerate((0.2, 0.7, 0.1))
    ]
    choice = Choice("drift_quantile", 0.5, LayerProfile(KVSamplingConfig(), {0: {}}))
    drift.write_text(calibrated(drift=tuple(drifts), choices=(choice,)).to_json())
    table = calibrated_tables.calibration(path, drift)
    head = ["layer", "0 samples", "9 samples", "chosen", "drift", "by drift"]
    assert cells(table, "layer") == head
    first = ["0", "1.0e-01 ± 2e-05", "1.0e-02 ± 2e-05", "dense", "2.0e-01", "sparse"]
    assert cells(table, "0") == first
    assert cells(table, "1")[-3:] == ["9", "7.0e-01", "dense"]
    assert cells(table, "2")[-3:] == ["0, heads 3, 5 dense", "1.0e-01", "dense"]


def test_goals_list_layers_by_their_samples(tmp_path):
    rows = [
        Sensitivity(layer, LayerSetting("num_samples", value), cost, None, 0.1, work, 1)
        for layer, value, cost, work in (
            (0, 9, 1.0, 0.5),
            (0, 4, 2.0, 0.25),
            (1, 9, 0.0, 0.5),
            (1, 4, 0.5, 0.25),
        )
    ]
    result = calibrated(sensitivity=tuple(rows))
    path = tmp_path / "measured.json"
    path.write_text(result.to_json())
    table = calibrated_tables.goals(path, (1, 1.3, 2, 2.5, 4))
    assert cells(table, "attention work")[1:4] == ["dense", "9 samples", "4 samples"]
    assert cells(table, "1/1")[1:] == ["0, 1", "-", "-", "0.0e+00"]
    assert cells(table, "1/1.3")[1:] == ["0", "1", "-", "0.0e+00"]
    assert cells(table, "1/2")[1:] == ["-", "0, 1", "-", "1.0e+00"]
    assert cells(table, "1/2.5")[1:] == ["-", "0", "1", "1.5e+00"]
    assert cells(table, "1/4")[1:] == ["-", "-", "0, 1", "2.5e+00"]


def results(length: int, scores: list[tuple[float, float]], *, sparse: bool) -> EvalResults:
    """A file of one sparse configuration, F: pairs of dense and sparse scores."""
    header = dataclasses.replace(
        HEADER, configurations={"dense": None, "F": TokenSelectionConfig().to_dict()}
    )
    samples = []
    for index, (dense, score) in enumerate(scores):
        one = dataclasses.replace(DENSE, length=length, index=index, score=dense)
        kept = [40, None] if sparse else [None, None]
        other = dataclasses.replace(one, configuration="F", score=score, kept=kept)
        samples += [one, other]
    return EvalResults(header, tuple(samples))


def test_lengths_are_pooled_and_say_where_nothing_ran_sparse():
    rounds = [
        results(2048, [(1.0, 1.0)] * 6, sparse=False),
        results(1024, [(1.0, 0.5), (1.0, 1.0)], sparse=True),
    ]
    table = confirmation.confirmed(rounds, [], lambda settings: f"tau {settings['drop_mass']}")
    name = confirmation.NAMES["F"]
    rows = [line.split(" | ") for line in table.splitlines() if f"| {name} |" in line]
    assert [row[0] for row in rows] == ["| 1K", "| 2K", "| all"], "shortest first"
    assert [row[2] for row in rows] == ["0.750 of 1.000", "1.000 of 1.000", "0.938 of 1.000"]
    assert [row[3] for row in rows] == ["+25.0%", "+0.0%", "+6.2%"]
    assert [row[7] for row in rows] == ["2", "6", "8"]
    assert rows[1][8] == "100%", "nothing ran sparse"
    assert rows[2][8] == "sparse in 25% of samples"
    low, high = (float(edge) for edge in rows[2][10].rstrip(" |").split(" to "))
    assert low < -0.0625 < high
    assert f"- {name}: tau 0.005" in table


def test_at_a_glance_stands_what_was_asked_for(monkeypatch):
    made = {
        "one": results(1024, [(1.0, 0.5), (1.0, 1.0)], sparse=True),
        "other": results(1024, [(1.0, 1.0)], sparse=True),
        "longer": results(2048, [(1.0, 1.0)], sparse=True),
        "not timed": results(1024, [(1.0, 1.0)], sparse=True),
    }

    def timed(evaluations, replays):
        return [dataclasses.replace(row, times=replays[0]) for row in join(evaluations, [])]

    monkeypatch.setattr(confirmation, "join", timed)
    times = {"one": Times(6.0, 2.0), "other": Times(6.0, 4.0), "longer": Times(1.0, 1.0)}
    models = {
        name: confirmation.Shown([one], [times.get(name)], () if name == "longer" else ("F",))
        for name, one in made.items()
    }
    table = confirmation.glance(models, 1024)
    name = confirmation.NAMES["F"]
    assert [line.split(" | ")[:5] for line in table.splitlines()[2:]] == [
        ["| one", name, "0.750, 1.000", "25.0%", cells(table, "one")[4]],
        ["| other", name, "1.000, 1.000", "0.0%", cells(table, "other")[4]],
        ["| not timed", name, "1.000, 1.000", "0.0%", cells(table, "not timed")[4]],
    ]
    assert [cells(table, one)[5:] for one in ("one", "other", "not timed")] == [
        ["3.00x", "-", "2"],
        ["1.50x", "-", "1"],
        ["-", "-", "1"],
    ]


def test_files_of_other_samples_are_one_row():
    """Two seeds' samples of one length; only the first was replayed."""
    rounds = [
        results(1024, [(1.0, 0.5), (1.0, 1.0)], sparse=True),
        results(1024, [(0.5, 0.5)] * 2, sparse=True),
    ]
    table = confirmation.confirmed(rounds, [], lambda _: "x")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| 1K")]
    assert [(row[2], row[7]) for row in rows] == [("0.625 of 0.750", "4")]


def seeded(seed, length, scores):
    made = results(length, scores, sparse=True)
    arguments = {**made.header.arguments, "seed": seed}
    return EvalResults(dataclasses.replace(made.header, arguments=arguments), made.samples)


def test_seeds_are_told_apart():
    rounds = [
        seeded(23, 1024, [(1.0, 0.5), (1.0, 1.0)]),
        seeded(5, 1024, [(1.0, 1.0)]),
        seeded(7, 2048, [(1.0, 0.0)]),
    ]
    lines = confirmation.by_seed(rounds, 1024).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "settings",
        "seed 5",
        "seed 23",
    ]
    name = confirmation.NAMES["F"]
    assert cells("\n".join(lines), name)[1].startswith("+0.0%, below ")
    assert cells("\n".join(lines), name)[2].startswith("+25.0%, below ")
    assert cells("\n".join(lines), name)[2].endswith("(2)")
    assert len(lines) == 3
    assert len(confirmation.by_seed(rounds[1:], 1024).splitlines()) == 2, "one sample only"


def test_the_aim_is_judged_at_its_length_and_by_later_seeds(monkeypatch):
    rounds = [
        seeded(23, 1024, [(1.0, 1.0), (1.0, 1.0)]),
        seeded(5, 1024, [(1.0, 0.5), (1.0, 0.5)]),
        seeded(23, 512, [(1.0, 1.0)] * 4),
    ]
    monkeypatch.setattr(
        confirmation,
        "join",
        lambda of, _: [dataclasses.replace(row, times=Times(6.0, 2.0)) for row in join(of, [])],
    )
    table = confirmation.aim(rounds, [], ("F",), 1024, 23)
    _, speed, at_length, later, together = cells(table, confirmation.NAMES["F"])
    assert speed == "3.00x"
    assert at_length.startswith("+25.0%, below +")
    assert at_length.endswith("(4)")
    assert (later[:6], later[-3:]) == ("+50.0%", "(2)")
    assert (together[:6], together[-3:]) == ("+12.5%", "(8)")


def test_single_heads_are_named_by_cost(tmp_path):
    setting = LayerSetting("num_samples", 4096)
    costs = {2: 0.1, 0: 0.4, 1: 0.2, 3: 0.05, 4: 0.03}
    heads = tuple(HeadSensitivity(6, head, setting, cost, 0.01) for head, cost in costs.items())
    whole = Sensitivity(6, setting, 0.7, None, 0.1, 0.5, 1)
    result = calibrated(heads=heads, sensitivity=(whole,))
    path = tmp_path / "measured.json"
    path.write_text(result.to_json())
    named = "0: 4.0e-01 ± 1e-02; 1: 2.0e-01 ± 1e-02; 2: 1.0e-01 ± 1e-02"
    assert cells(calibrated_tables.single_heads(path), "6") == ["6", "4,096", named, "8.0e-02"]


def test_goals_name_dense_heads(tmp_path):
    rows = [
        Sensitivity(0, LayerSetting("num_samples", 9, heads), cost, None, 0.1, work, 1)
        for heads, cost, work in (((), 1.0, 0.1), ((2,), 0.5, 0.3), ((0, 2), 0.1, 0.5))
    ]
    result = calibrated(sensitivity=tuple(rows))
    path = tmp_path / "measured.json"
    path.write_text(result.to_json())
    table = calibrated_tables.goals(path, (2, 3, 10))
    assert cells(table, "1/2")[1:3] == ["-", "0 (heads 0, 2 dense)"]
    assert cells(table, "1/3")[1:3] == ["-", "0 (head 2 dense)"]
    assert cells(table, "1/10")[1:3] == ["-", "0"]


def test_samples_without_a_dense_reply_or_a_score_are_no_pairs():
    made = results(1024, [(1.0, 1.0), (1.0, 0.0), (1.0, 0.0)], sparse=True)
    no_dense, no_score = made.samples[2], made.samples[5]
    left = [s for s in made.samples if s not in (no_dense, no_score)]
    left.append(dataclasses.replace(no_score, score=None))
    rounds = [EvalResults(made.header, tuple(left))]
    table = confirmation.confirmed(rounds, [], lambda _: "")
    (row,) = (line.split(" | ") for line in table.splitlines() if line.startswith("| 1K"))
    assert (row[2], row[7]) == ("1.000 of 1.000", "1")


def test_the_published_rule_goes_by_its_own_name():
    made = results(1024, [(1.0, 0.5)], sparse=True)
    header = dataclasses.replace(
        made.header,
        configurations={"dense": None, "published": TokenSelectionConfig().to_dict()},
    )
    samples = tuple(
        dataclasses.replace(s, configuration="published") if s.configuration == "F" else s
        for s in made.samples
    )
    table = confirmation.confirmed([EvalResults(header, samples)], [], lambda _: "x")
    assert "| 1K | published | 0.500 of 1.000 |" in table
    assert table.count("published") == 2, (
        "its row, none of all lengths where there is one, and what it is"
    )


def test_tasks_that_the_dense_model_fails_do_not_count():
    def reply(task, index, configuration, score):
        base = DENSE if configuration == "dense" else dataclasses.replace(DENSE, kept=[3])
        return dataclasses.replace(
            base, task=task, index=index, configuration=configuration, score=score
        )

    samples = []
    for task, scores in {"half": (1.0, 0.0), "hard": (0.4, 0.4)}.items():
        for index, score in enumerate(scores):
            samples += [reply(task, index, "dense", score), reply(task, index, "sparse", 1.0)]
    results = EvalResults(HEADER, tuple(samples))
    left = confirmation.answerable(results)
    assert {one.task for one in left.samples} == {"half"}
    assert len(left.samples) == 4
    table = confirmation.by_task(results)
    length = f"{DENSE.length // 1024}K"
    assert f"| {length} | dense | 0.50 (2) | 0.40 (2) |" in table
    assert f"| {length} | sparse | 1.00 (2) | 1.00 (2) |" in table
