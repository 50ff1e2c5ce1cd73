"""What the study's pages call what a point ran."""

from __future__ import annotations

from benchmarks.frontier import words

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig

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
    plain = TokenSelectionConfig(fallback="window").to_dict()
    sampling = KVSamplingConfig(sliding_window=512, sink_size=0, dense_queries=0).to_dict()
    texts = {words.describe(plain, {}), words.describe(sampling, {})}
    for settings, field, value in (
        (plain, "sparse_layers", [1, 2, 4]),
        (plain, "sparse_layers", [1, 2, 3, 4]),
        (plain, "drop_mass", 0.5),
        (plain, "fallback", "zero"),
        (plain, "sliding_window", 64),
        (plain, "budget", "per_head"),
        (plain, "observation_window", 64),
        (sampling, "num_probes", 64),
        (sampling, "sink_size", 4),
        (sampling, "num_samples", 7),
        (plain, "dense_queries", 7),
        (plain, "pool_size", 63),
    ):
        texts.add(words.describe(settings | {field: value}, {}))
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
    assert len(texts) == 2 + 12 + 13


def test_a_profile_names_its_layers_by_what_they_run():
    base = KVSamplingConfig(sliding_window=512, num_samples=0, dense_queries=0).to_dict()
    layers = {
        "0": {"num_samples": 4096},
        "3": {"num_samples": 4096},
        "4": {"num_samples": 1024, "dense_heads": [5]},
        "5": {},
    }
    label = words.describe({"version": 2, "base": base, "layers": layers}, {})
    assert label == (
        "layers 0, 3: 4096 sampled keys; "
        "layer 4: 1024 sampled keys, head 5 dense; layer 5; "
        "each 4 sinks, no queries dropped"
    )
    base = TokenSelectionConfig().to_dict()
    nothing_shared = {"1": {}, "2": {"drop_mass": 0.5, "fallback": "window"}}
    label = words.describe({"version": 2, "base": base, "layers": nothing_shared}, {})
    assert label == "layer 1: drop mass 0.005, zeros; layer 2: drop mass 0.5"
