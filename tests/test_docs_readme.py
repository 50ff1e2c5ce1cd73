"""README.md: how soon it shows code, how long it is, and where its result comes from."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from token_sparse_attention.evaluation.summary import relative_loss_bound

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIRMED = ROOT / "benchmarks" / "results" / "confirm"
SHIPPED = "H3"  # what the result files call the bundled model's profile
LENGTH = 131072


def sparse_and_dense_scores() -> list[tuple[float, float]]:
    """Dense and sparse score of every 128K prompt that the bundled profile answered."""
    pairs = []
    for file in sorted(CONFIRMED.glob("128k*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            header, *rows = map(json.loads, lines)
        if SHIPPED in header["configurations"]:
            assert header["arguments"]["lengths"] == [LENGTH]
            score = {(r["configuration"], r["task"], r["index"]): r["score"] for r in rows}
            pairs += [
                (score["dense", *sample], sparse)
                for (name, *sample), sparse in score.items()
                if name == SHIPPED
            ]
    return pairs


def speed_up(*, own_shape: bool) -> float:
    """Dense time over sparse time of all layers' attention, as replayed."""
    replay: dict[str, Any] = json.loads((CONFIRMED / "replay-128k.json").read_text())
    [row] = [
        row
        for row in replay["rows"]
        if (row["configuration"], row["length"], row["own_shape"]) == (SHIPPED, LENGTH, own_shape)
    ]
    times = [(share, replay["points"][place]) for layer in row["layers"] for share, place in layer]
    assert all(point["passed"] for _, point in times)
    dense = sum(share * point["dense_ms"] for share, point in times)
    return dense / sum(share * point["median_ms"] for share, point in times)


def test_the_result_is_the_files():
    scores = sparse_and_dense_scores()
    lost = 1 - fmean(sparse for _, sparse in scores) / fmean(dense for dense, _ in scores)
    assert f"{speed_up(own_shape=True):.2f}x as fast as dense flash-attn-4" in README
    text = " ".join(README.split())
    assert f"loses {lost:.1%} of its dense RULER score there." in text
    assert f"With 95% confidence the loss is below {relative_loss_bound(scores):.1%}" in text
    assert f"over {len(scores):,} prompts" in text
    assert re.findall(r"\d+\.\d+x", README) == [f"{speed_up(own_shape=True):.2f}x"]


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
