"""Backends in their string form."""

from __future__ import annotations

import pytest
import torch

from attention.by_hand import HEADS, LITTLE
from token_sparse_attention.attention.names import (
    backend_of_layer,
    backends_of_layers,
    parse_backend,
)
from token_sparse_attention.attention.patterns import PATTERNS, FlexPrefillConfig, MInferenceConfig
from token_sparse_attention.attention.resolve import resolve_backend

SCALE = 0.25


def test_budgets_of_layers_are_for_models():
    budgets = HEADS.heads
    backend = parse_backend(MInferenceConfig(layers=[budgets, budgets[::-1]], last_queries=16))
    assert [backend_of_layer(backend, layer, 2) for layer in range(2)] == [
        parse_backend(MInferenceConfig(heads=heads, last_queries=16))
        for heads in (budgets, budgets[::-1])
    ]
    assert backends_of_layers("auto", 2, 5) == ("auto", "auto")
    query, key, value = torch.randn(3, 1, 2, 40, 8)
    with pytest.raises(ValueError, match="layers must be None where one layer's attention runs"):
        resolve_backend(backend, query, key).attend(query, key, value, scale=SCALE)


@pytest.mark.parametrize(
    "config", [*LITTLE.values(), HEADS, MInferenceConfig(layers=[HEADS.heads, HEADS.heads[:1]])]
)
def test_settings_come_back_from_text(config):
    text = parse_backend(config)
    name = next(name for name, pattern in PATTERNS.items() if type(config) is pattern.config)
    assert text.startswith(f"{name}:{{")
    assert parse_backend(text) == text
    assert parse_backend(type(config)()) == parse_backend(f"{name}:{{}}") == name


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("flexprefil", ValueError, "did you mean 'flexprefill'"),
        ("flashh", ValueError, "did you mean 'flash'"),
        ("auto:{}", ValueError, "must be one of auto, fa4"),
        ("streaming:", ValueError, "not valid JSON"),
        ("streaming:[1]", ValueError, "must be a JSON object"),
        ('streaming:{"sink": 3}', ValueError, "no setting 'sink'; did you mean 'sink_size'"),
        ('streaming:{"sink_size": -1}', ValueError, "'streaming': sink_size must be at least 0"),
        ('flexprefill:{"gamma": "1"}', TypeError, "'flexprefill': gamma must be a number"),
        ('minference:{"heads": 3}', TypeError, "heads must hold a budget per head, got 3"),
        ('minference:{"layers": 3}', TypeError, "per layer, or be a path; got 3"),
        ('minference:{"layers": "no/such.json"}', ValueError, "'minference': .*no/such.json"),
        ('minference:{"layers": [3]}', ValueError, r"layers\[0\] must be a list of heads"),
        (
            'minference:{"heads": [["stream_llm", 1, 1]], "layers": [[["stream_llm", 1, 1]]]}',
            ValueError,
            "heads and layers must not both be given",
        ),
        (3, TypeError, "must be a name or the settings of a pattern, got int"),
        (FlexPrefillConfig, TypeError, "got type"),
    ],
)
def test_what_is_no_backend_is_named(backend, error, message):
    with pytest.raises(error, match=message):
        parse_backend(backend)
