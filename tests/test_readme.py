"""The README's Python snippets run, and its tables name what exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from token_sparse_attention import TokenSparseConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["apply", "operator", "dense"])
def test_snippets_run(snippet, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_settings_and_files_exist():
    fields = {field.name for field in dataclasses.fields(TokenSparseConfig)}
    settings = README.split("## Settings")[1].split("## ")[0]
    named = set(re.findall(r"^\| `(\w+)`", settings, re.MULTILINE))
    assert named == fields
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
