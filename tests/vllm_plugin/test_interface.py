"""A vLLM with another interface is refused in one sentence, where sparse attention is on."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from token_sparse_attention.integrations.serving.settings import KEY
from token_sparse_attention.integrations.vllm import interface, plugin

SHARED = """
class AttentionBackend:
    accept_output_buffer: bool = False

class CommonAttentionMetadata:
{fields}

class AttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device): ...
"""
STOCK = """
class {prefix}Backend:
    supported_dtypes = []

class {prefix}MetadataBuilder:
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...

class {impl}:
    def __init__(self, {impl_arguments}): ...
    def forward(self, {forward_arguments}): ...
"""


@pytest.fixture(params=["cpu", "cuda"])
def sources(request, tmp_path, monkeypatch):
    """vLLM's sources as far as they are read; and the device."""
    backend = interface._BACKENDS[request.param]
    fields = "\n".join(f"    {name}: int" for name in interface._NEEDED_FIELDS)
    own = STOCK.format(
        prefix=backend.prefix,
        impl=backend.impl,
        impl_arguments=", ".join(interface._IMPL),
        forward_arguments=", ".join(interface._FORWARD),
    )
    files = {tmp_path / "v1/attention/backend.py": SHARED.format(fields=fields)}
    files[tmp_path / backend.module] = own
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    return SimpleNamespace(device=request.param, files=list(files))


CHANGES = {
    "a new argument": ("output_block_scale", "output_block_scale, step", "forward takes"),
    "a renamed argument": ("fast_build", "quick_build", "build takes"),
    "a new setting of a layer": ("sinks)", "sinks, gate)", "__init__ takes"),
    "no such function": ("def build", "def make", r"no .*MetadataBuilder\.build"),
    "no such class": ("class CommonAttentionMetadata", "class Common", "Metadata has no _num"),
    "a field that is gone": ("    seq_lens: int\n", "", "has no seq_lens"),
    "a field per request": ("    seq_lens: int\n", "    turns: int\n    seq_lens: int\n", "turns"),
    "a new promise": ("supported_dtypes", "supports_no_keys", "Backend has supports_no_keys"),
    "no Python": ("class Attention", "clas Attention", r"cannot be read \(SyntaxError\)"),
}


def test_the_known_interface_is_taken(sources):
    interface.check_interface(sources.device)


@pytest.mark.parametrize("change", CHANGES)
def test_another_interface_is_refused(sources, change):
    old, new, why = CHANGES[change]
    for file in sources.files:
        file.write_text(file.read_text().replace(old, new))
    with pytest.raises(RuntimeError, match=f"does not know this vLLM: .*{why}.*; install a"):
        interface.check_interface(sources.device)


def test_a_backend_that_is_gone_is_refused(sources):
    sources.files[1].unlink()
    with pytest.raises(RuntimeError, match=r"_attn\.py cannot be read \(FileNotFoundError\)"):
        interface.check_interface(sources.device)


@pytest.fixture
def unknown(sources, monkeypatch):
    """A vLLM of an unknown interface, whose stock CPU backend is a dict; and its options."""
    sources.files[1].unlink()
    engine = SimpleNamespace(additional_config={})
    stock = SimpleNamespace(CPU_ATTN=SimpleNamespace(value="builtins.dict"))
    modules = {
        "vllm.config": SimpleNamespace(get_current_vllm_config=lambda: engine),
        "vllm.v1.attention.backends.registry": SimpleNamespace(AttentionBackendEnum=stock),
    }
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        modules[name] = ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(device=sources.device, engine=engine)


@pytest.mark.parametrize("options", [{}, {"other": 1}, None])
def test_an_unknown_vllm_starts_where_sparse_attention_is_off(unknown, options):
    unknown.engine.additional_config = options
    if unknown.device == "cpu":  # on a GPU nobody asks for the backend
        assert plugin.CPUTokenSparseBackend is dict


def test_an_unknown_vllm_stops_where_sparse_attention_is_on(unknown):
    unknown.engine.additional_config = {KEY: {"config": {}}}
    name = {"cpu": "CPUTokenSparseBackend", "cuda": "FlashTokenSparseBackend"}[unknown.device]
    with pytest.raises(RuntimeError, match="does not know this vLLM: "):
        getattr(plugin, name)


def test_a_vllm_without_a_registry_is_told_and_starts(monkeypatch, caplog):
    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # so that caplog sees it
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "Token sparse attention is off: it does not know this vLLM: " in caplog.text


def test_the_plugin_has_no_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'GPUTokenSparseBackend'"):
        plugin.GPUTokenSparseBackend  # noqa: B018


@pytest.mark.vllm
def test_the_plugin_knows_the_vllm_that_is_installed():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    for name in ("CPU_ATTN", "CUSTOM"):
        backend = AttentionBackendEnum[name].get_class()
        assert backend.__name__ == "CPUTokenSparseBackend"
    for device in ("cpu", "cuda"):
        interface.check_interface(device)
