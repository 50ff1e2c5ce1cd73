"""The Python snippets of docs/patterns.md run, and its pattern is the one there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.attention.patterns.streaming import StreamingConfig, streaming_mask

TEXT = (Path(__file__).parent.parent / "docs" / "patterns.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["operator", "model", "streaming"])
def test_snippets_run(snippet):
    names = {"__name__": __name__}
    exec(compile(snippet, "patterns.md", "exec", dont_inherit=True), names)
    if "streaming_mask" in names:
        query, key = torch.randn(1, 4, 700, 8), torch.randn(1, 2, 900, 8)
        theirs = names["streaming_mask"](query, key, names["StreamingConfig"](9, 200), 1.0)
        mine = streaming_mask(query, key, StreamingConfig(9, 200), 1.0)
        assert torch.equal(theirs.dense_view(), mine.dense_view())


def test_the_table_names_every_pattern():
    rows = re.findall(r"^\| `(\w+)` .*\| `(\w+)` \|$", TEXT, re.MULTILINE)
    assert rows == [(name, pattern.config.__name__) for name, pattern in PATTERNS.items()]
