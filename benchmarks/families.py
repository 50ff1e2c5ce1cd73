"""What `apply` makes of each family of models, and the ways to run them, for docs/supported.md.

`tests/integrations/matrix.py` measures and writes the result file; a test compares the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import NONE, Page, markdown_table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "families" / "tiny-cpu.json"
REFUSED = "refused"
"""Stands for a kind of layer where `apply` refuses the model."""


def pages() -> list[Page]:
    """Return the page, made from `RESULT`."""
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    tables = {"families": families(content), "modes": modes(content)}
    return [Page(ROOT / "docs" / "supported.md", tables)]


def families(content: dict[str, Any]) -> str:
    """Return which layers of each family run sparse, and why the others do not."""
    lines = [["family", "sparse", "dense, and why", "no attention"]]
    for family, kinds in content["families"].items():
        if REFUSED in kinds:
            lines.append([family, NONE, f"refused: {kinds[REFUSED]}", NONE])
            continue
        by_state: dict[str, list[str]] = {"sparse": [], "no attention": [], "dense": []}
        for kind, said in kinds.items():
            name = "all" if len(kinds) == 1 else kind.removesuffix("_attention").replace("_", " ")
            if said in by_state:
                by_state[said].append(name)
            else:
                by_state["dense"].append(f"{name}: {said}")
        cells = (by_state[state] for state in ("sparse", "dense", "no attention"))
        lines.append([family, *("; ".join(cell) or NONE for cell in cells)])
    return f"With transformers {content['transformers']}:\n\n" + markdown_table(lines)


def modes(content: dict[str, Any]) -> str:
    """Return the ways to run a model, and which families transformers does not run so."""
    served = sum(REFUSED not in kinds for kinds in content["families"].values())
    lines = [["way to run a model", "families", "not offered by transformers for"]]
    for mode, without in content["not_offered"].items():
        lines.append([mode, str(served - len(without)), ", ".join(without) or NONE])
    return markdown_table(lines)
