"""What `--config` may say."""

from __future__ import annotations

import json

import pytest

from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig, bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.settings import (
    Configuration,
    read_runs,
    settings_dicts,
)
from token_sparse_attention.profile import layer_configs
from token_sparse_attention.settings import default_config

MODEL = str(bundled.MODEL)


def read_configurations(given, model):
    """The settings of values that name no pattern."""
    return {name: found.settings for name, found in read_runs(given, model).items()}


def test_every_kind_of_value(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(TokenSelectionConfig(drop_mass=0.1).to_json())
    profile = LayerProfile(layers={2: {}})
    given = [
        "published",
        f"a={file}",
        str(file),
        'b={"method": "token_selection", "drop_mass": 0.2}',
        "profile",
        "c=default",
    ]
    found = read_configurations([*given, f"d={profile.to_json()}"], MODEL)
    assert found == {
        "published": TokenSelectionConfig(),
        "a": TokenSelectionConfig(drop_mass=0.1),
        "mine": TokenSelectionConfig(drop_mass=0.1),
        "b": TokenSelectionConfig(drop_mass=0.2),
        "profile": default_config(MODEL)[0],
        "c": KVSamplingConfig(),
        "d": profile,
    }
    runs = read_runs([*given, f"d={profile.to_json()}"], MODEL)
    assert runs == {name: Configuration(settings) for name, settings in found.items()}
    assert list(settings_dicts(runs)) == ["dense", *found]
    assert settings_dicts(runs)["b"] == found["b"].to_dict()


def test_dense_adds_nothing():
    assert read_runs(["dense"], MODEL) == {}
    assert list(read_runs(["dense", "published"], MODEL)) == ["published"]


def test_patterns_alone_and_with_token_sparsity(tmp_path):
    file = tmp_path / "a+b.json"
    file.write_text(TokenSelectionConfig(drop_mass=0.1).to_json())
    found = read_runs(
        [
            "flexprefill",
            "flexprefill+published",
            f"minference+{file}",
            'x=xattention:{"stride": 16, "threshold": 8e-1}+default',
            'y=streaming:{"local_size": 4096}',
            'z=streaming+{"num_samples": 300}',
            str(file),
        ],
        MODEL,
    )
    assert found == {
        "flexprefill": Configuration(None, "flexprefill"),
        "flexprefill+published": Configuration(TokenSelectionConfig(), "flexprefill"),
        "minference+a+b": Configuration(TokenSelectionConfig(drop_mass=0.1), "minference"),
        "x": Configuration(KVSamplingConfig(), 'xattention:{"stride":16,"threshold":0.8}'),
        "y": Configuration(None, "streaming"),
        "z": Configuration(KVSamplingConfig(num_samples=300), "streaming"),
        "a+b": Configuration(TokenSelectionConfig(drop_mass=0.1)),
    }
    header = settings_dicts(found)
    assert header["flexprefill"] == {
        "pattern": {"name": "flexprefill", "gamma": 0.95, "tau": 0.1, "min_budget": 1024},
        "settings": None,
    }
    assert header["x"]["pattern"] == {"name": "xattention", "stride": 16, "threshold": 0.8}
    assert header["x"]["settings"] == KVSamplingConfig().to_dict()
    json.dumps(header)


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
    assert set(configs.values()) == {TokenSelectionConfig()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["publishd"], "did you mean 'published'"),
        (["a=no/such/file"], "no file 'no/such/file'"),
        (['a={"num_sample": 1}'], "did you mean 'num_samples'"),
        (['a={"keep_ratio": 0.1}'], 'add "method": "token_selection" for that one'),
        (['a={"drop_mass": 0.1}'], '.*convert_settings, or add "method": "token_selection" if it'),
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


def test_a_file_of_head_budgets_is_recorded_by_what_it_holds(tmp_path):
    file = tmp_path / "budgets.json"
    file.write_text('[{"0": ["stream_llm", 7, 9, 1.0]}, {"0": ["vertical_and_slash", 5, 6]}]')
    found = read_runs([f'm=minference:{{"layers": "{file}"}}+default'], MODEL)
    assert found["m"].settings == KVSamplingConfig()
    header = json.loads(json.dumps(settings_dicts(found)["m"]))
    assert header["pattern"]["layers"] == [
        [["stream_llm", 7, 9]],
        [["vertical_and_slash", 5, 6]],
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["flexprefil"], "no file 'flexprefil'; did you mean 'flexprefill'"),
        (["flexprefill+publishd"], "did you mean 'published'"),
        (["flexprefill+"], "expected [+]VALUE after 'flexprefill'"),
        (["a=flexprefill+xattention"], "no file 'xattention'"),
        (['a=flexprefill:{"gama": 1}'], "no setting 'gama'; did you mean 'gamma'"),
        (['a=flexprefill:{"gamma": 2}+default'], "gamma must be in"),
        (["a=flexprefill:published"], "cannot be used"),
        (['a=flexprefill:{"gamma": 1}published'], "expected [+]VALUE after"),
        (['flexprefill:{"gamma": 1}'], "must be NAME=VALUE"),
        (["flexprefill", "flexprefill"], "'flexprefill' is taken"),
        (['a=minference:{"layers": "no/such.json"}'], "no/such.json cannot be read: No such file"),
    ],
)
def test_patterns_that_cannot_be_used_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        read_runs(given, MODEL)


def test_a_model_without_a_profile():
    with pytest.raises(UsageError, match="some/hub-id has no"):
        read_configurations(["profile"], "some/hub-id")
