"""What ships inside the package: a small model, a document to read, and where they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
DEMO_DOCUMENT = FOLDER / "demo" / "document.txt"
DEMO_NEEDLES = FOLDER / "demo" / "needles.json"


@dataclass(frozen=True)
class Needle:
    """A fact hidden in the demo document, and the question that asks for it.

    Attributes:
        line: the fact as it stands in the document.
        depth: where it stands, as a share of the document.
        question: asks for the fact.
        answer: must be in the reply.
    """

    line: str
    depth: float
    question: str
    answer: str


def demo_needles() -> list[Needle]:
    """Return the facts hidden in the demo document, in order."""
    listed = json.loads(DEMO_NEEDLES.read_text(encoding="utf-8"))
    return [
        Needle(entry["line"], entry["depth"], entry["question"], entry["answer"])
        for entry in listed
    ]
