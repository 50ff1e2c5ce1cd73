"""Where the charts put things."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.pages import Page, overlapping
from token_sparse_attention.report.charts import Bar, Point, heat_map, scatter, stacked_bars, ticks

units = st.floats(0, 1)


def numbers(attributes, *names):
    return [float(attributes[name]) for name in names]


def labels_of(page):
    return [found for found in page.find("text") if "label" in found[0].get("class", "")]


def centre(attributes):
    corners = [pair.split(",") for pair in attributes["points"].split()]
    xs, ys = zip(*((float(x), float(y)) for x, y in corners))
    return sum(xs) / len(xs), sum(ys) / len(ys)


@given(st.floats(0, 1e4), st.floats(1e-3, 1e4))
def test_ticks_enclose_the_range_in_few_even_steps(low, width):
    found = ticks(low, low + width)
    assert found[0] <= low + 1e-6 * width
    assert found[-1] >= low + width * (1 - 1e-6)
    assert 2 <= len(found) <= 7
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


DENSE = Point("dense", 1.0, 0.8, None, None, 0)


@given(st.lists(st.tuples(units, units, units, units), min_size=1, max_size=8))
def test_scatter_keeps_the_order_of_values_and_stays_inside(values):
    points = [
        Point(f"configuration {n}", x, y, min(y, a), max(y, b), 1 + n % 5)
        for n, (x, y, a, b) in enumerate(values)
    ]
    page = Page(scatter("title", "work", points, DENSE))
    height = float(page.find("svg")[0][0]["viewbox"].split()[3])
    placed = [centre(attributes) for attributes, _ in page.find("polygon")]
    assert len(placed) == len(points)
    assert all(0 < x < 400 and 0 < y < height for x, y in placed)
    for (x, y), point in zip(placed, points):
        for (other_x, other_y), other in zip(placed, points):
            if point.x > other.x + 0.01:
                assert x > other_x
            if point.y > other.y + 0.01:
                assert y < other_y  # SVG counts downwards
    (line, _), *_ = page.find("line", **{"class": "reference"})
    circle = page.find("circle")[0][0]
    assert line["y1"] == line["y2"] == circle["cy"]
    labels = labels_of(page)
    assert {text for _, text in labels} == {"dense", *(point.label for point in points)}
    for attributes, text in labels:
        start, y = numbers(attributes, "x", "y")
        assert start >= 0
        assert start + 6 * len(text) <= 400
        assert 0 < y < height


def test_labels_of_close_points_do_not_overlap():
    points = [Point(f"settings {n}", 0.9 + n / 500, 0.8, 0.7, 0.9, n) for n in range(1, 6)]
    page = Page(scatter("title", "work", points, DENSE))
    by_line: dict[str, list[tuple[float, float]]] = {}
    for attributes, text in labels_of(page):
        start = float(attributes["x"])
        by_line.setdefault(attributes["y"], []).append((start, start + 6 * len(text)))
    assert sum(map(len, by_line.values())) == 6
    assert not any(map(overlapping, by_line.values()))


def test_interval_spans_its_values():
    page = Page(scatter("title", "work", [Point("a", 0.5, 0.5, 0.25, 1.0, 2)], DENSE))
    interval = page.find("line", **{"class": "interval s2"})[0][0]
    top, bottom = numbers(interval, "y2", "y1")
    _, y = centre(page.find("polygon")[0][0])
    dense = float(page.find("circle")[0][0]["cy"])
    assert (bottom - y) / (y - top) == pytest.approx(0.25 / 0.5, rel=1e-2)
    assert (bottom - dense) / (dense - top) == pytest.approx(0.55 / 0.2, rel=1e-2)


def test_long_names_are_shortened_but_told_in_full():
    name = "a configuration with a very long name"
    page = Page(scatter("title", "work", [Point(name, 0.1, 0.5, None, None, 1)], DENSE))
    assert name not in [text for _, text in page.find("text")]
    assert any(text.startswith(name) for _, text in page.find("title"))


def test_bars_are_as_wide_as_their_shares():
    parts = (("a", 0.25), ("b", 0.5))
    bars = [Bar("50%", parts, 1.0, "note"), Bar("20%", (("a", 0.5), ("b", 0.5)), 1.5, "slow")]
    page = Page(stacked_bars("title", bars, ("a", "b")))
    boxes = [numbers(attributes, "x", "y", "width") for attributes, _ in page.find("rect")]
    first, second, third, _ = boxes
    assert second[2] == pytest.approx(2 * first[2], abs=0.05)
    assert third[2] == pytest.approx(second[2], abs=0.05)
    assert second[0] == pytest.approx(first[0] + first[2], abs=0.05)
    assert first[1] == second[1] < third[1]
    reference = float(page.find("line", **{"class": "reference"})[0][0]["x1"])
    totals = [float(a["x1"]) for a, _ in page.find("line", **{"class": "total"})]
    assert totals[0] == reference < totals[1]
    classes = [attributes["class"] for attributes, _ in page.find("rect")]
    assert classes == ["c0", "c1", "c0", "c1"]


def test_heat_map_has_a_cell_per_head_as_strong_as_its_share():
    page = Page(heat_map("title", [[0.25, 0.5, 0.75, 1.0], None, [0.4]]))
    cells = page.find("rect", **{"class": "k"})
    assert [float(a["fill-opacity"]) for a, _ in cells] == [0.25, 0.5, 0.75, 1.0, 0.4]
    widths = [float(a["width"]) + 1 for a, _ in cells]
    assert widths[4] == pytest.approx(4 * widths[0], abs=0.1)
    assert len(page.find("rect", **{"class": "d"})) == 1
    assert [text for _, text in cells][3:] == ["layer 0, head 3: 100.0%", "layer 2: 40.0%"]
    shown = [text for _, text in page.find("text")]
    assert {"25", "100", "40", "dense"} <= set(shown)


@pytest.mark.parametrize(("layers", "heads"), [(32, 32), (80, 64), (1, 1)])
def test_heat_maps_of_any_model_stay_inside(layers, heads):
    page = Page(heat_map("title", [[0.5] * heads] * layers))
    width, height = map(float, page.find("svg")[0][0]["viewbox"].split()[2:])
    for attributes, _ in page.find("rect"):
        x, y, w, h = numbers(attributes, "x", "y", "width", "height")
        assert w > 0
        assert h > 0
        assert x + w <= width
        assert y + h <= height
    labels = [float(a["y"]) for a, _ in page.find("text", **{"text-anchor": "end"})]
    assert not re.search("nan|inf", str(labels))
    assert not overlapping([(y, y + 8.5) for y in labels])
