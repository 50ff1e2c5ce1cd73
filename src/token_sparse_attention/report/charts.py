"""The report's charts: matplotlib figures, and their SVG for an HTML page.

Every colour in a figure stands for a custom property of the style sheet, which has one value for
a light and one for a dark page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = ("c1", "c2", "c3", "c4", "c5")
_COLOURS = ("page", "text", "line", "kept", "dense", "c0", *_SERIES)
_MARKERS = "sD^vPX"  # one more than colours, so that the pairs of both repeat only after 30
_WIDTH = 400  # a phone's, in CSS pixels; wider pages scale the SVG up
_NAME_LENGTH = 48
_TIP = "tip:"  # begins the gid of an artist that has a text for the pointer
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def colour(name: str) -> str:
    """Return the placeholder that `shapes` replaces with the style sheet's property `name`."""
    return f"#0000{_COLOURS.index(name) + 1:02x}"


_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with $ is text
    "font.size": 12,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), colour("line")),
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colour("text")
    ),
}


@dataclass(frozen=True)
class Point:
    """One configuration of a scatter chart.

    Attributes:
        name: shown in the legend.
        x: horizontal value, 0 or more.
        y: vertical value in [0, 1].
        interval: lower and upper end of the interval of y, None if there is none.
        series: number that decides colour and marker; 0 is the dense configuration's.
    """

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None
    series: int

    def __str__(self) -> str:
        return f"{self.name}: {self.y:.3f} at {self.x:.3g}"


@dataclass(frozen=True)
class Chart:
    """A figure with the texts for readers who do not see it.

    Attributes:
        title: names the chart.
        description: says what the chart shows.
        figure: the matplotlib figure.
    """

    title: str
    description: str
    figure: Figure

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels, of which an SVG of matplotlib has 72 an inch."""
        width, height = self.figure.get_size_inches() * 72
        return round(width), round(height)


@contextmanager
def _new_axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give a new figure of so many CSS pixels and its axes, in the report's style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield figure, figure.add_subplot()


def scatter(title: str, x_label: str, points: Sequence[Point], reference: Point) -> Chart:
    """Return a chart of accuracy against cost.

    Args:
        title: names the chart.
        x_label: quantity and unit of x.
        points: the configurations.
        reference: the dense configuration; a dashed line marks its accuracy.
    """
    everything = [reference, *points]
    names = [_shortened(point.name) for point in everything]
    columns = 2 if max(map(len, names)) <= 20 else 1
    with _new_axes(_WIDTH, 280 + 18 * math.ceil(len(names) / columns)) as (figure, axes):
        axes.axhline(reference.y, color=colour("text"), linestyle="--", clip_on=False)
        markers = []
        for point in everything:
            series, marker = _look(point.series)
            if point.interval is not None:
                axes.vlines(point.x, *point.interval, color=series, alpha=0.55, linewidth=2)
            markers += axes.plot(
                *(point.x, point.y, marker),
                color=series,
                markersize=9,
                clip_on=False,
                zorder=3,
                gid=_tip(str(point)),
            )
        ends = [end for p in everything for end in (p.y, *(p.interval or ()))]
        margin = 0.08 * (max(ends) - min(ends)) or 0.1
        axes.set_ylim(max(min(ends) - margin, 0), min(max(ends) + margin, 1))
        axes.set_xlim(0, 1.05 * max(point.x for point in everything) or 1)
        axes.locator_params(nbins=6)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        figure.legend(markers, names, loc="outside lower left", ncols=columns, handlelength=1)
    described = "; ".join(map(str, everything))
    return Chart(title, f"Accuracy against {x_label}. {described}", figure)


def _look(series: int) -> tuple[str, str]:
    """Return a series' colour and marker."""
    if series == 0:
        return colour("c0"), "o"
    return colour(_SERIES[series % len(_SERIES)]), _MARKERS[series % len(_MARKERS)]


def heat_map(title: str, shares: Sequence[Sequence[float] | None]) -> Chart:
    """Return the kept share of every layer, from the top, and head, from the left.

    Args:
        title: names the chart.
        shares: per layer a share for each head, or a single one for all; None for layers
            that ran dense.
    """
    columns = max((len(heads) for heads in shares if heads is not None), default=1)
    width = _WIDTH if columns > 1 else _WIDTH // 2
    step = 18 if len(shares) <= 24 else 9  # pixels of a layer
    with _new_axes(width, step * len(shares) + 34) as (figure, axes):
        for layer, heads in enumerate(shares):
            # Per cell its colour, its label, and the exact share.
            filled: list[tuple[Any, str, str]] = [
                ((colour("kept"), share), f"{100 * share:.0f}", f"{share:.1%}")
                for share in heads or ()
            ]
            fills, labels, exact = zip(*(filled or [(colour("dense"), "dense", "dense")]))
            count = len(fills)
            cells = axes.barh(
                [layer] * count,
                columns / count,
                left=[columns * head / count for head in range(count)],
                height=1,
                color=fills,
                edgecolor=colour("page"),
            )
            for head, (cell, share) in enumerate(zip(cells, exact)):
                where = f"layer {layer}" + (f", head {head}" if count > 1 else "")
                cell.set_gid(_tip(f"{where}: {share}"))
            if step > 12 and width / count >= 34:  # a label fits
                axes.bar_label(cells, labels, label_type="center")
        axes.set(xlim=(0, columns), ylim=(len(shares) - 0.5, -0.5))
        axes.spines[:].set_visible(False)
        axes.xaxis.tick_top()
        shown = range(0, columns, math.ceil(columns / 16)) if columns > 1 else ()
        axes.set_xticks([head + 0.5 for head in shown], list(map(str, shown)))
        axes.set_yticks(range(0, len(shares), math.ceil(14 / step)))
    described = "Rows are layers, columns heads; the numbers are in the table."
    return Chart(title, described, figure)


def _clean(text: str) -> str:
    """Return text for one line of XML; names in result files may hold whatever JSON may."""
    return " ".join(_NOT_XML.sub("\ufffd", text).split())


def _shortened(name: str) -> str:
    name = _clean(name)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _tip(text: str) -> str:
    return _TIP + _clean(text)


def shapes(chart: Chart, salt: str) -> str:
    """Return what stands inside a chart's ``svg`` element on an HTML page.

    Args:
        chart: the chart.
        salt: must differ between the charts of a page, so that their identifiers do. The same
            chart and salt give the same text.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        # The reader's fonts have the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        chart.figure.savefig(buffer, format="svg", metadata={"Date": None})
    content = buffer.getvalue()
    inside = content[content.index('<g id="figure_1"') : content.rindex("</svg>")]
    return re.sub("<[^<>]+>", _adapted, inside)  # tags alone: their attributes hold no < or >


def _adapted(match: re.Match[str]) -> str:
    """Return a tag of matplotlib's SVG file as the report's page needs it."""
    tag = match[0]
    if tag.startswith(f'<g id="{_TIP}'):
        return f"<g><title>{tag[len(_TIP) + 7 : -2]}</title>"
    tag = re.sub(r' id="[\w.]+_\d+"', "", tag)  # nothing refers to it, and every chart has it
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    tag = re.sub("font-family: [^;]*; ", "", tag)  # the page's own
    tag = tag.replace("xlink:href", "href")
    return re.sub(r"#0000(\w\w)", lambda code: f"var(--{_COLOURS[int(code[1], 16) - 1]})", tag)
