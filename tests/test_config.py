"""Settings of the methods: validation and JSON round trips."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
    config_from_json,
)
from token_sparse_attention.config import config_from_dict

common = {
    "budget": st.sampled_from(["shared", "per_head"]),
    "dense_queries": st.integers(0, 300),
    "dense_heads": st.sets(st.integers(0, 63)).map(tuple),
    "crossover": st.sampled_from(["off", "auto"]),
    "sparse_layers": st.none() | st.sets(st.integers(0, 200)).map(tuple),
}
configs = st.builds(
    TokenSelectionConfig,
    drop_mass=st.floats(0, 1, exclude_max=True),
    observation_window=st.integers(1, 4096),
    pool_size=st.integers(0, 50).map(lambda n: 2 * n + 1),
    min_tokens=st.integers(0, 10_000),
    keep_ratio=st.none() | st.floats(0, 1, exclude_min=True),
    fallback=st.sampled_from(["zero", "window"]),
    sliding_window=st.integers(1, 4096),
    **common,
) | st.builds(
    KVSamplingConfig,
    block_size=st.integers(4, 12).map(lambda exponent: 2**exponent),
    num_probes=st.integers(0, 4).map(lambda exponent: 2**exponent),
    sliding_window=st.integers(4096, 9000),
    sink_size=st.integers(0, 64),
    num_samples=st.integers(0, 4096),
    **common,
)


def test_published_values_are_the_papers():
    published = TokenSelectionConfig()
    assert (published.drop_mass, published.observation_window) == (0.005, 128)
    assert (published.pool_size, published.min_tokens) == (7, 1024)
    assert (published.budget, published.fallback, published.crossover) == ("shared", "zero", "off")
    assert published.keep_ratio is None
    assert published.dense_queries == 0
    assert published.dense_heads == ()
    assert published.sparse_layers is None


def test_defaults_of_sampling():
    default = KVSamplingConfig()
    assert (default.block_size, default.num_probes) == (2048, 16)
    assert (default.sliding_window, default.sink_size) == (2048, 4)
    assert (default.num_samples, default.budget, default.dense_queries) == (2048, "shared", 128)
    assert (default.crossover, default.dense_heads, default.sparse_layers) == ("auto", (), None)


def test_a_methods_config_takes_changes_of_its_own_fields_only():
    changed = TokenSelectionConfig(drop_mass=0.1, crossover="auto")
    assert (changed.drop_mass, changed.crossover, changed.fallback) == (0.1, "auto", "zero")
    with pytest.raises(TypeError, match="drop_mas"):
        TokenSelectionConfig(drop_mas=0.1)
    with pytest.raises(TypeError, match="drop_mass"):
        KVSamplingConfig(drop_mass=0.1)
    with pytest.raises(TypeError, match="positional"):
        KVSamplingConfig(128)


def test_config_is_frozen_and_hashable():
    config = TokenSelectionConfig(sparse_layers=[2, 1], dense_heads=[7, 3])
    assert config.sparse_layers == (1, 2)
    assert config.dense_heads == (3, 7)
    assert hash(config) == hash(TokenSelectionConfig(sparse_layers=(1, 2), dense_heads=(3, 7)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.drop_mass = 0.1  # type: ignore[misc]


@given(configs)
def test_config_json_round_trip(config):
    for text in (config.to_json(), config.text):
        again = config_from_json(text)
        assert again == config
        assert type(again) is type(config)
    assert config.to_dict()["method"] == config.method
    assert "\n" not in config.text


def test_json_without_a_method_is_the_default_methods():
    assert config_from_json("{}") == KVSamplingConfig()
    assert config_from_json('{"method": "token_selection"}') == TokenSelectionConfig()
    with pytest.raises(ValueError, match="kv_sampling or token_selection"):
        config_from_dict({"method": "no such method"})


def test_a_method_is_named_once():
    with pytest.raises(ValueError, match="'kv_sampling' is the name of KVSamplingConfig already"):

        class Other(SparseConfig, method="kv_sampling"):
            pass


COMMON = [
    ({"budget": "head"}, ValueError, "budget must be one of shared, per_head; got 'head'"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1"),
    ({"dense_queries": -1}, ValueError, "dense_queries must be at least 0, got -1"),
    ({"dense_queries": 1.0}, TypeError, "dense_queries must be an int, got 1.0"),
    ({"crossover": "on"}, ValueError, "crossover must be one of off, auto; got 'on'"),
    ({"dense_heads": 1}, TypeError, "dense_heads must be head numbers, got 1"),
    ({"dense_heads": (2, 2)}, ValueError, "dense_heads must not repeat a head"),
    ({"dense_heads": (-1,)}, ValueError, "dense_heads must be at least 0, got -1"),
    ({"sparse_layers": 3}, TypeError, "sparse_layers must be layer numbers, got 3"),
    ({"sparse_layers": "12"}, TypeError, "sparse_layers must be layer numbers"),
    ({"sparse_layers": (1, -1)}, ValueError, "sparse_layers must be at least 0, got -1"),
    ({"sparse_layers": (1, 1)}, ValueError, "sparse_layers must not repeat a layer"),
    ({"sparse_layers": (True,)}, TypeError, "sparse_layers must be an int, got True"),
    ({"sparse_layers": (0.5,)}, TypeError, "sparse_layers must be an int, got 0.5"),
]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        *COMMON,
        ({"drop_mass": float("nan")}, ValueError, r"drop_mass must be in \[0, 1\), got nan"),
        ({"drop_mass": float("inf")}, ValueError, "drop_mass must be in"),
        ({"drop_mass": -0.1}, ValueError, "drop_mass must be in .* got -0.1"),
        ({"drop_mass": 1.0}, ValueError, "drop_mass must be in .* got 1.0"),
        ({"drop_mass": "0.1"}, TypeError, "drop_mass must be a number, got '0.1'"),
        ({"drop_mass": True}, TypeError, "drop_mass must be a number, got True"),
        ({"drop_mass": None}, TypeError, "drop_mass must be a number, got None"),
        ({"observation_window": 0}, ValueError, "observation_window must be at least 1, got 0"),
        ({"observation_window": -5}, ValueError, "observation_window must be at least 1, got -5"),
        ({"observation_window": 2.0}, TypeError, "observation_window must be an int, got 2.0"),
        ({"pool_size": 4}, ValueError, "pool_size must be odd, got 4"),
        ({"pool_size": -3}, ValueError, "pool_size must be at least 1"),
        ({"min_tokens": -1}, ValueError, "min_tokens must be at least 0"),
        ({"fallback": "none"}, ValueError, "fallback must be one of zero, window; got 'none'"),
        ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"keep_ratio": float("nan")}, ValueError, r"keep_ratio must be in \(0, 1\], got nan"),
        ({"keep_ratio": "half"}, TypeError, "keep_ratio must be a number, got 'half'"),
    ],
)
def test_bad_settings_of_selection_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        TokenSelectionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        *COMMON,
        ({"block_size": 8}, ValueError, "block_size must be at least 16, got 8"),
        ({"block_size": 48}, ValueError, "block_size must be a power of two, got 48"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int, got 64.0"),
        ({"block_size": 4096}, ValueError, "sliding_window must be at least block_size = 4096"),
        ({"num_probes": 0}, ValueError, "num_probes must be at least 1, got 0"),
        ({"num_probes": 24}, ValueError, "num_probes must be a power of two, got 24"),
        ({"num_probes": 4096}, ValueError, "num_probes must be at most block_size = 2048, got"),
        ({"sliding_window": 2047}, ValueError, "at least block_size = 2048, got 2047"),
        ({"num_probes": 2.0}, TypeError, "num_probes must be an int, got 2.0"),
        ({"sink_size": -1}, ValueError, "sink_size must be at least 0"),
        ({"num_samples": -1}, ValueError, "num_samples must be at least 0"),
        ({"num_samples": True}, TypeError, "num_samples must be an int, got True"),
    ],
)
def test_bad_settings_of_sampling_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        KVSamplingConfig(**fields)


PAPER = '"method": "token_selection", '


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "config is not valid JSON"),
        ("[" * 100_000, ValueError, "config is nested too deeply"),
        ("[1]", ValueError, r"config must be a JSON object, got \[1\]"),
        (
            f'{{{PAPER}"drop_mas": 0.1}}',
            ValueError,
            "unknown entry 'drop_mas'; did you mean 'drop_mass'",
        ),
        (f'{{{PAPER}"zzz": 0.1}}', ValueError, "unknown entry 'zzz'; expected dense_queries, de"),
        (f'{{{PAPER}"pool_size": 2}}', ValueError, "pool_size must be odd, got 2"),
        (f'{{{PAPER}"pool_size": "7"}}', TypeError, "pool_size must be an int, got '7'"),
        (f'{{{PAPER}"drop_mass": NaN}}', ValueError, "config is not valid JSON: NaN"),
        ('{"num_sample": 3}', ValueError, "did you mean 'num_samples'"),
        ('{"method": "selection"}', ValueError, "config method must be kv_sampling or token_sel"),
        ('{"method": 3}', ValueError, "config method must be .*, got 3"),
        (
            '{"drop_mass": 0.1}',
            ValueError,
            "'drop_mass', which the method kv_sampling does not have; .*\"token_selection\"",
        ),
        (
            f'{{{PAPER}"num_samples": 9}}',
            ValueError,
            "'num_samples', which the method token_selection does not have; .*\"kv_sampling\"",
        ),
    ],
)
def test_bad_config_json_is_named(text, error, message):
    with pytest.raises(error, match=message):
        config_from_json(text)


def test_dicts_are_read_as_json_is():
    assert config_from_dict({"num_samples": 5, "dense_heads": [2, 1]}).dense_heads == (1, 2)
