"""The report: one HTML file that loads nothing from the network."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.benchmark.show import COLUMNS, times
from token_sparse_attention.errors import UsageError
from token_sparse_attention.report import TITLE
from token_sparse_attention.report.accuracy import Shares, accuracy, heat_map, kept_by_layer
from token_sparse_attention.report.charts import shapes
from token_sparse_attention.report.kept_text import KeptText
from token_sparse_attention.report.load import Inputs

if TYPE_CHECKING:
    from jinja2 import Environment

LEVELS = 5  # classes h1, h2, ... of the style sheet: how many of the heads keep a token
_FOLDER = Path(__file__).parent


class _Section(NamedTuple):
    heading: str
    template: str
    content: Any


def build_page(inputs: Inputs, title: str = TITLE) -> str:
    """Return the report as an HTML document; the same inputs give the same text.

    Args:
        inputs: the results.
        title: of the page.

    Raises:
        UsageError: if jinja2 or matplotlib is not installed.
    """
    environment = _environment()
    script = _text("kept_text.js") if inputs.captures else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html.j2").render(
        title=title,
        style=_text("style.css"),
        script=script,
        script_digest=f"sha256-{digest}",
        sources=list(_sources(inputs)),
        sections=list(_sections(inputs)),
    )
    return page.lstrip() + "\n"


def _environment() -> Environment:
    """Return templates that escape every text but that of our own files and of matplotlib."""
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise UsageError(
            "tsa report needs Jinja2 and matplotlib: pip install 'token-sparse-attention[report]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = itertools.count()
    environment.filters["shapes"] = lambda chart: shapes(chart, salt=str(next(numbers)))
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,  # prompts of other scripts would double in size
        "separators": (",", ":"),
        "allow_nan": False,
    }
    return environment


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _sources(inputs: Inputs) -> Iterator[tuple[str, ...]]:
    """Yield what every file holds, and on what and by which code it was made."""
    for name, results in inputs.evaluations:
        about = f"evaluation of {results.header.arguments.get('model')}"
        yield name, about, *_origin(results.header.provenance)
    for name, kept in inputs.captures:
        about = f"kept text of {kept.arguments.get('model')}"
        yield name, about, *_origin(kept.provenance)
    for run in inputs.runs:
        about = str(run.result.arguments.get("command", "benchmark"))
        yield run.name, about, *_origin(run.result.provenance)


def _origin(provenance: Mapping[str, Any]) -> tuple[str, str, str]:
    versions, commit = provenance.get("versions"), str(provenance.get("commit"))
    found = versions.items() if isinstance(versions, dict) else ()
    return (
        str(provenance.get("device")),
        commit[:12] + ("-dirty" if commit.endswith("-dirty") else ""),
        ", ".join(f"{name} {version}" for name, version in found if version),
    )


def _sections(inputs: Inputs) -> Iterator[_Section]:
    for name, results in inputs.evaluations:
        yield _Section(f"Accuracy against speed: {name}", "accuracy.html.j2", accuracy(results))
        yield _Section(
            f"Kept tokens by layer and head: {name}",
            "kept_by_layer.html.j2",
            kept_by_layer(results),
        )
    for number, (name, kept) in enumerate(inputs.captures):
        content = _kept_text(kept, f"kept-{number}")
        yield _Section(f"Which text was kept: {name}", "kept_text.html.j2", content)
    for run in inputs.runs:
        yield _Section(f"Times: {run.name}", "times.html.j2", _times(run))


def _times(run: Run) -> dict[str, Any]:
    shape = [
        f"Batch {record.batch}, {record.num_heads} heads, {record.num_kv_heads} KV heads, head "
        f"size {record.head_dim}, {record.dtype}."
        for record in run.result.records
    ]
    return {"shapes": dict.fromkeys(shape), "columns": COLUMNS, "rows": list(times(run))}


def _kept_text(kept: KeptText, identifier: str) -> dict[str, Any]:
    """Return what ``kept_text.html.j2`` shows, and the data of its script."""
    counts = [layer.kept() for layer in kept.layers]
    shares: Shares = [[n / len(kept.tokens) for n in heads] or None for heads in counts]
    beyond = [number for number, layer in enumerate(kept.layers) if layer.beyond_window]
    length = f"{len(kept.tokens):,} tokens"
    asked = [
        (label, str(kept.arguments[entry]))
        for entry, label in (("question", "Question"), ("config_source", "Settings"))
        if kept.arguments.get(entry) is not None
    ]
    return {
        "identifier": identifier,
        "facts": [*asked, ("Reply", kept.reply), ("Prompt", length)],
        "layers": kept.layers,
        "num_heads": max(map(len, counts), default=0),
        "levels": [(f"h{n}", f"up to {n / LEVELS:.0%} of heads") for n in range(1, LEVELS + 1)],
        "data": {"tokens": kept.tokens, "layers": list(map(asdict, kept.layers))},
        "heat_map": heat_map("this prompt", shares, length, beyond),
        "reasons": [
            (str(number), layer.dense_reason)
            for number, layer in enumerate(kept.layers)
            if layer.dense_reason
        ],
    }
