"""What ships inside the package: a small model, a document to read, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from token_sparse_attention.records import convert, parse, read_text

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
NAME = "bundled"  # what results call the model, wherever it lies
DEMO_DOCUMENT = FOLDER / "demo" / "document.txt"
DEMO_NEEDLES = FOLDER / "demo" / "needles.json"
SAMPLE = (FOLDER / "sample" / "code.txt.gz", FOLDER / "sample" / "prose.txt.gz")


@dataclass(frozen=True)
class Needle:
    """A fact hidden in the demo document, and the question that asks for it.

    Attributes:
        key: what the fact is about.
        value: what it says of that.
        line: the fact as it stands in the document.
        depth: where it stands, as a share of the document.
        question: asks for the fact.
        answer: must be in the reply.
    """

    key: str
    value: str
    line: str
    depth: float
    question: str
    answer: str


def demo_needles() -> list[Needle]:
    """Return the facts hidden in the demo document, in order."""
    content = parse(str(DEMO_NEEDLES), read_text(DEMO_NEEDLES))
    return convert(content, list[Needle], str(DEMO_NEEDLES))
