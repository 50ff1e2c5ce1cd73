"""The estimates that patterns share, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import make_problem
from token_sparse_attention.attention.block_mask import BlockGrid
from token_sparse_attention.attention.patterns.estimate import (
    block_means,
    block_sums,
    blocks_at_distances,
    distance_mass,
    last_query_attention,
    smallest_cover,
)


def test_block_means_and_sums_of_a_short_last_block():
    tokens = torch.randn(2, 3, 21, 4)
    means, sums = block_means(tokens, 8), block_sums(tokens[..., 0], 8)
    for block in range(3):
        part = tokens[:, :, block * 8 : (block + 1) * 8]
        torch.testing.assert_close(means[:, :, block], part.mean(2))
        torch.testing.assert_close(sums[:, :, block], part[..., 0].sum(2))


def test_last_query_attention_is_the_end_of_the_attention_matrix():
    query, key, _ = make_problem(batch=2, heads=3, kv_heads=1, query_len=40, kv_len=57)
    attention = last_query_attention(query, key[:, 0], 16, 0.3)
    causal = torch.arange(57) <= torch.arange(17, 57)[:, None]
    logits = (query @ key.transpose(2, 3) * 0.3).masked_fill(~causal, -torch.inf)
    torch.testing.assert_close(attention, logits.softmax(-1)[:, :, -16:])


@given(window=st.integers(1, 12), earlier=st.integers(0, 30))
def test_distance_mass_sums_the_diagonals(window, earlier):
    length = window + earlier
    causal = torch.arange(length) <= torch.arange(earlier, length)[:, None]
    attention = torch.rand(2, window, length) * causal
    mass = distance_mass(attention)
    for distance in range(length):
        parts = [
            attention[:, row, row + earlier - distance]
            for row in range(window)
            if row + earlier >= distance
        ]
        torch.testing.assert_close(mass[:, distance], torch.stack(parts).sum(0))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 4),
)
def test_smallest_cover_is_small_and_covers(weights, share, minimum):
    mass = torch.tensor(weights, dtype=torch.float64)
    marked = smallest_cover(mass, share, minimum)
    assert mass[marked].sum() >= share * mass.sum() - 1e-9
    count = int(marked.sum())
    assert count >= min(minimum, len(weights))
    if count < len(weights) and count:
        assert mass[marked].min() >= mass[~marked].max()
    if share < 1 and count > minimum:
        assert mass[marked].sum() - mass[marked].min() < share * mass.sum()


def test_smallest_cover_keeps_everything_where_the_mass_is_no_number():
    mass = torch.tensor([[0.9, 0.1, 0.0], [0.9, torch.nan, 0.0]])
    assert smallest_cover(mass, 0.5).tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize(
    ("query_len", "kv_len", "block_size"),
    [(48, 48, (8, 8)), (45, 45, (8, 8)), (30, 53, (8, 8)), (30, 53, (6, 10))],
)
def test_blocks_at_distances_hold_a_pair_at_a_chosen_distance(query_len, kv_len, block_size):
    chosen = torch.rand(1, 2, kv_len) < 0.08
    marked = blocks_at_distances(chosen, BlockGrid(query_len, kv_len, block_size))
    expected = torch.zeros_like(marked)
    for row in range(query_len):
        position = row + kv_len - query_len
        for slot in range(position + 1):
            place = row // block_size[0], slot // block_size[1]
            expected[:, :, place[0], place[1]] |= chosen[:, :, position - slot]
    # Pairs in which a short block would go on beyond the keys do not exist.
    assert torch.equal(marked, expected)
