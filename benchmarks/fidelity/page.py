"""The page of how designs of block-wise samples compare."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.fidelity.table import show
from benchmarks.markdown import Page

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "fidelity" / "qwen2.5-coder-0.5b-h200.json"


def pages() -> list[Page]:
    """Return the page, made from `RESULTS`."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    return [Page(FOLDER / "README.md", {"variants": show(content["rows"])})]
