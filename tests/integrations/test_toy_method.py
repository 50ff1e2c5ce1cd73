"""A method from outside the package, in a whole model."""

from __future__ import annotations

import pytest
import torch

from integrations.models import LAYERS, make_ids, make_model
from integrations.test_transformers import CLOSE, reasons
from token_sparse_attention import DenseReason, LayerProfile
from token_sparse_attention.integrations.transformers import apply
from toy_method import ToyConfig


def test_a_method_from_outside_the_package_runs_in_a_model():
    """Two layers attend within a window, as one of a model with such layers would."""
    model, ids = make_model("Qwen2"), make_ids()
    windowed = make_model("Qwen2", use_sliding_window=True, sliding_window=40, max_window_layers=1)
    assert windowed.config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    expected = windowed(ids).logits
    with apply(model, LayerProfile(ToyConfig(width=40), {1: {}, 2: {}})) as report:
        logits = model(ids).logits
        model(ids[:, :40])
    torch.testing.assert_close(logits, expected, **CLOSE)
    first, last = report.prefills()
    assert [record.paths for record in first] == [["dense"], ["sparse"], ["sparse"]]
    assert first[1].config == ToyConfig(width=40)
    assert first[1].kept == [[0] * model.config.num_attention_heads]
    short = str(DenseReason.SHORT_CONTEXT)
    assert reasons(report)[1:] == [short] * (LAYERS - 1)
    assert len(last) == LAYERS
    assert "dense" in str(report)


def test_its_layers_may_differ():
    model, ids = make_model(), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :150] = 0
    profile = LayerProfile(ToyConfig(width=60), {0: {}, 2: {"width": 40}})
    with apply(model, profile) as report:
        model(ids, attention_mask=mask)
    assert [record.paths for record in report] == [
        ["sparse", "dense"], ["dense"], ["sparse", "sparse"]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="width must be at least 1"):
        LayerProfile(ToyConfig(), {0: {"width": 0}})
