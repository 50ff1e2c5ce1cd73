"""README.md: how soon it shows code, and how long it is."""

from __future__ import annotations

from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_code_stands_within_150_words():
    before, fence, _ = README.partition("```python\n")
    assert fence
    assert len(before.split()) <= 150


def test_it_is_shorter_than_900_words():
    assert len(README.split()) < 900


def test_the_first_example_is_short():
    example = README.split("```python\n")[1].split("```")[0]
    lines = [line for line in example.splitlines() if line and "import" not in line]
    assert len(lines) <= 10
    assert any("apply(" in line for line in lines)
