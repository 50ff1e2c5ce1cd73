"""The selection kernels alone: ties and higher scores in different chunks of one head."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from token_sparse_attention.kernels import selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBES = 16


def select(scores, keep_ratio, *spans):
    """Select that share of each sequence's tokens, the probes among them."""
    rule = selection.Rule(
        drop_mass=0.0,
        num_probes=PROBES,
        pool_size=1,
        min_tokens=0,
        per_head=False,
        keep_ratio=keep_ratio,
        max_work=2.0,
        fixed_tokens=0.0,
        min_length=0.0,
    )
    bounds = torch.tensor(spans, dtype=torch.int32, device=DEVICE)
    return selection.select_tokens(scores, bounds, scores.shape[2] + PROBES, 0, rule)


@pytest.mark.parametrize("keep", [3, 40, 129, 199])
def test_ties_fill_earlier_chunks_than_higher_scores(monkeypatch, keep):
    """Of 190 equal scores more lie in the first chunk than are kept, or fewer."""
    monkeypatch.setattr(selection, "_CHUNK", 64)
    scores = torch.full((1, 2, 200), 0.25, device=DEVICE)
    scores[0, 0, 150:160] = 0.5  # behind most of the ties
    scores[0, 1, 20:30] = 0.5  # before them
    selected = select(scores, (keep + PROBES) / 216, (0, 216))
    assert selected.ran_sparse.tolist() == [True]
    assert selected.lengths.tolist() == [[keep + PROBES] * 2]
    for head in range(2):
        order = scores[0, head].argsort(descending=True, stable=True)
        probes = torch.arange(200, 200 + PROBES, device=DEVICE)
        expected = torch.cat((order[:keep].sort().values, probes))
        assert torch.equal(selected.indices[0, head, : keep + PROBES].long(), expected)
        assert (selected.indices[0, head, keep + PROBES :] == -1).all()


def test_slots_outside_a_sequence_are_not_counted(monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 64)
    scores = torch.zeros(2, 1, 200, device=DEVICE)  # as what lies outside may be
    selected = select(scores, 0.4, (70, 216), (0, 120))
    assert selected.lengths.tolist() == [[58], [48]]
    expected = [*range(70, 112), *range(200, 216)], [*range(32), *range(104, 120)]
    for row, slots in enumerate(expected):
        assert selected.indices[row, 0, : len(slots)].tolist() == slots
