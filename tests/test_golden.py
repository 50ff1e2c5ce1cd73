"""The published code's inputs and outputs, matched number for number."""

from __future__ import annotations

import pytest
import torch

from support import GOLDEN, GOLDEN_CASES, Problem, golden_case, with_selection
from token_sparse_attention import (
    reference,
    score_tokens,
    select_tokens,
)


@pytest.fixture(params=GOLDEN_CASES)
def case(request):
    return golden_case(request.param)


def test_every_file_is_covered():
    assert sorted(path.stem for path in GOLDEN.glob("*.npz")) == GOLDEN_CASES


def test_scores(case):
    tensors, config, _ = case
    scores = score_tokens(tensors["query"], tensors["key"], config.observation_window)
    torch.testing.assert_close(scores, tensors["window_scores"], rtol=1e-5, atol=1e-7)


def test_indices_from_published_scores(case):
    tensors, config, selected = case
    selection = select_tokens(tensors["window_scores"], config)
    if selected is None:
        assert selection.ran_sparse.tolist() == [False]
    else:
        assert torch.equal(selection.indices, tensors["indices"])
        assert (selection.lengths == selected).all()


def test_operator(case):
    tensors, config, selected = case
    problem = Problem(tensors["query"], tensors["key"], tensors["value"])
    out, selection = with_selection(problem, config)
    assert selection.ran_sparse.tolist() == [selected is not None]
    if selected is not None:
        assert torch.equal(selection.indices, tensors["indices"])
    published = tensors["output"].view(1, *problem.query.shape[1:3][::-1], -1).transpose(1, 2)
    torch.testing.assert_close(out, published, rtol=1e-5, atol=5e-6)


def test_reference(case):
    tensors, config, _ = case
    query, key, value = (tensors[name][0] for name in ("query", "key", "value"))
    out, _ = reference.token_sparse_attention(query, key, value, config, query.shape[-1] ** -0.5)
    published = tensors["output"].view(query.shape[1], query.shape[0], -1).transpose(0, 1)
    torch.testing.assert_close(out, published, rtol=1e-5, atol=1e-5)
