"""What the charts plot, read from the figures, and what their SVG says."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from report.pages import Page
from token_sparse_attention.report.charts import (
    Chart,
    Point,
    colour,
    heat_map,
    scatter,
    shapes,
)

units = st.floats(0, 1)
DENSE = Point("dense", 1.0, 0.8, None, 0)


def tipped(artists) -> dict[str, object]:
    """The artists that have a text for the pointer, by that text."""
    found = {artist.get_gid(): artist for artist in artists}
    return {gid.removeprefix("tip:"): artist for gid, artist in found.items() if gid}


def markers_of(chart: Chart) -> list[tuple[float, float]]:
    lines = tipped(chart.figure.axes[0].lines).values()
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def intervals_of(chart: Chart) -> list[list[tuple[float, float]]]:
    (axes,) = chart.figure.axes
    return [[tuple(end) for end in c.get_segments()[0]] for c in axes.collections]


def legend_of(chart: Chart) -> list[str]:
    return [text.get_text() for text in chart.figure.legends[0].get_texts()]


@settings(max_examples=20)
@given(st.lists(st.tuples(units, units, units, units), min_size=1, max_size=8))
def test_scatter_plots_every_value_inside_the_picture(values):
    points = [
        Point(f"configuration {n}", x, y, (min(y, a), max(y, b)), 1 + n)
        for n, (x, y, a, b) in enumerate(values)
    ]
    chart = scatter("title", "work", points, DENSE)
    (axes,) = chart.figure.axes
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout without room is a warning
        svg = shapes(chart, "salt")
    assert [*tipped(axes.lines)] == [*dict.fromkeys(map(str, (DENSE, *points)))]
    assert set(markers_of(chart)) == {(p.x, p.y) for p in (DENSE, *points)}
    assert intervals_of(chart) == [[(p.x, p.interval[0]), (p.x, p.interval[1])] for p in points]
    reference = next(line for line in axes.lines if line.get_gid() is None)
    assert list(reference.get_ydata()) == [DENSE.y, DENSE.y]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for point in (DENSE, *points):
        assert left == 0 <= point.x < right
        for y in (point.y, *(point.interval or ())):
            assert 0 <= bottom <= y <= top <= 1
    assert legend_of(chart) == ["dense", *(point.name for point in points)]
    picture, inside = chart.figure.bbox, chart.figure.legends[0].get_window_extent()
    for box in (inside, axes.get_tightbbox()):
        assert picture.x0 <= box.x0
        assert box.x1 <= picture.x1
        assert picture.y0 <= box.y0
        assert box.y1 <= picture.y1
    assert inside.y1 <= axes.get_tightbbox().y0
    assert {text for _, text in Page(svg).find("text")} >= set(legend_of(chart))


def test_configurations_look_different():
    points = [Point(str(n), 0.5, 0.5, None, n) for n in range(1, 31)]
    (axes,) = scatter("title", "work", points, DENSE).figure.axes
    looks = {(to_hex(line.get_color()), line.get_marker()) for line in tipped(axes.lines).values()}
    assert len(looks) == 31


def test_long_names_are_shortened_but_told_in_full():
    name = "a configuration with a name that is very long for a legend"
    chart = scatter("title", "work", [Point(name, 0.1, 0.5, None, 1)], DENSE)
    page = Page(shapes(chart, "salt"))
    shown = [text for _, text in page.find("text")]
    assert name not in shown
    assert any(name.startswith(text.removesuffix("…")) for text in shown if text.endswith("…"))
    assert f"{name}: 0.500 at 0.1" in [text for _, text in page.find("title")]
    assert name in chart.description


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$x_{1}$ and $", None),
        ("_underscore", None),
        ("</text><script>&amp;\"'", None),
        ("配置 🦙 ∑", None),
        ("two\nlines\x00\x1b\ud800", "two lines\ufffd\ufffd\ufffd"),
    ],
)
def test_names_are_text(name, shown):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = shapes(scatter("t", "work", [Point(name, 0.1, 0.5, None, 1)], DENSE), "salt")
    page = Page(svg)
    assert (shown or name) in [text for _, text in page.find("text")]
    assert f"{shown or name}: 0.500 at 0.1" in [text for _, text in page.find("title")]
    assert not page.find("script")


def test_colours_are_those_of_the_style_sheet():
    point = Point("a", 0.5, 0.5, (0.25, 1.0), 2)
    svg = shapes(scatter("title", "work", [point], DENSE), "salt")
    for name in ("c0", "c3", "text", "line"):
        assert f"var(--{name})" in svg
    svg = shapes(heat_map("title", [[0.5], None]), "salt")
    for name in ("kept", "dense", "page"):
        assert f"var(--{name})" in svg
    assert "#" not in svg.replace("url(#", "")


def test_shapes_depend_on_the_salt_alone():
    svg, again, other = (shapes(heat_map("title", [[0.5]]), salt) for salt in ("1", "1", "2"))
    assert svg == again
    found = [
        {attributes["id"] for _, attributes, _ in Page(of).elements if "id" in attributes}
        for of in (svg, other)
    ]
    assert found[0]
    assert not found[0] & found[1]


def test_heat_map_has_a_cell_per_head_as_strong_as_its_share():
    chart = heat_map("title", [[0.25, 0.5, 0.75, 1.0], None, [0.4]])
    (axes,) = chart.figure.axes
    cells = tipped(axes.patches)
    assert [*cells][3:] == ["layer 0, head 3: 100.0%", "layer 1: dense", "layer 2: 40.0%"]
    kept = [cell for cell in cells.values() if cell.get_facecolor()[:3] != (0, 0, 5 / 255)]
    assert [to_hex(cell.get_facecolor()) for cell in kept] == [colour("kept")] * 5
    assert [cell.get_facecolor()[3] for cell in kept] == [0.25, 0.5, 0.75, 1.0, 0.4]
    (dense,) = (cell for cell in cells.values() if cell not in kept)
    assert to_hex(dense.get_facecolor()) == colour("dense")
    boxes = [(*cell.get_xy(), cell.get_width()) for cell in cells.values()]
    assert boxes == [
        *((head, -0.5, 1.0) for head in range(4)),
        (0, 0.5, 4.0),
        (0, 1.5, 4.0),
    ]
    assert axes.yaxis_inverted()
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["25", "50", "75", "100", "dense", "40"]


@pytest.mark.parametrize(("layers", "heads"), [(32, 32), (80, 64), (1, 1)])
def test_heat_maps_of_any_model_stay_inside(layers, heads):
    chart = heat_map("title", [[0.5] * heads] * layers)
    shapes(chart, "salt")  # which lays the chart out
    (axes,) = chart.figure.axes
    assert len(tipped(axes.patches)) == layers * heads
    box, picture = axes.get_tightbbox(), chart.figure.bbox
    assert picture.x0 <= box.x0 < box.x1 <= picture.x1
    assert picture.y0 <= box.y0 < box.y1 <= picture.y1
    for axis in (axes.xaxis, axes.yaxis):
        drawn = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert not any(a.overlaps(b) for a, b in pairwise(drawn))
    assert chart.size[0] == (200 if heads == 1 else 400)
