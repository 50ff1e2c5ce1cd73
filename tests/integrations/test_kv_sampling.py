"""Sliding windows, sinks, sampled keys and dense last queries, in whole models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from integrations.models import CONFIG, LAYERS, SAMPLING, make_ids, make_model, oracle, sharp
from integrations.test_transformers import CLOSE, greedy, paths
from token_sparse_attention import DenseReason, LayerProfile, crossover
from token_sparse_attention.integrations.transformers import apply

CONFIGS = {
    "shared": SAMPLING,
    "no dense queries": dataclasses.replace(SAMPLING, dense_queries=0),
    "dense heads": dataclasses.replace(SAMPLING, dense_heads=(0, 3)),
    "per head": dataclasses.replace(
        SAMPLING, budget="per_head", sliding_window=90, num_samples=96
    ),
}


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_oracle(name, family):
    model, ids = sharp(family).double(), make_ids()
    dense = model(ids).logits
    with oracle(model, CONFIGS[name]):
        expected = model(ids).logits
    with apply(model, CONFIGS[name]) as report:
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert paths(report) == [["sparse"]] * LAYERS
    assert (logits - dense).abs().max() > 0.01


@pytest.mark.parametrize(
    "changes", [{"num_samples": 1600}, {"dense_queries": 400}, {"sliding_window": 197}]
)
def test_where_every_token_is_seen_logits_are_dense(changes):
    model, ids = sharp(), make_ids()
    config = dataclasses.replace(SAMPLING, **changes)
    with apply(model, config) as report:
        logits = model(ids).logits
    assert paths(report) == [["sparse"]] * LAYERS
    torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_turns_equal_their_definition(name):
    config, model, ids = CONFIGS[name], sharp(), make_ids(250)

    def chunked():
        cache = DynamicCache()
        for start in (0, 100):
            model(ids[:, start : start + 100], past_key_values=cache)
        return greedy(model, ids[:, 200:], cache, 4)

    with oracle(model, config):
        expected = chunked()
    with apply(model, config) as report:
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=100)
    assert generated[:, 250:].tolist() == expected.tolist()
    assert [one[0].query_len for one in report.prefills()] == [100, 100, 50]
    assert all(record.paths == ["sparse"] for record in report)


def test_heads_that_the_model_does_not_have_are_refused_at_once():
    with pytest.raises(ValueError, match=r"below the layer's 4 query heads, got \(4,\)"):
        apply(make_model(), dataclasses.replace(SAMPLING, dense_heads=(4,)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name, side):
    model, ids = sharp(), make_ids(batch=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 50, 184)):
        mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, CONFIGS[name]) as report:
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        record = report.last_prefill()[0]
        assert record.paths == ["sparse", "sparse", "dense"]
        assert record.reasons[2] == str(DenseReason.SHORT_CONTEXT)
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real]).logits[0]
            torch.testing.assert_close(batch[row, real], alone, **CLOSE)


def test_what_is_kept_are_sinks_and_sampled_keys():
    model, ids = sharp(), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :184] = 0
    with apply(model, SAMPLING) as report:
        model(ids, attention_mask=mask)
    for record in report:
        kept, dense = record.kept
        assert all(20 <= count <= 26 for count in kept), "2 sinks, 24 samples"
        assert dense == [16] * 4, "too short, so it ran dense"
        assert record.kept_share == pytest.approx((sum(kept) / 200 + 4) / 8)
    assert "; context too short" in str(report)
    with apply(model, dataclasses.replace(SAMPLING, num_samples=0)) as report:
        model(ids[:1])
    assert [record.kept for record in report] == [[[2] * 4]] * LAYERS


class Whole(TorchDispatchMode):
    """Notes the shapes of all whole numbers that are made meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.dtype in (torch.int32, torch.int64):
                self.shapes.add(tuple(one.shape))
        return made


def test_reports_list_no_tokens():
    """Neither is a list of every head's tokens made for them, nor does one stay alive."""
    model, ids = sharp(), make_ids()
    with apply(model, dataclasses.replace(SAMPLING, num_samples=0)) as report:
        with Whole() as made:
            model(ids)
        assert paths(report) == [["sparse"]] * LAYERS
        assert (1, 4, 12, 2) in made.shapes, "the sinks of 12 blocks"
        assert (1, 4, ids.shape[1]) not in made.shapes
    for config in (SAMPLING, CONFIG):
        with apply(model, config) as report:
            model(ids)
        for record in report:
            tensors = [x for x in vars(record.selection).values() if isinstance(x, torch.Tensor)]
            assert len(tensors) == 5
            assert all(one.untyped_storage().nbytes() <= 4 * 8 for one in tensors)


def test_heads_may_sample_different_numbers():
    model, ids = sharp(), make_ids()
    with apply(model, CONFIGS["per head"]) as report:
        model(ids)
    assert any(len(set(record.kept[0])) > 1 for record in report)
    for record in report:
        (far,) = record.kept
        assert 75 <= sum(far) / len(far) <= 99, "2 sinks, 96 samples in the mean at most"


def test_layers_may_sample_different_numbers():
    model, ids = sharp(), make_ids()
    profile = LayerProfile(base=SAMPLING, layers={0: {}, 2: {"num_samples": 8}})
    with apply(model, profile) as report:
        model(ids)
    shares = [record.kept_share for record in report]
    assert shares[1] == 1
    assert shares[2] < 0.06 < shares[0] < 0.14


def test_positions_alone_decide(monkeypatch):
    """Queries before the crossover's position are dense, however the prompt is split."""
    model, ids = sharp().double(), make_ids()
    config = dataclasses.replace(SAMPLING, crossover="auto", dense_queries=0)
    monkeypatch.setattr(crossover, "sparse_from", lambda *_: crossover.SparseFrom(130))
    dense = model(ids).logits
    with apply(model, config) as report:
        whole, cache = model(ids).logits, DynamicCache()
        model(ids[:, :100], past_key_values=cache)
        assert [record.reasons for record in report.last_prefill()] == [
            [str(DenseReason.CROSSOVER_LENGTH)]
        ] * LAYERS
        last = model(ids[:, 100:], past_key_values=cache).logits
        assert paths(report) == [["sparse"]] * LAYERS
    torch.testing.assert_close(whole[:, 100:], last)
    torch.testing.assert_close(whole[:, :144], dense[:, :144])
    assert not torch.isclose(whole[:, 144:160], dense[:, 144:160]).all()
