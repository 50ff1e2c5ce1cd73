"""What the plugin refuses at the start, and how SGLang finds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig
from token_sparse_attention.integrations.serving import settings as settings_module
from token_sparse_attention.integrations.serving.settings import ENTRIES, Settings, read_settings
from token_sparse_attention.integrations.sglang import engine
from token_sparse_attention.integrations.sglang.plugin import NAME

OPTION = "json_model_override_args"
PAGE = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text(encoding="utf-8")


def test_what_the_engine_must_not_have_is_named():
    needs = {"dcp_size": (1, 1), "speculative_algorithm": (None, "EAGLE")}
    message = "token sparse attention needs speculative_algorithm None, got EAGLE"
    with pytest.raises(ValueError, match=message):
        engine.check_needs(needs)
    engine.check_needs({"dcp_size": (1, 1)})


@pytest.mark.parametrize(("page_size", "fits"), [(1, False), (31, False), (32, True), (64, True)])
def test_pages_must_not_be_small(page_size, fits):
    config = KVSamplingConfig()
    assert config.probe_stride == 128
    if fits:
        engine.check_page_size(page_size, [config])
    else:
        message = f"page_size must be at least 32, .*128th token is one; got {page_size}"
        with pytest.raises(ValueError, match=message):
            engine.check_page_size(page_size, [config])
    engine.check_page_size(page_size, [TokenSelectionConfig()])


def test_token_selection_does_not_share_prefixes():
    selects, samples = TokenSelectionConfig(), KVSamplingConfig()
    with pytest.raises(ValueError, match="start SGLang with --disable-radix-cache"):
        engine.check_shared_prefixes(Settings(config=selects), [samples, selects])
    engine.check_shared_prefixes(Settings(config=selects, prefix_caching="allow"), [selects])
    engine.check_shared_prefixes(Settings(), [samples])


def test_settings_come_with_the_model_overrides():
    config = KVSamplingConfig(num_samples=1000)
    given = {"token_sparse_attention": {"config": config.to_dict(), "impl": "reference"}}
    settings = read_settings(given, OPTION, engine._ENTRIES)
    assert settings == Settings(config=config, impl="reference")
    assert set(ENTRIES) - set(engine._ENTRIES) == {"warm_up"}
    given["token_sparse_attention"]["warm_up"] = False
    with pytest.raises(ValueError, match=r"json_model_override_args.*warm_up"):
        read_settings(given, OPTION, engine._ENTRIES)


@pytest.mark.parametrize(
    "text", re.findall(r"--json-model-override-args '(.*?)'", PAGE, re.DOTALL)
)
def test_the_settings_shown_can_be_read(text, monkeypatch):
    monkeypatch.setattr(settings_module, "load_config", lambda _: KVSamplingConfig())
    assert read_settings(json.loads(text), OPTION, engine._ENTRIES) is not None


def test_batches_with_more_than_causal_attention_are_known():
    assert engine.batch_obstacle(SimpleNamespace(spec_info=None)) is None
    assert "spec_info" in engine.batch_obstacle(SimpleNamespace(spec_info=object()))


@pytest.mark.sglang
def test_sglang_knows_the_backend_after_its_plugins_are_loaded():
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins

    load_plugins()  # it finds this one by its entry point
    assert NAME in ATTENTION_BACKENDS
    assert NAME in ATTENTION_BACKEND_CHOICES


@pytest.mark.sglang
def test_without_settings_it_does_not_start():
    config = SimpleNamespace(model_override_args={})
    with pytest.raises(ValueError, match="backend tsa needs json_model_override_args"):
        engine.engine_settings(SimpleNamespace(model_config=config))
