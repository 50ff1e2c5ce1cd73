"""Scores of the keys before each block, against literal softmaxes in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from token_sparse_attention.blocks import Blocks

pytest.importorskip("triton")

from token_sparse_attention.kernels import block_scoring
from token_sparse_attention.kernels.block_scoring import Tiles, score_blocks
from token_sparse_attention.kernels.sampling import sample_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_TILES = (Tiles(64, 32, 64, 4, 2), Tiles(64, 32, 96, 4, 2))


def problem(blocks, lengths, *, group=2, kv_heads=2, head_dim=16, kv_len=None, seed=0):
    """Probes, keys and bounds; padding, and probes behind a sequence's end, are NaN.

    The numbers are eighths: sums of their products are exact, in whatever order.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_len = kv_len or max(lengths)
    heads = group * kv_heads
    num_probes = blocks.num_blocks * blocks.num_probes
    probes = torch.randn(len(lengths), heads, num_probes, head_dim, generator=generator)
    key = torch.randn(len(lengths), kv_heads, kv_len, head_dim, generator=generator)
    probes, key = (24 * probes).round() / 8, (8 * key).round() / 8
    bounds = torch.zeros(len(lengths), 2, dtype=torch.int32)
    for row, length in enumerate(lengths):
        start = (kv_len - length) * row // max(len(lengths) - 1, 1)  # left, middle, right
        bounds[row, 0], bounds[row, 1] = start, start + length
        key[row, :, :start] = torch.nan
        key[row, :, start + length :] = torch.nan
        probes[row, :, max(probe_position(blocks, 0, length), 0) :] = torch.nan
    return probes.to(DEVICE), key.to(DEVICE), bounds.to(DEVICE)


def probe_position(blocks, probe, length=None):
    """Where a probe stands; or, given a length, how many probes stand before it."""
    begin = (blocks.first - 1) * blocks.size
    if length is not None:
        return (length - begin) // blocks.stride
    return begin + (probe + 1) * blocks.stride - 1


def literal_scores(probes, valid, key, bounds, blocks, scale):
    """By block: ``[B, H, reach]`` float64, NaN for the blocks that a sequence does not have."""
    batch, heads = probes.shape[:2]
    key = key.repeat_interleave(heads // key.shape[1], 1).double().cpu()
    probes = probes.double().cpu()
    found = []
    for index in range(blocks.num_blocks):
        reach = blocks.first_reach + index * blocks.size
        scores = torch.full((batch, heads, reach), torch.nan, dtype=torch.float64)
        for row, (start, end) in enumerate(bounds.tolist()):
            if end - start <= (blocks.first + index) * blocks.size:
                continue
            scores[row] = 0
            for probe in range(index * blocks.num_probes, (index + 1) * blocks.num_probes):
                if valid is None or valid[row, probe]:
                    keys = key[row, :, start : start + probe_position(blocks, probe) + 1]
                    logits = scale * (keys @ probes[row, :, probe, :, None])[..., 0]
                    share = logits.softmax(-1)[:, :reach] / blocks.num_probes
                    scores[row, :, : share.shape[1]] += share
        found.append(scores)
    return found


def check(probes, valid, key, bounds, blocks, scale=0.3, tiles=SMALL_TILES, **tolerance):
    scores = score_blocks(probes, valid, key, bounds, blocks, scale, tiles)
    assert scores.shape == (*probes.shape[:2], blocks.num_scores)
    assert scores.dtype == torch.float32
    for index, expected in enumerate(literal_scores(probes, valid, key, bounds, blocks, scale)):
        begin = blocks.offset(index)
        mine = scores[..., begin : begin + expected.shape[2]].double().cpu()
        there = ~expected[:, :1, :1].isnan().expand_as(expected)
        tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(mine[there], expected[there], equal_nan=True, **tolerance)
    return scores


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize(("num_probes", "window", "first"), [(4, 32, 1), (8, 70, 3)])
def test_scores_of_padded_sequences(group, num_probes, window, first):
    blocks = Blocks(32, num_probes, window, 3, first, 3)
    lengths = [(first + 3) * 32, (first + 1) * 32 + 1, (first + 2) * 32, 11]
    kv_heads = 2 if group == 3 else 1
    inputs = problem(blocks, lengths, group=group, kv_heads=kv_heads, kv_len=261)
    check(*with_valid(inputs), blocks)


def with_valid(inputs, valid=None):
    probes, key, bounds = inputs
    return probes, valid, key, bounds


@pytest.mark.parametrize("num_probes", [1, 2, 64])
def test_fewer_and_more_probes_than_a_tile_has_rows(num_probes):
    blocks = Blocks(64, num_probes, 64, 0, 1, 2)
    tiles = (Tiles(32, 32, 64, 4, 2), Tiles(32, 32, 128, 4, 2))
    check(*with_valid(problem(blocks, [192, 150], group=3, kv_heads=1)), blocks, tiles=tiles)


@pytest.mark.parametrize("num_probes", [4, 32])
def test_probes_that_are_not_valid_hold_anything(num_probes):
    blocks = Blocks(64, num_probes, 64, 0, 1, 2)
    probes, key, bounds = problem(blocks, [192, 192], kv_heads=1)
    valid = torch.rand(2, 2 * num_probes, device=DEVICE) < 0.6
    valid[1, num_probes:] = False
    probes = probes.masked_fill(~valid[:, None, :, None], torch.nan)
    scores = check(probes, valid, key, bounds, blocks)
    assert (scores[1, :, blocks.offset(1) :] == 0).all()


@pytest.mark.parametrize("num_known", [3, 5, 8])
def test_keys_behind_the_last_known_probe_are_not_scored(num_known):
    """The queries of a block from some position on are not known: they were decoded."""
    blocks = Blocks(32, 8, 32, 2, 2, 2)
    probes, key, bounds = problem(blocks, [128, 100])
    valid = (torch.arange(16, device=DEVICE) < 8 + num_known).expand(2, -1).contiguous()
    probes = probes.masked_fill(~valid[:, None, :, None], torch.nan)
    scores = check(probes, valid, key, bounds, blocks)
    last = scores[..., blocks.offset(1) :]
    assert last.shape[-1] == blocks.first_reach + 32
    assert scores.isfinite().all()
    seen = probe_position(blocks, 8 + num_known - 1) + 1
    assert (last[..., :seen] > 0).all()
    assert (last[..., seen:] == 0).all()
    _, log_weights, counts = sample_blocks(scores, bounds, blocks, 20, 20)
    real = torch.arange(22, device=DEVICE) < counts[..., None]
    assert (counts > 10).all()
    assert log_weights[real].isfinite().all()


def test_the_probes_of_some_blocks_of_several_sequences():
    """Which of them are known is a part of a larger tensor."""
    blocks = Blocks(32, 4, 32, 0, 1, 2)
    probes, key, bounds = problem(blocks, [96, 96])
    valid = (torch.rand(2, 20, device=DEVICE) < 0.6)[:, 4:12]
    assert not valid.is_contiguous()
    check(probes, valid, key, bounds, blocks)


def test_a_key_that_is_not_finite_is_seen_from_then_on():
    blocks = Blocks(32, 4, 32, 0, 1, 2)
    probes, key, bounds = problem(blocks, [96])
    key[0, 0, 40] = torch.nan
    scores = check(probes, None, key, bounds, blocks)
    assert scores[0, :2, : blocks.offset(1)].isfinite().all()
    assert scores[0, :2, blocks.offset(1) :].isnan().all()
    assert scores[0, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
def test_half_precision_and_the_tiles_of_each_head_size(dtype, head_dim):
    blocks = Blocks(64, 32, 64, 0, 2, 2)
    probes, key, bounds = problem(blocks, [256, 180], group=3, kv_heads=1, head_dim=head_dim)
    inputs = with_valid((probes.to(dtype), key.to(dtype), bounds))
    scale = head_dim**-0.5
    check(*inputs, blocks, scale, None, rtol=2e-3, atol=1e-6)


def test_probes_and_keys_of_any_strides():
    blocks = Blocks(32, 8, 32, 0, 1, 2)
    probes, key, bounds = problem(blocks, [96, 80])
    expected = check(probes, None, key, bounds, blocks)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (probes, key)]
    mine = score_blocks(strided[0], None, strided[1], bounds, blocks, 0.3, SMALL_TILES)
    assert_same(mine, expected, bounds, blocks)


def assert_same(mine, expected, bounds, blocks):
    """Bitwise equal for the blocks that there are."""
    for index in range(blocks.num_blocks):
        there = bounds[:, 1] - bounds[:, 0] > (blocks.first + index) * blocks.size
        begin, stop = blocks.offset(index), blocks.offset(index + 1)
        assert torch.equal(mine[there, :, begin:stop], expected[there, :, begin:stop])


@settings(max_examples=15)
@given(st.data())
def test_other_blocks_sequences_and_later_slots_change_nothing(data):
    """A part of the call gives what the whole gives, bit by bit."""
    group = data.draw(st.sampled_from([1, 2, 3]))
    num_probes = data.draw(st.sampled_from([2, 4, 8]))
    window = data.draw(st.integers(16, 40))
    first = data.draw(st.integers(max(1, window // 16), 4))
    count = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, (first + count) * 16), min_size=1, max_size=3))
    blocks = Blocks(16, num_probes, window, 0, first, count)
    kv_len = max(lengths) + data.draw(st.integers(0, 9))
    probes, key, bounds = problem(
        blocks, lengths, group=group, kv_heads=1, kv_len=kv_len, seed=data.draw(st.integers(0, 9))
    )
    whole = check(probes, None, key, bounds, blocks)
    skipped = data.draw(st.integers(0, count - 1))
    taken = data.draw(st.integers(1, count - skipped))
    part = blocks._replace(first=first + skipped, num_blocks=taken)
    row = data.draw(st.integers(0, len(lengths) - 1))
    some = probes[row : row + 1, :, skipped * num_probes : (skipped + taken) * num_probes]
    mine = score_blocks(
        some, None, key[row : row + 1], bounds[row : row + 1], part, 0.3, SMALL_TILES
    )
    begin = blocks.offset(skipped)
    expected = whole[row : row + 1, :, begin : begin + part.num_scores]
    assert_same(mine, expected, bounds[row : row + 1], part)


def test_no_blocks_no_scores():
    blocks = Blocks(32, 8, 32, 0, 1, 0)
    probes, key, bounds = problem(blocks, [31])
    assert score_blocks(probes, None, key, bounds, blocks, 0.3).shape == (1, 4, 0)


def test_tiles_of_the_passes_are_known():
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 256):
            for tiles in block_scoring.pick_tiles(dtype, head_dim):
                assert tiles.split % tiles.block_n == 0
