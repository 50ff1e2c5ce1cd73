"""docs/vllm.md says what the code says, benchmarks/serving what the results say."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from token_sparse_attention.integrations.vllm.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "benchmarks" / "serving" / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_results_give():
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks/serving/page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    tables = page.tables()
    assert fill(MEASURED, tables) == MEASURED
    assert all(table in MEASURED for table in tables.values()), "every table has its place"


def test_every_setting_is_listed():
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert listed == {"profile", *(field.name for field in fields(Settings))}


@pytest.mark.parametrize("text", re.findall(r"--additional-config '(.*?)'", PAGE, re.DOTALL))
def test_the_settings_shown_can_be_read(text, monkeypatch):
    from token_sparse_attention import KVSamplingConfig
    from token_sparse_attention.integrations.vllm import settings

    monkeypatch.setattr(settings, "load_config", lambda _: KVSamplingConfig())
    assert read_settings(json.loads(text)) is not None
