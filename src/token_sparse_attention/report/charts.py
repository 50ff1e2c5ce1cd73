"""The report's charts as inline SVG, drawn for a phone's width and scaled up elsewhere.

Colours are classes, so that the style sheet can set them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from token_sparse_attention.report.markup import Markup, tag

COLOURS = 6  # classes c0, c1, ... of the style sheet
_WIDTH = 400.0
_LETTER = 7.0  # width of a letter of the style sheet's text size, about
_LINE = 13.0
_LONGEST_LABEL = 24
_LABEL_STEPS = 6  # lines above and below a point where its label may stand


@dataclass(frozen=True)
class Point:
    """One configuration in a scatter chart.

    Attributes:
        label: stands beside it.
        x: horizontal value, 0 or more.
        y: vertical value.
        low: lower end of the interval of y, None if there is none.
        high: its upper end.
        colour: which of the `COLOURS`.
    """

    label: str
    x: float
    y: float
    low: float | None
    high: float | None
    colour: int


@dataclass(frozen=True)
class Bar:
    """One stacked bar.

    Attributes:
        label: stands before it.
        parts: name and value of what is stacked, from the left.
        total: where a mark is set; the parts need not add up to it.
        note: stands after it.
    """

    label: str
    parts: tuple[tuple[str, float], ...]
    total: float
    note: str


def svg(width: float, height: float, title: str, description: str, *shapes: Markup) -> Markup:
    """Return a drawing with a name and a description for those who do not see it."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *shapes,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
        # Small print stays small on wide screens.
        class_="narrow" if width < _WIDTH else None,
    )


def scatter(title: str, x_label: str, points: Sequence[Point], reference: Point) -> Markup:
    """Return accuracy over cost, with a dashed line at the accuracy of `reference`.

    Args:
        title: what is drawn.
        x_label: what x is.
        points: the configurations.
        reference: the dense one, drawn as a point too.
    """
    everything = [reference, *points]
    left, right, top, bottom = 42.0, _WIDTH - 12, 10.0, 240.0
    ends = [e for p in everything for e in (p.y, p.low, p.high) if e is not None]
    margin = 0.08 * (max(ends) - min(ends)) or 0.1
    y_ticks = ticks(max(min(ends) - margin, 0), min(max(ends) + margin, 1))
    x_high = 1.12 * max(p.x for p in everything) or 1.0  # room for labels on the right
    x_ticks = [x for x in ticks(0, x_high) if x <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / x_high, (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    shapes = []
    for y in y_ticks:
        shapes += [_line(left, at(0, y)[1], right, at(0, y)[1], "grid")]
        shapes += [_text(left - 5, at(0, y)[1] + 4, f"{y:.4g}", "end")]
    for x in x_ticks:
        shapes += [_line(at(x, 0)[0], top, at(x, 0)[0], bottom, "grid")]
        shapes += [_text(at(x, 0)[0], bottom + 16, f"{x:.4g}", "middle")]
    shapes += [_text((left + right) / 2, bottom + 34, x_label, "middle")]
    dense_y = at(0, reference.y)[1]
    shapes += [_line(left, dense_y, right, dense_y, "reference")]
    for point in everything:
        x, y = at(point.x, point.y)
        if point.low is not None and point.high is not None:
            low, high = at(0, point.low)[1], at(0, point.high)[1]
            shapes += [_line(x, low, x, high, f"interval s{point.colour}")]
        shapes += [_marker(x, y, point)]
    named = [(*at(p.x, p.y), p) for p in everything]
    shapes += _labels(named, left, right, top, bottom)
    described = "; ".join(f"{p.label}: {p.y:.3f} at {p.x:.3g}" for p in everything)
    return svg(_WIDTH, bottom + 42, title, f"Accuracy over {x_label}. {described}", *shapes)


def _marker(x: float, y: float, point: Point) -> Markup:
    """A shape that differs too where colours repeat or cannot be told apart."""
    name = tag("title", f"{point.label}: {point.y:.3f} at {point.x:.3g}")
    sides = point.colour % COLOURS
    if sides == 0:
        return tag("circle", name, cx=x, cy=y, r=5.0, class_=f"c{point.colour}")
    corners = []
    for corner in range(sides + 2):
        angle = 2 * math.pi * (corner / (sides + 2) - 0.25)
        corners.append(f"{x + 6 * math.cos(angle):.2f},{y + 6 * math.sin(angle):.2f}")
    return tag("polygon", name, points=" ".join(corners), class_=f"c{point.colour}")


def _labels(
    points: Sequence[tuple[float, float, Point]],
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> list[Markup]:
    """Labels beside their points, where they hide neither points nor each other."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    shapes = []
    for x, y, point in points:
        label = point.label
        if len(label) > _LONGEST_LABEL:
            label = label[: _LONGEST_LABEL - 1] + "…"
        width = _LETTER * len(label)
        boxes = []
        for step in sorted(range(-_LABEL_STEPS, _LABEL_STEPS + 1), key=abs):
            middle = y + step * _LINE
            for start in (x + 9, x - 9 - width, x - width / 2):
                start = min(max(start, left), right - width)
                box = (start, middle - _LINE / 2, start + width, middle + _LINE / 2)
                if box[1] >= top and box[3] <= bottom:
                    boxes.append(box)
        free = (box for box in boxes if not any(_overlap(box, other) for other in taken))
        box = next(free, boxes[0] if boxes else (x + 9, y - 6, x + 9 + width, y + 6))
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        if abs(middle - y) > _LINE:
            near = box[0] if abs(box[0] - x) < abs(box[2] - x) else box[2]
            shapes.append(_line(x, y, near, middle, "leader"))
        shapes.append(_text(box[0], middle + 4, label, "start", f"label c{point.colour}"))
    return shapes


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def stacked_bars(title: str, bars: Sequence[Bar], names: Sequence[str]) -> Markup:
    """Return bars of shares of a whole, with a dashed line at that whole: 100%.

    Args:
        title: what is drawn.
        bars: from the top; parts and totals as shares of the whole.
        names: of all parts there can be, which decide the colours.
    """
    left, right, top, step = 40.0, _WIDTH - 96, 6.0, 22.0
    longest = max(max(bar.total, sum(v for _, v in bar.parts)) for bar in bars)
    x_ticks = ticks(0, max(longest, 1.0))
    bottom = top + step * len(bars)

    def at(value: float) -> float:
        return left + value / x_ticks[-1] * (right - left)

    shapes = [_line(at(x), top, at(x), bottom, "grid") for x in x_ticks]
    shapes += [_text(at(x), bottom + 15, f"{x:.0%}", "middle") for x in x_ticks]
    for row, bar in enumerate(bars):
        y, start = top + row * step, 0.0
        shapes.append(_text(left - 5, y + step / 2 + 4, bar.label, "end"))
        for name, value in bar.parts:
            mouse = tag("title", f"{name}: {value:.1%} of dense")
            width = at(start + value) - at(start)
            box = {"x": at(start), "y": y + 3, "width": width, "height": step - 6}
            shapes.append(tag("rect", mouse, class_=f"c{names.index(name)}", **box))
            start += value
        shapes.append(_line(at(bar.total), y + 1, at(bar.total), y + step - 1, "total"))
    shapes.append(_line(at(1), top, at(1), bottom, "reference"))
    for row, bar in enumerate(bars):  # over the line
        after = at(max(bar.total, sum(value for _, value in bar.parts))) + 6
        shapes.append(_text(after, top + (row + 0.5) * step + 4, bar.note, "start", "label"))
    described = "; ".join(f"{bar.label} kept: {bar.total:.0%}, {bar.note}" for bar in bars)
    return svg(_WIDTH, bottom + 22, title, f"Time as a share of dense. {described}", *shapes)


def heat_map(title: str, shares: Sequence[Sequence[float] | None]) -> Markup:
    """Return the kept share by layer, from the top, and head, from the left.

    Args:
        title: what is drawn.
        shares: per layer a share for each head, or a single one for all; None for layers
            that ran dense.
    """
    columns = max((len(layer) for layer in shares if layer is not None), default=1)
    width = _WIDTH if columns > 1 else _WIDTH / 2
    left, right, top = 34.0, width - 4, 20.0 if columns > 1 else 6.0
    cell, step = (right - left) / columns, 18.0 if len(shares) <= 24 else 9.0
    shapes = []
    for head in range(0, columns, math.ceil(columns / 16)) if columns > 1 else ():
        shapes.append(_text(left + (head + 0.5) * cell, top - 6, str(head), "middle"))
    for number, layer in enumerate(shares):
        y = top + number * step
        if number % math.ceil(14 / step) == 0:
            shapes.append(_text(left - 6, y + step / 2 + 4, str(number), "end"))
        if layer is None:
            dense = {"x": left, "y": y, "width": right - left, "height": step - 1}
            shapes.append(tag("rect", tag("title", f"layer {number}: dense"), class_="d", **dense))
            if step > _LINE:
                shapes.append(_text((left + right) / 2, y + step / 2 + 4, "dense", "middle"))
            continue
        wide = cell * columns / len(layer)
        for head, share in enumerate(layer):
            who = f"layer {number}, head {head}" if len(layer) > 1 else f"layer {number}"
            box = {"x": left + head * wide, "y": y, "width": wide - 1, "height": step - 1}
            mouse = tag("title", f"{who}: {share:.1%}")
            shapes.append(tag("rect", mouse, class_="k", fill_opacity=share, **box))
            if wide >= 30 and step > _LINE:
                middle = box["x"] + wide / 2
                shapes.append(_text(middle, y + step / 2 + 4, f"{100 * share:.0f}", "middle"))
    height = top + len(shares) * step + 4
    described = "Rows are layers, columns heads; the numbers are in the table."
    return svg(width, height, title, described, *shapes)


def ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers that enclose a range.

    Example:
        >>> ticks(0.0, 0.93)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def key(entries: Iterable[tuple[str, str]]) -> Markup:
    """Return what colours stand for, from pairs of class and meaning."""
    swatches = (
        tag("span", tag("i", class_=name), meaning, class_="key") for name, meaning in entries
    )
    return tag("p", swatches, class_="keys")


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=name)


def _text(x: float, y: float, content: str, anchor: str, name: str | None = None) -> Markup:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=name)
