"""Times of every layer's attention on a model's own inputs."""

from __future__ import annotations

import pytest
import torch
from benchmarks.block_sparse.layer_times import layer_times, speed_up

from integrations.models import make_ids, make_model
from token_sparse_attention import TokenSelectionConfig
from token_sparse_attention.attention.names import parse_backend
from token_sparse_attention.evaluation.settings import Configuration

SPARSE = TokenSelectionConfig(
    drop_mass=0.4, observation_window=4, pool_size=3, min_tokens=8, sparse_layers=(1,)
)
STREAMING = parse_backend('streaming:{"sink_size": 0, "local_size": 1}')


@pytest.mark.parametrize("repeat_heads", [1, 3])
def test_every_layer_is_timed_under_every_setting(monkeypatch, repeat_heads):
    """What runs is what `tsa eval` would run, and the model reads on densely."""
    from benchmarks.block_sparse import layer_times as module

    ran, heads = [], set()

    def sparse(query, key, *_, **given):
        ran.append(given["execution"].attention_backend)
        heads.add((query.shape[1], key.shape[1]))
        return torch.zeros_like(query)

    monkeypatch.setattr(module, "token_sparse_attention", sparse)
    model, ids = make_model("Llama"), make_ids(90)
    dense = model(ids).logits
    states = []
    hook = model.lm_head.register_forward_hook(lambda *given: states.append(given[2]))
    configurations = {
        "tokens": Configuration(SPARSE),
        "blocks": Configuration(None, STREAMING),
        "both": Configuration(SPARSE, STREAMING),
    }
    times = layer_times(model, ids, configurations, budget=0.001, repeat_heads=repeat_heads)
    hook.remove()
    torch.testing.assert_close(states[0][:, -1], dense[:, -1], rtol=1e-4, atol=1e-4)
    assert {name: len(layers) for name, layers in times.items()} == dict.fromkeys(
        ("dense", *configurations), 3
    )
    assert set(ran) == {"auto", STREAMING}
    config = model.config
    usual = (config.num_attention_heads, config.num_key_value_heads)
    assert heads == {tuple(repeat_heads * number for number in usual)}
    assert all(entry["low_ms"] <= entry["high_ms"] for entry in times["both"])
    assert model.config._attn_implementation == "sdpa"


def test_speed_up_sums_over_layers():
    def layer(ms):
        return {"median_ms": ms, "low_ms": ms, "high_ms": ms}

    times = {"dense": [layer(4.0), layer(4.0)], "a": [layer(4.0), layer(1.0)]}
    assert speed_up(times, "a") == pytest.approx(1.6)
