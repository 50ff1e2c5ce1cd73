"""HTML and SVG in which text is escaped unless it is known to be markup."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""

    __slots__ = ()


Child = str | Iterable[str]


def tag(name: str, *children: Child, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: the element's name.
        children: text, `Markup`, or iterables of them.
        attributes: ``class_`` gives ``class`` and ``fill_opacity`` ``fill-opacity``; a float
            gets two decimals, and None leaves the attribute out.

    Example:
        >>> tag("p", "1 < 2", tag("b", "!"), class_="note")
        '<p class="note">1 &lt; 2<b>!</b></p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Return the children one after the other, escaped where they are no markup."""
    return Markup("".join(_flat(child) for child in children))


def _flat(child: Child) -> str:
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return html.escape(child)
    return "".join(_flat(part) for part in child)


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, prose: bool = False
) -> Markup:
    """Return a table that scrolls sideways where it does not fit; first cells head the rows.

    With `prose`, the text of last cells may take several lines.
    """
    body = [
        tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in rest])
        for first, *rest in rows
    ]
    head = tag("tr", [tag("th", cell, scope="col") for cell in header])
    parts = (tag("caption", caption), tag("thead", head), tag("tbody", body))
    content = tag("table", *parts, class_="prose" if prose else None)
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def folded(summary: str, *children: Child) -> Markup:
    """Return content that is shown on demand."""
    return tag("details", tag("summary", summary), *children)


def data_block(content: Any, name: str) -> Markup:
    """Return JSON that a script finds by its id, and that cannot end its own element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Markup(text), type="application/json", id=name)
