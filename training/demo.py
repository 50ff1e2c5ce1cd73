"""Make the bundled demo document: a real page of documentation with six marked needles."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import corpus

_FIRST = "Overview"
_TITLE = "How To Corrupt An SQLite Database File"
_LAST_MODIFIED = "This page last modified"
_NEEDLES = (
    ("amber-falcon", "4839201", 0.05),
    ("quiet-harbor", "7150468", 0.23),
    ("copper-lantern", "2963574", 0.41),
    ("northern-orchard", "8027316", 0.59),
    ("velvet-compass", "5618940", 0.77),
    ("silver-meadow", "3472859", 0.95),
)
"""Key, value and depth (share of the document's characters that stand before the line)."""


def make_document(blocks: list[str]) -> tuple[str, list[dict[str, str | float]]]:
    """Put each needle at the paragraph break nearest to its depth."""
    body = blocks[blocks.index(_FIRST) :]
    paragraphs = [_TITLE, *(block for block in body if not block.startswith(_LAST_MODIFIED))]
    total = sum(len(paragraph) + 2 for paragraph in paragraphs)
    for number, (key, value, depth) in reversed(list(enumerate(_NEEDLES, start=1))):
        starts = [sum(len(p) + 2 for p in paragraphs[:at]) for at in range(1, len(paragraphs) + 1)]
        place = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * total)) + 1
        paragraphs.insert(place, _line(number, key, value))
    document = "\n\n".join(paragraphs) + "\n"
    needles: list[dict[str, str | float]] = []
    for number, (key, value, _) in enumerate(_NEEDLES, start=1):
        line = _line(number, key, value)
        needles.append(
            {
                "key": key,
                "value": value,
                "depth": round(document.index(line) / len(document), 3),
                "line": line,
                "question": "What is the special magic number for"
                f" {key} mentioned in the provided text?",
                "answer": value,
            }
        )
    return document, needles


def _line(number: int, key: str, value: str) -> str:
    return f"[needle {number}] One of the special magic numbers for {key} is: {value}."


def main() -> None:
    """Write document.txt and needles.json."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo",
        description="Make the demo document from a page of Debian's sqlite3-doc.",
        epilog="example: python -m training.demo --packages build/model/packages"
        " --out src/token_sparse_attention/bundled/demo",
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder of Debian packages")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    corpus.fetch(args.packages)
    document, needles = make_document(corpus.read_page(args.packages, *corpus.DEMO_PAGE))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "document.txt").write_text(document, encoding="utf-8")
    text = json.dumps(needles, indent=2) + "\n"
    (args.out / "needles.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
