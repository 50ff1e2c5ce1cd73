"""Text that would do harm, in the place of every entry of a file that `tsa report` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cli.commands import run
from evaluation.results import DENSE, HEADER, SPARSE
from report.pages import HOSTILE, KEPT
from studies.synthetic import op_result
from token_sparse_attention.errors import UsageError
from token_sparse_attention.records import encode

FILES = {"results": [HEADER, DENSE, SPARSE], "capture": [KEPT], "benchmark": [op_result()]}
FEW = 2  # entries of a list that are tried


def hostile(content: Any) -> Iterator[Any]:
    """Yield JSON with one value, or one name, replaced; of lists the first entries alone."""
    if isinstance(content, dict):
        for name, value in content.items():
            others = {key: other for key, other in content.items() if key != name}
            yield others | {HOSTILE: value}
            for changed in hostile(value):
                yield others | {name: changed}
    elif isinstance(content, list):
        for index, value in enumerate(content[:FEW]):
            for changed in hostile(value):
                yield [*content[:index], changed, *content[index + 1 :]]
    yield HOSTILE


@pytest.mark.parametrize("kind", FILES)
def test_every_entry_is_refused_or_escaped(kind, tmp_path):
    lines = [json.loads(encode(line)) for line in FILES[kind]]
    file, page, shown = tmp_path / "file.json", tmp_path / "page.html", 0
    for number, line in enumerate(lines):
        for changed in hostile(line):
            content = [*lines[:number], changed, *lines[number + 1 :]]
            file.write_text("".join(json.dumps(entry) + "\n" for entry in content))
            try:
                run("report", file, "--out", page)
            except UsageError:
                continue
            text = page.read_text()
            assert "<script>document" not in text, changed
            assert "<img src=x" not in text, changed
            shown += "document.title" in text
    assert shown > 3, "some are shown, escaped"
