"""Settings: validation, JSON round trips, and the profile's reading of layers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention import DenseReason, LayerProfile, TokenSparseConfig, load_config
from token_sparse_attention.config import layer_configs

configs = st.builds(
    TokenSparseConfig,
    drop_mass=st.none() | st.floats(0, 1, exclude_max=True),
    window_size=st.integers(1, 4096),
    pool_size=st.integers(0, 50).map(lambda n: 2 * n + 1),
    min_tokens=st.integers(0, 10_000),
    budget=st.sampled_from(["shared", "per_head"]),
    fallback=st.just("window"),
    fallback_window=st.integers(1, 4096),
    fallback_sinks=st.integers(0, 64),
    fallback_landmarks=st.integers(0, 4096),
    fallback_samples=st.integers(0, 4096),
    crossover=st.sampled_from(["off", "auto"]),
    sparse_layers=st.none() | st.sets(st.integers(0, 200)).map(tuple),
)


def test_published_values_are_the_papers():
    published = TokenSparseConfig.published()
    assert (published.drop_mass, published.window_size) == (0.005, 128)
    assert (published.pool_size, published.min_tokens) == (7, 1024)
    assert (published.budget, published.fallback, published.crossover) == ("shared", "zero", "off")
    assert published.select_queries
    assert published.dense_queries == 0
    assert published.sparse_layers is None


def test_a_drop_mass_selects_queries_and_without_one_none_are():
    assert not TokenSparseConfig().select_queries
    assert TokenSparseConfig().drop_mass is None
    selecting = TokenSparseConfig(drop_mass=0.1)
    assert selecting.select_queries
    assert TokenSparseConfig(select_queries=True).drop_mass == 0.005
    with pytest.raises(ValueError, match=r"drop_mass must be None where .* got 0\.1"):
        TokenSparseConfig(drop_mass=0.1, select_queries=False)
    profile = LayerProfile(
        layers={0: {}, 1: {"drop_mass": 0.1}, 2: {"select_queries": True}, 3: {"min_tokens": 9}}
    )
    found = profile.layer_configs(4)
    assert [found[layer].drop_mass for layer in range(4)] == [None, 0.1, 0.005, None]
    back = LayerProfile(
        base=selecting, layers={0: {"drop_mass": None}, 1: {"select_queries": False}}
    )
    assert not any(config.select_queries for config in back.layer_configs(2).values())


def test_published_takes_changes():
    changed = TokenSparseConfig.published(drop_mass=0.1, crossover="auto")
    assert (changed.drop_mass, changed.crossover, changed.fallback) == (0.1, "auto", "zero")
    with pytest.raises(TypeError, match="drop_mas"):
        TokenSparseConfig.published(drop_mas=0.1)


def test_config_is_frozen_and_hashable():
    config = TokenSparseConfig.published(sparse_layers=[2, 1])
    assert config.sparse_layers == (1, 2)
    assert hash(config) == hash(TokenSparseConfig.published(sparse_layers=(1, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.drop_mass = 0.1  # type: ignore[misc]


@given(configs)
def test_config_json_round_trip(config):
    assert TokenSparseConfig.from_json(config.to_json()) == config


@given(
    configs.map(lambda config: dataclasses.replace(config, sparse_layers=None)),
    st.dictionaries(
        st.integers(0, 99), st.fixed_dictionaries({}, optional={"drop_mass": st.just(0.25)})
    ),
)
def test_profile_json_round_trip(base, layers):
    profile = LayerProfile(base=base, layers=layers)
    assert LayerProfile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"drop_mass": float("nan")}, ValueError, r"drop_mass must be in \[0, 1\), got nan"),
        ({"drop_mass": float("inf")}, ValueError, "drop_mass must be in"),
        ({"drop_mass": -0.1}, ValueError, "drop_mass must be in .* got -0.1"),
        ({"drop_mass": 1.0}, ValueError, "drop_mass must be in .* got 1.0"),
        ({"drop_mass": "0.1"}, TypeError, "drop_mass must be a number or None, got '0.1'"),
        ({"drop_mass": True}, TypeError, "drop_mass must be a number or None, got True"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": -5}, ValueError, "window_size must be at least 1, got -5"),
        ({"window_size": 2.0}, TypeError, "window_size must be an int, got 2.0"),
        ({"pool_size": 4}, ValueError, "pool_size must be odd, got 4"),
        ({"pool_size": -3}, ValueError, "pool_size must be at least 1"),
        ({"min_tokens": -1}, ValueError, "min_tokens must be at least 0"),
        ({"budget": "head"}, ValueError, "budget must be one of shared, per_head; got 'head'"),
        ({"fallback": "none"}, ValueError, "fallback must be one of zero, window; got 'none'"),
        ({"fallback_window": 0}, ValueError, "fallback_window must be at least 1"),
        ({"fallback_landmarks": -1}, ValueError, "fallback_landmarks must be at least 0"),
        ({"fallback_samples": -1}, ValueError, "fallback_samples must be at least 0"),
        ({"select_queries": 1}, TypeError, "select_queries must be True, False or None, got 1"),
        (
            {"drop_mass": None, "select_queries": False},
            ValueError,
            "select_queries=False needs fallback='window', got 'zero'",
        ),
        ({"fallback_sinks": -1}, ValueError, "fallback_sinks must be at least 0"),
        ({"crossover": "on"}, ValueError, "crossover must be one of off, auto; got 'on'"),
        (
            {"dense_heads": (1,)},
            ValueError,
            "dense_heads needs queries that are not selected: drop_mass None, got 0.005",
        ),
        ({"dense_heads": 1}, TypeError, "dense_heads must be head numbers, got 1"),
        ({"dense_heads": (2, 2)}, ValueError, "dense_heads must not repeat a head"),
        ({"dense_heads": (-1,)}, ValueError, "dense_heads must be at least 0, got -1"),
        ({"sparse_layers": 3}, TypeError, "sparse_layers must be layer numbers, got 3"),
        ({"sparse_layers": "12"}, TypeError, "sparse_layers must be layer numbers"),
        ({"sparse_layers": (1, -1)}, ValueError, "sparse_layers must be at least 0, got -1"),
        ({"sparse_layers": (1, 1)}, ValueError, "sparse_layers must not repeat a layer"),
        ({"sparse_layers": (True,)}, TypeError, "sparse_layers must be an int, got True"),
        ({"sparse_layers": (0.5,)}, TypeError, "sparse_layers must be an int, got 0.5"),
    ],
)
def test_bad_settings_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        TokenSparseConfig.published(**fields)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "config is not valid JSON"),
        ("[1]", ValueError, "config must be a JSON object, got list"),
        ('{"drop_mas": 0.1}', ValueError, "unknown entry 'drop_mas'; did you mean 'drop_mass'"),
        ('{"zzz": 0.1}', ValueError, "unknown entry 'zzz'; expected drop_mass, window_size"),
        ('{"pool_size": 2}', ValueError, "pool_size must be odd, got 2"),
        ('{"pool_size": "7"}', TypeError, "pool_size must be an int, got '7'"),
        ('{"drop_mass": NaN}', ValueError, "drop_mass must be in"),
    ],
)
def test_bad_config_json_is_named(text, error, message):
    with pytest.raises(error, match=message):
        TokenSparseConfig.from_json(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nope", ValueError, "profile is not valid JSON"),
        ('"text"', ValueError, "profile must be a JSON object, got str"),
        ("{}", ValueError, "profile version must be 1, got None"),
        ('{"version": 2}', ValueError, "profile version must be 1, got 2"),
        ('{"version": 1, "layer": {}}', ValueError, "did you mean 'layers'"),
        ('{"version": 1, "base": []}', TypeError, "profile base must be an object"),
        ('{"version": 1, "layers": [1]}', TypeError, "profile layers must be an object"),
        ('{"version": 1, "layers": {"x": {}}}', ValueError, "numbers as keys, got 'x'"),
        ('{"version": 1, "layers": {"-1": {}}}', ValueError, "numbers as keys, got '-1'"),
        ('{"version": 1, "layers": {"1": {}, "01": {}}}', ValueError, "must not repeat layer 1"),
        ('{"version": 1, "layers": {"1": 3}}', TypeError, r"layers\[1\] must map fields"),
        ('{"version": 1, "layers": {"1": {"pool_size": 2}}}', ValueError, "pool_size must be odd"),
        (
            '{"version": 1, "layers": {"1": {"sparse_layers": [1]}}}',
            ValueError,
            r"layers\[1\] must not override sparse_layers",
        ),
        (
            '{"version": 1, "base": {"sparse_layers": [1]}}',
            ValueError,
            "base.sparse_layers must be None",
        ),
    ],
)
def test_bad_profile_json_is_named(text, error, message):
    with pytest.raises(error, match=message):
        LayerProfile.from_json(text)


def test_bad_profile_arguments_are_named():
    with pytest.raises(TypeError, match="base must be a TokenSparseConfig, got None"):
        LayerProfile(base=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers must map layer numbers"):
        LayerProfile(layers=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers must be an int, got '1'"):
        LayerProfile(layers={"1": {}})  # type: ignore[dict-item]


def test_layer_configs_read_configs_and_profiles():
    config = TokenSparseConfig.published(drop_mass=0.1)
    assert layer_configs(config, 3) == {0: config, 1: config, 2: config}
    chosen = dataclasses.replace(config, sparse_layers=(2,))
    assert layer_configs(chosen, 3) == {2: config}
    profile = LayerProfile(base=config, layers={1: {"drop_mass": 0.5}, 0: {}})
    assert layer_configs(profile, 3) == {0: config, 1: TokenSparseConfig.published(drop_mass=0.5)}


def test_layers_out_of_range_raise():
    with pytest.raises(ValueError, match=r"sparse_layers must be below 4.*got \[4, 9\]"):
        layer_configs(TokenSparseConfig.published(sparse_layers=(1, 4, 9)), 4)
    with pytest.raises(ValueError, match=r"layers must be below 4.*got \[7\]"):
        layer_configs(LayerProfile(layers={7: {}}), 4)
    with pytest.raises(TypeError, match="config must be a TokenSparseConfig or a LayerProfile"):
        layer_configs({"drop_mass": 0.1}, 4)  # type: ignore[arg-type]


def test_load_config_tells_configs_from_profiles(tmp_path):
    file = tmp_path / "settings.json"
    config = TokenSparseConfig.published(drop_mass=0.1, sparse_layers=(1,))
    file.write_text(config.to_json())
    assert load_config(file) == config
    profile = LayerProfile(layers={3: {"min_tokens": 5}})
    file.write_text(profile.to_json())
    assert load_config(file) == profile
    assert json.loads(file.read_text())["version"] == 1
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "absent.json")


def test_dense_reasons_of_lengths():
    config = TokenSparseConfig.published(window_size=8, min_tokens=20)
    assert config.dense_reason(7, 100) is DenseReason.SHORT_CHUNK
    assert config.dense_reason(28, 28) is DenseReason.SHORT_CONTEXT
    assert config.dense_reason(29, 29) is None
    assert (
        TokenSparseConfig.published(drop_mass=0).dense_reason(9000, 9000)
        is DenseReason.ZERO_DROP_MASS
    )
