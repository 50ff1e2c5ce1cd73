"""What `apply` makes of each family of models, and the ways to run them, for docs/supported.md.

`tests/integrations/matrix.py` measures, and writes a file for each version of transformers;
tests compare what they measure with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import NONE, Page, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "families"
HEAD = ["family", "sparse", "dense, and why", "no attention"]
REFUSED = "refused"
"""Stands for a kind of layer where `apply` refuses the model."""


def pages() -> list[Page]:
    """Return the page, made from `RESULTS`, whose first file is shown whole."""
    first, *later = (
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))
    )
    tables = {
        "families": families(first) + "".join(changes(first, other) for other in later),
        "modes": modes(first),
    }
    return [Page(ROOT / "docs" / "supported.md", tables)]


def families(content: dict[str, Any]) -> str:
    """Return which layers of each family run sparse, and why the others do not."""
    rows = [_row(family, kinds) for family, kinds in content["families"].items()]
    return f"With transformers {content['transformers']}:\n\n" + markdown_table([HEAD, *rows])


def changes(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the rows of `families` that another version of transformers changes."""
    version = other["transformers"]
    rows = [
        _row(family, kinds)
        for family, kinds in other["families"].items()
        if kinds != first["families"][family]
    ]
    if not rows:
        return f"\nWith transformers {version} the same.\n"
    return f"\nWith transformers {version}, other than that:\n\n" + markdown_table([HEAD, *rows])


def _row(family: str, kinds: dict[str, str]) -> list[str]:
    if REFUSED in kinds:
        return [family, NONE, f"refused: {kinds[REFUSED]}", NONE]
    by_state: dict[str, list[str]] = {"sparse": [], "dense": [], "no attention": []}
    for kind, said in kinds.items():
        name = "all" if len(kinds) == 1 else kind.removesuffix("_attention").replace("_", " ")
        if said in by_state:
            by_state[said].append(name)
        else:
            by_state["dense"].append(f"{name}: {said}")
    return [family, *("; ".join(cell) or NONE for cell in by_state.values())]


def modes(content: dict[str, Any]) -> str:
    """Return the ways to run a model, and which families transformers does not run so."""
    served = sum(REFUSED not in kinds for kinds in content["families"].values())
    lines = [["way to run a model", "families", "not offered by transformers for"]]
    for mode, without in content["not_offered"].items():
        lines.append([mode, str(served - len(without)), ", ".join(without) or NONE])
    return markdown_table(lines)
