"""Backends in their string form, and patterns on packed sequences."""

from __future__ import annotations

import pytest
import torch

from attention.by_hand import HEADS, LITTLE
from support import make_problem
from token_sparse_attention.attention.causal import (
    attend,
    attend_packed,
    backend_of_layer,
    backends_of_layers,
    parse_backend,
)
from token_sparse_attention.attention.patterns import PATTERNS, FlexPrefillConfig, MInferenceConfig

SCALE = 0.25


def pack(lengths):
    """Sequences of ``(queries, keys)``, with a tail that must not be read."""
    parts = [
        make_problem(heads=1, kv_heads=1, query_len=max(q, 1), kv_len=max(k, 1), seed=number)
        for number, (q, k) in enumerate(lengths)
    ]
    tail = torch.full((130, 16), torch.nan)
    packed = []
    for name, axis in (("query", 0), ("key", 1), ("value", 1)):
        rows = [getattr(p, name)[0, 0, : n[axis]] for p, n in zip(parts, lengths)]
        packed.append(torch.cat([*rows, tail]))
    offsets = [torch.tensor([0, *(n[axis] for n in lengths)]).cumsum(0).int() for axis in (0, 1)]
    return parts, packed, offsets


@pytest.mark.parametrize("config", LITTLE.values(), ids=LITTLE)
def test_packed_sequences_are_attended_as_each_alone(config):
    lengths = [(300, 300), (170, 290), (300, 300), (0, 40), (170, 290), (0, 0), (1, 1), (5, 131)]
    parts, packed, offsets = pack(lengths)
    backend = parse_backend(config)
    out, lse = attend_packed(
        *packed,
        *offsets,
        300,
        300,
        scale=SCALE,
        backend=backend,
        heads=range(8),
        num_heads=8,
        want_lse=True,
    )
    assert len(out) == len(packed[0])
    for number, (query_len, _) in enumerate(lengths):
        if query_len:
            alone = attend(*parts[number], scale=SCALE, backend=backend, want_lse=True)
            rows = slice(*offsets[0][number : number + 2].tolist())
            torch.testing.assert_close(out[rows], alone.out[0, 0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse[rows], alone.lse[0, 0], rtol=1e-5, atol=1e-6)


def test_equal_lengths_are_one_problem(monkeypatch):
    seen = []
    streaming = PATTERNS["streaming"]

    def run(query, *arguments, **settings):
        seen.append((*query.shape[1:3], query.data_ptr()))
        return streaming.run(query, *arguments, **settings)

    monkeypatch.setitem(PATTERNS, "streaming", streaming._replace(run=run))
    _, packed, offsets = pack([(50, 50), (50, 50), (20, 50), (50, 50)])
    for sequences in (4, 2):
        ends = [offset[: sequences + 1] for offset in offsets]
        attend_packed(
            *packed,
            *ends,
            50,
            50,
            scale=SCALE,
            backend="streaming",
            heads=range(sequences),
            num_heads=4,
        )
    assert [entry[:2] for entry in seen] == [(3, 50), (1, 20), (2, 50)]
    assert seen[-1][2] == packed[0].data_ptr(), "side by side, so not copied"


def test_settings_per_head_follow_the_heads():
    parts, packed, offsets = pack([(300, 300)] * 4)
    heads = [1, 0, 0, 1]  # a group of sequences that begins within a row of the batch
    out = attend_packed(
        *packed,
        *offsets,
        300,
        300,
        scale=SCALE,
        backend=parse_backend(HEADS),
        heads=heads,
        num_heads=2,
    ).out
    for number, head in enumerate(heads):
        both = [tensor.expand(-1, 2, -1, -1) for tensor in parts[number]]
        alone = attend(*both, scale=SCALE, backend=parse_backend(HEADS)).out[0, head]
        rows = slice(number * 300, (number + 1) * 300)
        torch.testing.assert_close(out[rows], alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="each of the 3 query heads, got 2"):
        attend_packed(
            *packed,
            *offsets,
            300,
            300,
            scale=SCALE,
            backend=parse_backend(HEADS),
            heads=heads,
            num_heads=3,
        )


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
        attend(query, key, value, scale=SCALE, backend=backend)


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
        ("streaming:[1]", ValueError, "must have a JSON object"),
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
