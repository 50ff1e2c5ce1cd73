"""Scores of keys: against one softmax over everything, and their properties."""

from __future__ import annotations

import pytest
import torch

from support import make_problem
from token_sparse_attention import score_tokens

PROBES = 16


def literal_scores(query, key, num_probes):
    """The score written as one sum over an explicit S x S softmax, K repeated per head."""
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1).double()
    length = key.shape[2]
    logits = query.double() @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    probs = logits.masked_fill(future, -torch.inf).softmax(-1)
    return probs[:, :, -num_probes:, :-num_probes].mean(2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 2)])
@pytest.mark.parametrize("length", [63, 111, 257])
def test_scores_equal_the_full_softmax(heads, kv_heads, length):
    query, key, _ = make_problem(batch=2, heads=heads, kv_heads=kv_heads, query_len=length)
    scores = score_tokens(query, key, PROBES)
    assert scores.dtype == torch.float32
    assert scores.shape == (2, heads, length - PROBES)
    expected = literal_scores(query, key, PROBES)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_dtypes(dtype):
    query, key, _ = make_problem(dtype=dtype)
    scores = score_tokens(query, key, PROBES)
    assert scores.dtype == torch.float32
    expected = literal_scores(query, key, PROBES)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)


def test_scores_of_extreme_logits_stay_finite():
    query, key, _ = make_problem(sharpness=1e4)
    assert score_tokens(query, key, PROBES).isfinite().all()


def test_scale_is_the_factor_of_the_logits():
    query, key, _ = make_problem()
    scaled = score_tokens(query * 3, key, PROBES, scale=0.25 / 3)
    torch.testing.assert_close(scaled, score_tokens(query, key, PROBES, scale=0.25))
    assert not torch.allclose(scaled, score_tokens(query, key, PROBES, scale=0.5))


def test_scores_of_a_context_within_the_probes_are_empty():
    query, key, _ = make_problem(query_len=PROBES)
    assert score_tokens(query, key, PROBES).shape == (1, 4, 0)


def test_scores_of_a_chunk_use_its_last_queries_and_all_keys():
    query, key, _ = make_problem(query_len=150)
    chunk = score_tokens(query[:, :, -40:], key, PROBES)
    assert torch.equal(chunk, score_tokens(query, key, PROBES))


def test_a_chunk_shorter_than_the_probes_has_no_scores():
    query, key, _ = make_problem(query_len=10, kv_len=100)
    assert score_tokens(query, key, PROBES).isnan().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible_to_scores(side):
    query, key, _ = make_problem(query_len=130)
    real = slice(30, 130) if side == "left" else slice(0, 100)
    mask = torch.zeros(1, 130, dtype=torch.bool)
    mask[:, real] = True
    query, key = query.clone(), key.clone()
    query[:, :, ~mask[0]] = key[:, :, ~mask[0]] = torch.nan
    padded = score_tokens(query, key, PROBES, padding_mask=mask)
    alone = score_tokens(query[:, :, real], key[:, :, real], PROBES)
    scored = slice(real.start, real.stop - PROBES)
    assert torch.equal(padded[:, :, scored], alone)
    rest = padded.clone()
    rest[:, :, scored] = 0
    assert not rest.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        (
            {"query": torch.zeros(2, 3)},
            ValueError,
            r"query must have shape \[B, H, S, D\], got \[2, 3\]",
        ),
        ({"key": torch.zeros(3)}, ValueError, r"key must have shape \[B, H_kv, S, D\], got \[3\]"),
        (
            {"query": torch.zeros(1, 4, 50, 16).long()},
            TypeError,
            "query must have a floating dtype",
        ),
        (
            {"query": torch.zeros(1, 4, 50, 16).to(torch.float8_e4m3fn)},
            TypeError,
            "query must have a floating dtype, got torch.float8_e4m3fn",
        ),
        (
            {"query": torch.zeros(1, 4, 50, 16).to_sparse()},
            TypeError,
            "query must be a strided tensor, got a nested or sparse one",
        ),
        ({"key": torch.zeros(1, 2, 50, 16).half()}, TypeError, "key must have query's dtype"),
        (
            {"key": torch.zeros(1, 2, 50, 8)},
            ValueError,
            "key must have query's batch and head size",
        ),
        (
            {"key": torch.zeros(2, 2, 50, 16)},
            ValueError,
            "key must have query's batch and head size",
        ),
        (
            {"key": torch.zeros(1, 3, 50, 16)},
            ValueError,
            "query must have a multiple of key's 3 heads",
        ),
        ({"key": torch.zeros(1, 2, 49, 16)}, ValueError, "query must not be longer than key's 49"),
        ({"key": torch.zeros(1, 2, 0, 16)}, ValueError, "key must not be empty"),
        (
            {"key": torch.zeros(1, 2, 50, 16, device="meta")},
            ValueError,
            "key must be on query's device",
        ),
        ({"num_probes": 0.005}, TypeError, "num_probes must be an int, got 0.005"),
        ({"num_probes": 0}, ValueError, "num_probes must be at least 1, got 0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference, triton; got 'cuda'"),
        ({"scale": "1"}, TypeError, "scale must be a number or None, got '1'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and above 0, got nan"),
        ({"scale": 0}, ValueError, "scale must be finite and above 0, got 0"),
        ({"scale": -0.25}, ValueError, "scale must be finite and above 0, got -0.25"),
        (
            {"padding_mask": torch.ones(1, 50)},
            TypeError,
            "padding_mask must be a bool tensor.*float32",
        ),
        ({"padding_mask": [True]}, TypeError, "padding_mask must be a bool tensor.*list"),
        (
            {"padding_mask": torch.ones(1, 9, dtype=torch.bool)},
            ValueError,
            r"S_kv\] = \[1, 50\], got \[1, 9\]",
        ),
        ({"padding_mask": torch.zeros(1, 50, dtype=torch.bool)}, ValueError, "one contiguous run"),
        (
            {"padding_mask": torch.arange(50)[None] != 3},
            ValueError,
            "row 0 has 49 between slots 0 and 50",
        ),
    ],
)
def test_bad_score_arguments_are_named(change, error, message):
    query, key, _ = make_problem(query_len=50)
    arguments = {"query": query, "key": key, "num_probes": PROBES} | change
    with pytest.raises(error, match=message):
        score_tokens(**arguments)
