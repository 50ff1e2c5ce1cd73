"""docs/vllm.md says what the code says."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from token_sparse_attention.integrations.serving.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def test_every_setting_is_listed():
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert listed == {"profile", *(field.name for field in fields(Settings))}


@pytest.mark.parametrize("text", re.findall(r"--additional-config '(.*?)'", PAGE, re.DOTALL))
def test_the_settings_shown_can_be_read(text, monkeypatch):
    from token_sparse_attention import KVSamplingConfig
    from token_sparse_attention.integrations.serving import settings

    monkeypatch.setattr(settings, "load_config", lambda _: KVSamplingConfig())
    assert read_settings(json.loads(text)) is not None
