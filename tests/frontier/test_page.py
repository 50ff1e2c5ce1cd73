"""The study's page against its results."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.frontier import page
from benchmarks.frontier.variants import Variant

from token_sparse_attention import TokenSparseConfig


def test_the_page_is_up_to_date():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, page.tables(page.load_all())) == text, (
        "run python -m benchmarks.frontier.page"
    )


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="must have a place between"):
        page.render("text", {"runs": "| |"})


def test_whatever_differs_is_said():
    plain = TokenSparseConfig(fallback="window").to_dict() | {"sparse_layers": None}
    texts = {page.describe(plain, {})}
    for field, value in (
        ("sparse_layers", [1, 2]),
        ("drop_mass", 0.5),
        ("fallback", "zero"),
        ("fallback_window", 64),
        ("budget", "per_head"),
        ("window_size", 64),
        ("fallback_sinks", 4),
        ("fallback_landmarks", 7),
    ):
        texts.add(page.describe(plain | {field: value}, {}))
    for field, value in (
        ("dense_last", 128),
        ("pooled", 64),
        ("selected", "dense"),
        ("fallback", "dense"),
        ("fallback", "keys"),
        ("landmarks_by", 128),
        ("own_landmarks", 5),
    ):
        texts.add(page.describe(plain, dataclasses.asdict(Variant()) | {field: value}))
    assert len(texts) == 1 + 8 + 7
