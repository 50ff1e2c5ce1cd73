"""Gather and scatter: packed layout, identity on kept rows, fallback elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import SMALL, kept_mask, make_problem
from token_sparse_attention import (
    TokenSelection,
    compress,
    decompress,
    score_tokens,
    select_tokens,
)


def select(problem, config=SMALL, **kwargs):
    return select_tokens(
        score_tokens(problem.query, problem.key, config.observation_window), config, **kwargs
    )


def test_packed_rows_are_the_selected_rows_of_each_head():
    problem = make_problem(batch=2, heads=6, kv_heads=2, query_len=120)
    selection = select(problem)
    packed = compress(*problem, selection)
    assert packed.cu_seqlens_q.dtype == packed.cu_seqlens_k.dtype == torch.int32
    assert torch.equal(packed.cu_seqlens_q, packed.cu_seqlens_k)
    sequence = 0
    for row in range(2):
        for head in range(6):
            chosen = selection.indices[row, head, : selection.lengths[row, head]]
            rows = slice(*packed.cu_seqlens_k[sequence : sequence + 2].tolist())
            assert torch.equal(packed.query[rows], problem.query[row, head, chosen])
            assert torch.equal(packed.key[rows], problem.key[row, head // 3, chosen])
            assert torch.equal(packed.value[rows], problem.value[row, head // 3, chosen])
            sequence += 1
    assert packed.max_seqlen_k >= packed.cu_seqlens_k.diff().max()


def test_a_chunk_gathers_queries_from_its_own_slots_only():
    problem = make_problem(query_len=50, kv_len=140)
    selection = select(problem)
    packed = compress(*problem, selection)
    for head in range(4):
        chosen = selection.indices[0, head, : selection.lengths[0, head]]
        mine = chosen[chosen >= 90] - 90
        rows = slice(*packed.cu_seqlens_q[head : head + 2].tolist())
        assert torch.equal(packed.query[rows], problem.query[0, head, mine])
    assert len(set(packed.cu_seqlens_q.diff().tolist())) > 1, "differs per head"


@given(st.booleans(), st.integers(60, 140), st.integers(0, 99))
def test_round_trip_is_identity_on_kept_rows_and_the_fallback_elsewhere(
    use_fallback, length, seed
):
    problem = make_problem(batch=2, query_len=length - 20, kv_len=length, seed=seed)
    selection = select(problem)
    packed = compress(*problem, selection)
    fallback = torch.randn_like(problem.query) if use_fallback else None
    before = None if fallback is None else fallback.clone()
    full = decompress(packed.query, selection, length - 20, fallback)
    kept = kept_mask(selection.indices, length)[:, :, 20:, None]
    rest = torch.zeros_like(full) if fallback is None else fallback
    assert torch.equal(full, torch.where(kept, problem.query, rest))
    if fallback is not None:
        assert torch.equal(fallback, before), "the given fallback is not changed"


def test_dense_sequences_of_a_mixed_batch_can_be_emptied():
    problem = make_problem(batch=2, query_len=100)
    selection = select(problem)._replace(ran_sparse=torch.tensor([False, True]))
    packed = compress(*problem, selection.sparse_only())
    assert (packed.cu_seqlens_k[:5] == 0).all()
    assert len(packed.key) == selection.lengths[1].sum()


def test_strided_views_are_accepted():
    problem = make_problem(batch=2, query_len=90)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in problem]
    assert not strided[0].is_contiguous()
    selection = select(problem)
    for a, b in zip(compress(*problem, selection)[:3], compress(*strided, selection)[:3]):
        assert torch.equal(a, b)


def test_mismatches_are_named():
    problem = make_problem(query_len=100)
    selection = select(problem)
    packed = compress(*problem, selection)
    other = make_problem(query_len=90)
    with pytest.raises(ValueError, match=r"selection must index key's 90 slots.*made for 100"):
        compress(*other, selection)
    with pytest.raises(ValueError, match=r"selection.indices must have shape \[1, 2, K\]"):
        compress(problem.query[:, :2], problem.key, problem.value, selection)
    with pytest.raises(ValueError, match="query_len must not exceed the selection's 100 slots"):
        decompress(packed.query, selection, 101)
    with pytest.raises(ValueError, match="out must have one row per selected query"):
        decompress(packed.query[1:], selection, 100)
    with pytest.raises(ValueError, match=r"fallback must have shape \[1, 4, 100, 16\]"):
        decompress(packed.query, selection, 100, fallback=torch.zeros(1, 4, 99, 16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"key": torch.zeros(1, 3, 100, 16)}, ValueError, "value must have key's shape"),
        ({"value": torch.zeros(1, 2, 50, 16)}, ValueError, r"value must have key's shape \[1, 2"),
        ({"value": torch.zeros(1, 2, 100, 16).half()}, TypeError, "value must have query's dtype"),
        ({"query": torch.zeros(1, 5, 100, 16)}, ValueError, "a multiple of key's 2 heads, got 5"),
        ({"selection": 3}, TypeError, "selection must be a TokenSelection, got int"),
    ],
)
def test_bad_compress_arguments_are_named(change, error, message):
    problem = make_problem(query_len=100)
    arguments = problem._asdict() | {"selection": select(problem)} | change
    with pytest.raises(error, match=message):
        compress(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": None}, TypeError, "out must be a tensor, got NoneType"),
        ({"out": torch.zeros(1, 4, 100, 16)}, ValueError, r"out must have shape \[T_q, D\]"),
        ({"selection": None}, TypeError, "selection must be a TokenSelection, got NoneType"),
        ({"fallback": [0]}, TypeError, "fallback must be a tensor, got list"),
        ({"fallback": torch.zeros(100, 16)}, ValueError, r"fallback must have shape \[B, H"),
        ({"out": torch.zeros(200, 16, device="meta")}, ValueError, "selection must be on meta"),
    ],
)
def test_bad_decompress_arguments_are_named(change, error, message):
    problem = make_problem(query_len=100)
    selection = select(problem)
    arguments = {
        "out": compress(*problem, selection).query,
        "selection": selection,
        "query_len": 100,
    } | change
    with pytest.raises(error, match=message):
        decompress(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.zeros(1, 4, 0, dtype=torch.int64)}, "must list the tokens, got none"),
        (
            {"lengths": torch.ones(1, 3)},
            r"lengths must have shape \[1, 4\], got \[1, 3\]",
        ),
    ],
)
def test_selections_that_cannot_be_gathered_are_named(changes, message):
    problem = make_problem(query_len=100)
    selection = select(problem)
    packed = compress(*problem, selection)
    broken = selection._replace(**changes)
    with pytest.raises(ValueError, match=message):
        compress(*problem, broken)
    with pytest.raises(ValueError, match=message):
        decompress(packed.query, broken, 100)


def test_a_selection_of_a_chunk_needs_kv_len():
    problem = make_problem(query_len=60, kv_len=100)
    selection = select(problem)._replace(kv_len=None)
    with pytest.raises(ValueError, match=r"kv_len must be given .* 100 and 60; got None"):
        compress(*problem, selection)


def test_any_strides_of_the_fallback_are_accepted():
    problem = make_problem(query_len=100)
    selection = select(problem)
    packed = compress(*problem, selection)
    fallback = torch.randn(1, 4, 16, 100).transpose(2, 3)
    expected = decompress(packed.query, selection, 100, fallback.contiguous())
    assert torch.equal(decompress(packed.query, selection, 100, fallback), expected)


def test_selection_without_kv_len_means_as_many_slots_as_queries():
    selection = TokenSelection(
        torch.tensor([[[1, 2, -1]]]), torch.tensor([[2]]), torch.tensor([True])
    )
    x = torch.arange(4.0).view(1, 1, 4, 1)
    packed = compress(x, x, x, selection)
    assert decompress(packed.query, selection, 4).flatten().tolist() == [0, 1, 2, 0]
