"""Block masks: the causal rule, the lists, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention.attention.block_mask import BlockGrid, BlockMask


def random_map(query_len, kv_len, block_size, share=0.4, batch=2, heads=3):
    grid = BlockGrid(query_len, kv_len, block_size)
    return torch.rand(batch, heads, grid.query_blocks, grid.kv_blocks) < share


@st.composite
def shapes(draw):
    query_len = draw(st.integers(1, 90))
    block_size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    return query_len, query_len + draw(st.integers(0, 60)), block_size


@given(shapes(), st.floats(0, 1))
def test_the_token_view_is_kept_blocks_plus_the_diagonal_under_the_causal_rule(shape, share):
    query_len, kv_len, (query_size, kv_size) = shape
    kept = random_map(*shape, share)
    mask = BlockMask.from_block_map(kept, BlockGrid(*shape))
    mask.validate()
    offset = kv_len - query_len
    view = mask.dense_view()
    for row in range(query_len):
        block = row // query_size
        rows = range(block * query_size, min((block + 1) * query_size, query_len))
        for slot in range(kv_len):
            number = slot // kv_size
            holds_a_query = any((other + offset) // kv_size == number for other in rows)
            expected = (kept[:, :, block, number] | holds_a_query) & (slot <= row + offset)
            assert torch.equal(view[:, :, row, slot], expected)
    position = torch.arange(query_len)
    assert view[:, :, position, position + offset].all(), "a query does not see itself"


@given(shapes())
def test_density(shape):
    query_len, kv_len, _ = shape
    everything = torch.ones_like(random_map(*shape))
    full = BlockMask.from_block_map(everything, BlockGrid(*shape))
    assert (full.density() == 1).all()
    slot = torch.arange(kv_len)
    assert torch.equal(full.dense_view()[1, 2], slot <= slot[kv_len - query_len :, None]), (
        "all blocks are not dense attention"
    )
    some = random_map(*shape)
    mask = BlockMask.from_block_map(some, BlockGrid(*shape))
    kept = mask.block_map().sum((2, 3))
    causal = full.block_map()[0, 0].sum()
    torch.testing.assert_close(mask.density(), kept / causal)


def test_lists_are_ascending_and_disjoint():
    mask = BlockMask.from_block_map(random_map(70, 101, (16, 8)), BlockGrid(70, 101, (16, 8)))
    blocks = mask.block_map()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in mask.full_count.shape)).tolist():
        batch, head, block = place
        partial = mask.partial_index[batch, head, block][: mask.partial_count[tuple(place)]]
        full = mask.full_index[batch, head, block][: mask.full_count[tuple(place)]]
        assert partial.tolist() == sorted(set(partial.tolist()))
        assert full.tolist() == sorted(set(full.tolist()))
        both = sorted(partial.tolist() + full.tolist())
        assert both == blocks[tuple(place)].nonzero().flatten().tolist()


def example():
    kept = torch.ones(1, 2, 4, 6, dtype=torch.bool)
    return BlockMask.from_block_map(kept, BlockGrid(60, 90, (16, 16)))


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("full_count", (0, 1, 2), 7, "full_count must be between 0 and 6"),
        ("full_index", (0, 1, 2, 0), 9, "full_index must be below 6"),
        ("full_index", (0, 1, 2, 1), 0, "full_index must ascend"),
        ("full_index", (0, 1, 0, 0), 4, "full_index must list blocks before"),
        ("partial_index", (0, 0, 3, 0), 0, "partial_index must list blocks on the diagonal"),
        ("partial_count", (0, 0, 3), 1, "partial_index must list every block on the diagonal"),
    ],
)
def test_validate_names_what_is_broken(field, place, value, message):
    mask = example()
    mask.validate()
    tensor = getattr(mask, field).clone()
    tensor[place] = value
    broken = dataclasses.replace(mask, **{field: tensor})
    with pytest.raises(ValueError, match=f"{message}.*batch 0, head {place[1]}, query block"):
        broken.validate()


def test_what_does_not_fit_is_refused():
    kept = torch.ones(1, 2, 4, 6, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"kept must be a bool tensor, got torch\.int64"):
        BlockMask.from_block_map(kept.long(), BlockGrid(60, 90, (16, 16)))
    with pytest.raises(ValueError, match=r"kept must have shape \[B, H, 4, 7\]"):
        BlockMask.from_block_map(kept, BlockGrid(60, 100, (16, 16)))
    with pytest.raises(ValueError, match="query_len must not exceed kv_len, which is 50"):
        BlockMask.from_block_map(kept, BlockGrid(60, 50, (16, 16)))
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        BlockMask.from_block_map(kept, BlockGrid(60, 90, (16, 0)))
    with pytest.raises(TypeError, match="block_size must be a pair"):
        BlockMask.from_block_map(kept, BlockGrid(60, 90, 16))
    mask = example()
    with pytest.raises(TypeError, match=r"full_index must be an int32 tensor, got torch\.int64"):
        dataclasses.replace(mask, full_index=mask.full_index.long())
    with pytest.raises(ValueError, match=r"partial_count must have shape \[B, H, 4\]"):
        dataclasses.replace(mask, partial_count=mask.partial_count[..., :3])
    with pytest.raises(ValueError, match="full_index must list at most 6 blocks of keys"):
        dataclasses.replace(mask, full_index=mask.full_index.repeat(1, 1, 1, 2))
