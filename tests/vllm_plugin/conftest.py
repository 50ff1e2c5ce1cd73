"""Engines are started once per configuration; without vLLM their tests are skipped."""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:  # read when vLLM is imported
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs vLLM: make test-vllm")
    for item in items:
        if item.get_closest_marker("vllm") and not HAS_VLLM:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def engines():
    """Return the engine with some changes to the usual arguments, started if it was not yet."""
    from vllm_plugin.engines import start_engine

    started = {}

    def get(**changes):
        key = repr(sorted(changes.items()))
        if key not in started:
            started[key] = start_engine(**changes)
        return started[key]

    return get


@pytest.fixture(scope="session")
def hf_model():
    import torch
    from transformers import AutoModelForCausalLM

    from token_sparse_attention import bundled

    return AutoModelForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.float32).eval()
