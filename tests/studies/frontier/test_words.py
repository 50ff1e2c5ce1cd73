"""What the study's pages call what a point ran."""

from __future__ import annotations

from benchmarks.frontier import words

from token_sparse_attention import TokenSparseConfig

NO_VARIANT = {
    **dict.fromkeys(("union", "value_norm"), False),
    **dict.fromkeys(("neighbours", "spread", "dense_last", "pooled", "landmarks"), 0),
    **dict.fromkeys(("landmarks_by", "own_landmarks", "samples", "drawn"), 0),
    "pooled_for": "both",
    "selected": "compressed",
    "fallback": "window",
    "segments": 1,
}
"""As in the headers of results, of points that differed in nothing."""


def test_whatever_differs_is_said():
    plain = TokenSparseConfig.published(fallback="window").to_dict() | {"sparse_layers": None}
    texts = {words.describe(plain, {})}
    for field, value in (
        ("sparse_layers", [1, 2, 4]),
        ("sparse_layers", [1, 2, 3, 4]),
        ("drop_mass", 0.5),
        ("fallback", "zero"),
        ("fallback_window", 64),
        ("budget", "per_head"),
        ("window_size", 64),
        ("fallback_sinks", 4),
        ("fallback_landmarks", 7),
        ("fallback_samples", 7),
        ("dense_queries", 7),
        ("select_queries", False),
        ("pool_size", 63),
    ):
        texts.add(words.describe(plain | {field: value}, {}))
    for field, value in (
        ("dense_last", 128),
        ("pooled", 64),
        ("selected", "dense"),
        ("fallback", "dense"),
        ("fallback", "keys"),
        ("landmarks_by", 128),
        ("own_landmarks", 5),
        ("samples", 5),
        ("segments", 5),
        ("spread", 5),
        ("neighbours", 5),
        ("value_norm", True),
        ("union", True),
    ):
        texts.add(words.describe(plain, NO_VARIANT | {field: value}))
    assert len(texts) == 1 + 13 + 13


def test_a_profile_names_its_layers_by_what_they_run():
    base = TokenSparseConfig.published(
        fallback="window",
        drop_mass=None,
        select_queries=False,
        fallback_sinks=4,
        sparse_layers=None,
    ).to_dict()
    layers = {
        "0": {"fallback_samples": 4096},
        "3": {"fallback_samples": 4096},
        "4": {"fallback_samples": 1024, "dense_heads": [5]},
        "5": {},
    }
    label = words.describe({"version": 1, "base": base, "layers": layers}, {})
    assert label == (
        "layers 0, 3: 4096 sampled keys; "
        "layer 4: 1024 sampled keys, head 5 dense; layer 5; "
        "each 4 sinks, no queries dropped"
    )
    nothing_shared = {
        "1": {"drop_mass": 0.005, "select_queries": True, "fallback_sinks": 0},
        "2": {},
    }
    label = words.describe({"version": 1, "base": base, "layers": nothing_shared}, {})
    assert label == "layer 1: drop mass 0.005; layer 2: 4 sinks, no queries dropped"
