"""Profiles: JSON round trips, the one reading of layers, and the files of version 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_config import configs
from token_sparse_attention import (
    KVSamplingConfig,
    LayerProfile,
    TokenSelectionConfig,
    config_from_json,
    load_config,
)
from token_sparse_attention.config import config_from_dict
from token_sparse_attention.profile import (
    convert_settings,
    layer_configs,
    settings_from_json,
    without_crossover,
)


@given(
    configs.map(lambda config: dataclasses.replace(config, sparse_layers=None)),
    st.dictionaries(
        st.integers(0, 99), st.fixed_dictionaries({}, optional={"dense_queries": st.just(7)})
    ),
)
def test_profile_json_round_trip(base, layers):
    profile = LayerProfile(base=base, layers=layers)
    assert LayerProfile.from_json(profile.to_json()) == profile


def test_overrides_are_of_the_bases_method():
    profile = LayerProfile(layers={0: {}, 1: {"num_samples": 5}, 3: {"dense_heads": [1]}})
    found = profile.layer_configs(4)
    assert [found[layer].num_samples for layer in (0, 1, 3)] == [2048, 5, 2048]
    assert found[3].dense_heads == (1,)
    with pytest.raises(ValueError, match="'drop_mass', which the method kv_sampling does not"):
        LayerProfile(layers={1: {"drop_mass": 0.1}})
    with pytest.raises(ValueError, match=r"layers\[1\] must not override method"):
        LayerProfile(layers={1: {"method": "token_selection"}})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nope", ValueError, "profile is not valid JSON"),
        ('"text"', ValueError, "profile must be a JSON object, got 'text'"),
        ("{}", ValueError, "profile version must be 2, got None"),
        ('{"version": 3}', ValueError, "profile version must be 2, got 3"),
        ('{"version": 2, "layer": {}}', ValueError, "did you mean 'layers'"),
        ('{"version": 2, "base": []}', TypeError, "profile base must be an object"),
        ('{"version": 2, "layers": [1]}', TypeError, "profile layers must be an object"),
        ('{"version": 2, "layers": {"x": {}}}', ValueError, "numbers as keys, got 'x'"),
        ('{"version": 2, "layers": {"-1": {}}}', ValueError, "numbers as keys, got '-1'"),
        ('{"version": 2, "layers": {"1": {}, "01": {}}}', ValueError, "must not repeat layer 1"),
        ('{"version": 2, "layers": {"1": 3}}', TypeError, r"layers\[1\] must map fields"),
        (
            '{"version": 2, "base": {"method": "token_selection"}, '
            '"layers": {"1": {"pool_size": 2}}}',
            ValueError,
            "pool_size must be odd",
        ),
        (
            '{"version": 2, "layers": {"1": {"sparse_layers": [1]}}}',
            ValueError,
            r"layers\[1\] must not override sparse_layers",
        ),
        (
            '{"version": 2, "base": {"sparse_layers": [1]}}',
            ValueError,
            "base.sparse_layers must be None",
        ),
    ],
)
def test_bad_profile_json_is_named(text, error, message):
    with pytest.raises(error, match=message):
        LayerProfile.from_json(text)


def test_bad_profile_arguments_are_named():
    with pytest.raises(TypeError, match="base must be a SparseConfig, got None"):
        LayerProfile(base=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers must map layer numbers"):
        LayerProfile(layers=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers must be an int, got '1'"):
        LayerProfile(layers={"1": {}})  # type: ignore[dict-item]


def test_layer_configs_read_configs_and_profiles():
    config = TokenSelectionConfig(drop_mass=0.1)
    assert layer_configs(config, 3) == {0: config, 1: config, 2: config}
    chosen = dataclasses.replace(config, sparse_layers=(2,))
    assert layer_configs(chosen, 3) == {2: config}
    profile = LayerProfile(base=config, layers={1: {"drop_mass": 0.5}, 0: {}})
    assert layer_configs(profile, 3) == {0: config, 1: TokenSelectionConfig(drop_mass=0.5)}


def test_layers_out_of_range_raise():
    with pytest.raises(ValueError, match=r"sparse_layers must be below 4.*got \[4, 9\]"):
        layer_configs(TokenSelectionConfig(sparse_layers=(1, 4, 9)), 4)
    with pytest.raises(ValueError, match=r"layers must be below 4.*got \[7\]"):
        layer_configs(LayerProfile(layers={7: {}}), 4)
    with pytest.raises(TypeError, match="config must be a SparseConfig or a LayerProfile"):
        layer_configs({"drop_mass": 0.1}, 4)  # type: ignore[arg-type]


def test_load_config_tells_configs_from_profiles(tmp_path):
    file = tmp_path / "settings.json"
    config = TokenSelectionConfig(drop_mass=0.1, sparse_layers=(1,))
    file.write_text(config.to_json())
    assert load_config(file) == config
    profile = LayerProfile(layers={3: {"num_samples": 5}})
    file.write_text(profile.to_json())
    assert load_config(file) == profile
    assert json.loads(file.read_text())["version"] == 2
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "absent.json")


def test_the_crossover_is_taken_from_layers_too():
    """A layer may say "auto" where its base does not."""
    off = without_crossover(KVSamplingConfig(num_samples=7))
    assert off == KVSamplingConfig(num_samples=7, crossover="off")
    for base in ("auto", "off"):
        profile = LayerProfile(
            KVSamplingConfig(crossover=base),
            {0: {}, 1: {"crossover": "auto", "num_samples": 5}, 2: {"crossover": "off"}},
        )
        configs = without_crossover(profile).layer_configs(3)
        assert {config.crossover for config in configs.values()} == {"off"}
        assert [configs[layer].num_samples for layer in range(3)] == [2048, 5, 2048]
        assert profile.layer_configs(3)[1].crossover == "auto", "the given profile is not changed"


OLD_PROFILES = sorted((Path(__file__).parent / "profiles_version_1").glob("*.json"))
NARROW = "three-dense-layers"  # its window is narrower than a block is today
OLD_DEFAULTS = {
    "drop_mass": None,
    "window_size": 128,
    "pool_size": 7,
    "min_tokens": 1024,
    "budget": "shared",
    "select_queries": None,
    "dense_queries": 128,
    "dense_heads": [],
    "fallback": "window",
    "fallback_window": 2048,
    "fallback_sinks": 4,
    "fallback_landmarks": 0,
    "fallback_samples": 2048,
    "crossover": "auto",
    "sparse_layers": None,
}


def meaning(old):
    """The config that old fields, all of them given, stand for: one field after the other."""
    shared = {name: old[name] for name in ("budget", "dense_queries", "crossover")}
    if old["drop_mass"] is None and not old["select_queries"]:
        return KVSamplingConfig(
            sliding_window=old["fallback_window"],
            sink_size=old["fallback_sinks"],
            num_samples=old["fallback_samples"],
            dense_heads=old["dense_heads"],
            **shared,
        )
    return TokenSelectionConfig(
        drop_mass=0.005 if old["drop_mass"] is None else old["drop_mass"],
        observation_window=old["window_size"],
        pool_size=old["pool_size"],
        min_tokens=old["min_tokens"],
        fallback=old["fallback"],
        sliding_window=old["fallback_window"],
        **shared,
    )


def test_there_are_old_profiles():
    assert len(OLD_PROFILES) >= 9


def test_an_old_window_narrower_than_a_block_is_named():
    (narrow,) = (file for file in OLD_PROFILES if file.stem == NARROW)
    with pytest.raises(ValueError, match="sliding_window must be at least block_size = 2048"):
        convert_settings(json.loads(narrow.read_text()))


@pytest.mark.parametrize(
    "file", [file for file in OLD_PROFILES if file.stem != NARROW], ids=lambda file: file.stem
)
def test_old_profiles_keep_their_meaning(file):
    text = file.read_text()
    old = json.loads(text)
    with pytest.raises(ValueError, match=r"version 1; rewrite it with .*convert_settings"):
        load_config(file)
    profile = settings_from_json(json.dumps(convert_settings(old)))
    base = {**OLD_DEFAULTS, **old["base"]}
    assert profile.base == meaning(base)
    expected = {int(n): meaning({**base, **changes}) for n, changes in old["layers"].items()}
    assert profile.layer_configs(100) == expected
    assert json.loads(text) == old, "what was given is not changed"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fallback_samples": 1024, "sparse_layers": [1, 2]},
        {"drop_mass": 0.1, "fallback_sinks": 0, "fallback_samples": 0},
        {"drop_mass": 0.1, "fallback": "zero", "dense_queries": 0, "crossover": "off"},
        {
            "select_queries": True,
            "fallback_sinks": 0,
            "fallback_samples": 0,
            "fallback_window": 512,
            "budget": "per_head",
        },
        {"select_queries": True, "drop_mass": None, "fallback": "zero", "fallback_samples": 0},
        {"pool_size": 9, "min_tokens": 5, "dense_heads": [3]},
    ],
)
def test_old_configs_keep_their_meaning(fields):
    converted = config_from_dict(convert_settings(fields))
    expected = dataclasses.replace(
        meaning({**OLD_DEFAULTS, **fields}), sparse_layers=fields.get("sparse_layers")
    )
    assert converted == expected
    assert config_from_json(json.dumps(convert_settings(fields))) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fallback_landmarks": 9}, "fallback_landmarks = 9 has no meaning in the method kv_sam"),
        (
            {"drop_mass": 0.1, "fallback_landmarks": 9, "fallback_samples": 0},
            "fallback_(sinks|landmarks) = [49] has no meaning in the method token_selection",
        ),
        (
            {"drop_mass": 0.1, "fallback_sinks": 0},
            "fallback_samples = 4096 has no meaning in the method token_selection",
        ),
        (
            {"drop_mass": 0.1, "fallback_sinks": 4, "fallback_samples": 0},
            "fallback_sinks = 4 has no meaning in the method token_selection",
        ),
        ({"fallback": "zero"}, "fallback = 'zero' has no meaning in the method kv_sampling"),
        (
            {"version": 1, "base": {}, "layers": {"1": {"drop_mass": 0.1}}},
            r"layers\[1\] drops queries and the base does not",
        ),
        ({"fallback_window": 512}, "sliding_window must be at least block_size = 2048, got 512"),
    ],
)
def test_what_no_method_has_any_more_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        convert_settings(fields)


def test_the_mark_that_begins_a_file_is_no_part_of_it(tmp_path):
    file = tmp_path / "marked.json"
    file.write_bytes(b"\xef\xbb\xbf" + KVSamplingConfig(num_samples=9).to_json().encode())
    assert load_config(file) == KVSamplingConfig(num_samples=9)


@pytest.mark.parametrize(
    "fields", [{"fallback_samples": 9}, {"window_size": 64}, {"select_queries": False}]
)
def test_old_configs_are_named_as_such(fields, tmp_path):
    file = tmp_path / "old.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"old\.json has the field names of version 1"):
        load_config(file)
