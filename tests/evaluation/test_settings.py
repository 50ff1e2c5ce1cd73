"""What `--config` may say."""

from __future__ import annotations

import pytest

from token_sparse_attention import LayerProfile, TokenSparseConfig, bundled
from token_sparse_attention.benchmark.record import UsageError
from token_sparse_attention.config import layer_configs
from token_sparse_attention.evaluation.settings import read_configurations, settings_dicts
from token_sparse_attention.run import default_config

MODEL = str(bundled.MODEL)


def test_every_kind_of_value(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(TokenSparseConfig(drop_mass=0.1).to_json())
    profile = LayerProfile(layers={2: {}})
    given = ["published", f"a={file}", str(file), 'b={"drop_mass": 0.2}', "profile", "c=default"]
    found = read_configurations([*given, f"d={profile.to_json()}"], MODEL)
    assert found == {
        "published": TokenSparseConfig.published(),
        "a": TokenSparseConfig(drop_mass=0.1),
        "mine": TokenSparseConfig(drop_mass=0.1),
        "b": TokenSparseConfig(drop_mass=0.2),
        "profile": default_config(MODEL)[0],
        "c": TokenSparseConfig(),
        "d": profile,
    }
    assert list(settings_dicts(found)) == ["dense", *found]
    assert settings_dicts(found)["b"]["drop_mass"] == 0.2


def test_the_model_decides_where_nothing_is_given():
    assert list(read_configurations([], MODEL)) == ["profile"]
    assert list(read_configurations([], "some/hub-id")) == ["default"]


@pytest.mark.parametrize(
    ("name", "num_layers", "layers"),
    [
        ("llama-3.1-8b-instruct", 32, list(range(15, 31))),
        ("mistral-nemo-instruct-2407", 40, [14, 15, *range(20, 38)]),
    ],
)
def test_the_published_layer_lists(name, num_layers, layers):
    configs = layer_configs(read_configurations([name], MODEL)[name], num_layers)
    assert list(configs) == layers
    assert set(configs.values()) == {TokenSparseConfig.published()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["publishd"], "did you mean 'published'"),
        (["a=no/such/file"], "no file 'no/such/file'"),
        (['a={"drop_mas": 1}'], "did you mean 'drop_mass'"),
        (["a={"], "not valid JSON"),
        (['{"drop_mass": 0.1}'], "must be NAME=VALUE"),
        (["=published"], "must be NAME=VALUE"),
        (["published", "published"], "'published' is taken"),
        (["dense=published"], "'dense' is taken"),
    ],
)
def test_what_cannot_be_used_is_named(given, message):
    with pytest.raises(UsageError, match=message):
        read_configurations(given, MODEL)


def test_a_model_without_a_profile():
    with pytest.raises(UsageError, match="some/hub-id has no"):
        read_configurations(["profile"], "some/hub-id")
