"""Engines are started once per configuration; without SGLang their tests are skipped."""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
if HAS_SGLANG:  # read when SGLang is imported, here and in its other processes
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs SGLang: make test-sglang")
    for item in items:
        if item.get_closest_marker("sglang") and not HAS_SGLANG:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """Return the engine with some changes to the usual arguments, started if it was not yet."""
    from sglang_plugin.engines import Engine

    started = {}

    def get(**changes):
        key = repr(sorted(changes.items()))
        if key not in started:
            started[key] = Engine(tmp_path_factory.mktemp("metrics"), **changes)
        return started[key]

    yield get
    for engine in started.values():
        engine.stop()
