"""The table of every question, from made-up results."""

from __future__ import annotations

import dataclasses

from benchmarks.frontier import questions

from evaluation.results import HEADER, pair, results
from token_sparse_attention.evaluation.record import EvalResults

OTHER = HEADER.configurations["sparse"]


def row(table: str, start: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_point_stands_beside_dense_at_every_length():
    short = [one for index in range(4) for one in pair(1.0, 0.5, length=1024, index=index)]
    long = [one for index in range(2) for one in pair(0.5, 0.5, length=2048, index=index)]
    arguments = HEADER.arguments | {"variants": {"sparse": {"spread": 3}}}
    header = dataclasses.replace(HEADER, arguments=arguments)
    some = EvalResults(header, (*short, *long))
    told = []

    def describe(settings, variant):
        told.append((settings["drop_mass"], variant))
        return "words"

    table = questions.table(some, describe)
    assert told == [(0.005, {"spread": 3})]
    assert row(table, "point")[2:] == ["1K", "2K", "n, 2K", "work, 2K"]
    assert row(table, "dense")[2:5] == ["1.000 of 4 prompts", "0.500 of 2 prompts", "2"]
    _, words, first, second, n, work = row(table, "sparse")
    assert words == "words"
    assert first.startswith("-0.500 (-")
    assert second.startswith("+0.000 (-")
    assert (n, work) == ("2", "63%")


def test_what_a_length_lacks_is_left_open():
    dense, _ = pair(1.0, 1.0, length=2048)
    table = questions.table(results(*pair(1.0, 1.0, length=1024), dense), lambda *_: "words")
    assert row(table, "sparse")[3:] == ["-", "-", "-"]


def test_two_points_are_compared_on_the_prompts_of_both():
    _, first = pair(1.0, 0.25)
    _, second = pair(1.0, 0.5, index=1)
    points = {"per-head": OTHER, "window-512": OTHER}
    header = dataclasses.replace(HEADER, configurations=HEADER.configurations | points)
    samples = [dataclasses.replace(one, configuration="window-512") for one in (first, second)]
    samples.append(dataclasses.replace(first, configuration="per-head", score=0.75))
    table = questions.compared(EvalResults(header, tuple(samples)))
    assert row(table, "budgets per head")[1].startswith("+0.500 (")
    assert row(table, "budgets per head")[1].endswith("; 1)")
    assert row(table, "values' norms")[1] == "-"


def test_the_figure_shows_the_results_and_nothing_else(tmp_path):
    some = results(*pair(1.0, 0.5, length=1024), *pair(1.0, 1.0, length=2048))
    other = results(*pair(1.0, 0.75, length=1024), *pair(1.0, 1.0, length=2048))
    drawn = []
    for name, of in (("one", some), ("again", some), ("other", other)):
        path = tmp_path / name / "figure.svg"
        path.parent.mkdir()
        questions.draw(of, path)
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
