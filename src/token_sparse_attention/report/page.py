"""The whole report: one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from token_sparse_attention.benchmark.show import COLUMNS, times
from token_sparse_attention.report import charts
from token_sparse_attention.report.accuracy import (
    BESIDE_WINDOW,
    Shares,
    accuracy,
    heat_figure,
    kept_by_layer,
)
from token_sparse_attention.report.kept_text import KeptText
from token_sparse_attention.report.load import Inputs
from token_sparse_attention.report.markup import (
    Markup,
    data_block,
    folded,
    join,
    table,
    tag,
)

TITLE = "Token sparse attention: report"
LEVELS = 5  # classes h1, h2, ...: how many of the heads keep a token
_FOLDER = Path(__file__).parent
_Section = tuple[str, Markup]


def build_page(inputs: Inputs, title: str = TITLE) -> str:
    """Return the report as an HTML document; the same inputs give the same text."""
    sections = [
        *_evaluation_sections(inputs),
        *_capture_sections(inputs),
        *(
            (f"Times: {run.name}", table("Milliseconds", COLUMNS, times(run)))
            for run in inputs.runs
        ),
    ]
    links = [
        tag("li", tag("a", heading, href=f"#part-{number}"))
        for number, (heading, _) in enumerate(sections)
    ]
    parts = [
        tag("section", tag("h2", heading, id=f"part-{number}"), content)
        for number, (heading, content) in enumerate(sections)
    ]
    body = join(
        tag("header", tag("h1", title), _sources(inputs)),
        tag("nav", tag("ul", links), aria_label="Contents"),
        tag("main", parts),
    )
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    script = (_FOLDER / "kept_text.js").read_text(encoding="utf-8") if inputs.captures else ""
    return _document(title, style, script, body)


def _document(title: str, style: str, script: str, body: Markup) -> str:
    # The policy lets only this very script run, and nothing be loaded, whatever the texts hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(style)),
    )
    end = tag("script", Markup(script)) if script else ""
    page = tag("html", tag("head", head), tag("body", body, end), lang="en")
    return f"<!doctype html>\n{page}\n"


def _sources(inputs: Inputs) -> Markup:
    """Where every result comes from."""
    rows: list[tuple[str, ...]] = []
    for name, results in inputs.evaluations:
        about = f"evaluation of {results.header.arguments.get('model')}"
        rows.append((name, about, *_origin(results.header.provenance)))
    for name, kept in inputs.captures:
        about = f"kept text of {kept.arguments.get('model')}"
        rows.append((name, about, *_origin(kept.provenance)))
    for run in inputs.runs:
        about = str(run.result.arguments.get("command", "benchmark"))
        rows.append((run.name, about, *_origin(run.result.provenance)))
    return table("Sources", ("file", "what", "device", "commit", "versions"), rows, prose=True)


def _origin(provenance: Mapping[str, Any]) -> tuple[str, str, str]:
    versions, commit = provenance.get("versions"), str(provenance.get("commit"))
    found = versions.items() if isinstance(versions, dict) else ()
    return (
        str(provenance.get("device")),
        commit[:12] + ("-dirty" if commit.endswith("-dirty") else ""),
        ", ".join(f"{name} {version}" for name, version in found if version),
    )


def _evaluation_sections(inputs: Inputs) -> Iterator[_Section]:
    for name, results in inputs.evaluations:
        yield f"Accuracy against speed: {name}", accuracy(results)
        yield f"Kept tokens by layer and head: {name}", kept_by_layer(results)


def _capture_sections(inputs: Inputs) -> Iterator[_Section]:
    for number, (name, kept) in enumerate(inputs.captures):
        yield f"Which text was kept: {name}", _kept_text(kept, f"kept-{number}")


def _kept_text(kept: KeptText, name: str) -> Markup:
    """The prompt with its kept tokens marked; the script fills what is empty here."""
    layers = [
        tag("option", f"{n}: dense" if layer.dense_reason else str(n), value=n)
        for n, layer in enumerate(kept.layers)
    ]
    heads = max((len(layer.masks) for layer in kept.layers), default=0)
    choices = [
        tag("option", "all heads", value=-1),
        *(tag("option", str(n), value=n) for n in range(heads)),
    ]
    beside = any(layer.beside_window for layer in kept.layers)
    levels = [(f"h{n}", f"up to {n / LEVELS:.0%} of heads") for n in range(1, LEVELS + 1)]
    data = {
        "tokens": kept.tokens,
        "layers": [
            {
                "masks": layer.masks,
                "denseReason": layer.dense_reason,
                "besideWindow": layer.beside_window,
            }
            for layer in kept.layers
        ],
    }
    asked = [
        (label, str(kept.arguments[entry]))
        for entry, label in (("question", "Question"), ("config_source", "Settings"))
        if kept.arguments.get(entry) is not None
    ]
    facts = [*asked, ("Reply", kept.reply), ("Prompt", f"{len(kept.tokens):,} tokens")]
    viewer = tag(
        "div",
        tag(
            "p",
            tag("label", "Layer ", tag("select", layers, class_="layer")),
            " ",
            tag("label", "Head ", tag("select", choices, class_="head")),
            class_="choices",
        ),
        tag("p", "Showing this needs JavaScript.", class_="status", role="status"),
        charts.key(levels),
        tag("div", class_="prompt", tabindex=0, role="region", aria_label="Prompt"),
        class_="kept-text",
        data_source=name,
    )
    return join(
        tag("dl", [join(tag("dt", label), tag("dd", text)) for label, text in facts]),
        tag(
            "p",
            "Highlighted text was kept by the chosen head, or by so many of all heads; dimmed "
            "text by none.",
            f" {BESIDE_WINDOW}" if beside else "",
        ),
        viewer,
        data_block(data, name),
        _kept_by_layer(kept),
    )


def _kept_by_layer(kept: KeptText) -> Markup:
    counts = [layer.kept() for layer in kept.layers]
    shares: Shares = [[n / len(kept.tokens) for n in heads] or None for heads in counts]
    reasons = [
        (str(number), layer.dense_reason)
        for number, layer in enumerate(kept.layers)
        if layer.dense_reason
    ]
    dense = table("Layers that ran dense", ("layer", "reason"), reasons, prose=True)
    beside = [number for number, layer in enumerate(kept.layers) if layer.beside_window]
    figure = heat_figure("this prompt", shares, f"{len(kept.tokens):,} tokens", beside)
    return folded("Kept share by layer and head", figure, dense if reasons else "")
