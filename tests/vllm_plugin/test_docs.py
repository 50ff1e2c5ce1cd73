"""docs/serving.md says what the code says."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from token_sparse_attention.integrations.serving.counters import _METRICS
from token_sparse_attention.integrations.serving.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_setting_is_listed():
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    listed -= {f"{name}_total" for name in _METRICS}
    assert listed == {"profile", *(field.name for field in fields(Settings))}


def test_every_metric_is_listed():
    listed = re.findall(r"^\| `(\w+)_total` \|", PAGE, re.MULTILINE)
    assert listed == list(_METRICS)


@pytest.mark.parametrize("text", re.findall(r"--additional-config '(.*?)'", PAGE, re.DOTALL))
def test_the_settings_shown_can_be_read(text, monkeypatch):
    from token_sparse_attention import KVSamplingConfig
    from token_sparse_attention.integrations.serving import settings

    monkeypatch.setattr(settings, "load_config", lambda _: KVSamplingConfig())
    assert read_settings(json.loads(text)) is not None


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.vllm
def test_the_engine_shown_runs():
    """With the bundled model, which has fewer layers and positions."""
    from token_sparse_attention import bundled

    (code,) = (block for block in blocks("python") if "LLM(" in block)
    smaller = {
        '"MODEL"': f"{str(bundled.MODEL)!r}, enforce_eager=True, kv_cache_memory_bytes=2**28",
        "[15, 16, 17, 18]": "[5, 6]",
        "max_model_len=131072": "max_model_len=4096",
    }
    for shown, used in smaller.items():
        assert code.count(shown) == 1
        code = code.replace(shown, used)
    names = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    config = names["llm"].llm_engine.vllm_config.compilation_config
    impls = [layer.impl for layer in config.static_forward_context.values()]
    assert {type(impl).__name__ for impl in impls} == {"CPUTokenSparseImpl"}


@pytest.mark.vllm
@pytest.mark.parametrize(
    "command", [block for block in blocks("bash") if block.startswith("vllm serve")], ids=["serve"]
)
def test_the_server_shown_starts_with_these_arguments(command):
    """Its settings reach the plugin, with prefix caching and chunked prefill on."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from token_sparse_attention import KVSamplingConfig, bundled
    from token_sparse_attention.integrations.vllm.engine import engine_settings

    _, _, model, *flags = shlex.split(command.replace("\\\n", " "))
    assert model == "MODEL"
    flags = ["4096" if flag == "131072" else flag for flag in flags]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(bundled.MODEL), *flags]
    )
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert engine_settings(config).config == KVSamplingConfig()
