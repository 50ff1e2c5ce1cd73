"""Sampling keys for blocks by one kernel, against a literal sampler in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from token_sparse_attention.blocks import GOLDEN, UNIT_BITS, Blocks

pytest.importorskip("triton")

from token_sparse_attention.kernels import sampling as kernel
from token_sparse_attention.kernels.sampling import sample_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNITS = 2**UNIT_BITS
KINDS = ["even", "soft", "sharp", "heavy-tailed", "geometric", "none", "one", "tied"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "_BLOCK", 256)


def scores_of(kind, blocks, batch=1, heads=1, seed=0):
    """``[B, H, blocks.num_scores]`` float32, each block's of one kind."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(blocks.num_blocks):
        length = blocks.first_reach + index * blocks.size
        normal = torch.randn(batch, heads, length, generator=generator)
        found.append({
            "even": torch.full_like(normal, 1 / max(length, 1)),
            "soft": normal.softmax(-1),
            "sharp": (8 * normal).softmax(-1),
            "heavy-tailed": normal.abs() ** -1.5 / length,
            "geometric": 0.5 ** torch.arange(length).expand_as(normal),
            "none": torch.zeros_like(normal),
            "one": (torch.arange(length) == length // 3).float().expand_as(normal),
            "tied": (3 * normal).round().softmax(-1),
        }[kind])  # fmt: skip
    return torch.cat(found, -1).to(DEVICE)


def literal_factor(shares, budget):
    """The factor by which shares, each at most 1, add up to the budget."""
    if budget >= len(shares):
        return float("inf")
    certain = 0
    best = shares.sort(descending=True).values
    while True:
        factor = (budget - certain) / float(best[certain:].sum())
        if not float(best[certain]) * factor >= 1:
            return factor
        certain += 1


def points_passed(units):
    cell, part = divmod(units, UNITS)
    return cell + (part > ((cell + 1) * GOLDEN % 2**32) >> (32 - UNIT_BITS))


def literal_samples(scores, budget):
    """Positions and weights of one block's samples, by its candidates' scores."""
    scores = scores.double().cpu()
    shares = scores / scores.sum().clamp(min=1e-30) + 1 / max(len(scores), 1)
    shares = shares / shares.sum()
    found, passed = [], 0
    if not len(scores):
        return found
    probabilities = shares * literal_factor(shares, budget)
    for position, probability in enumerate(probabilities.tolist()):
        units = round(min(probability, 1.0) * UNITS)
        if units == UNITS:
            found.append((position, 1.0))
            continue
        hits = points_passed(passed + units) - points_passed(passed)
        passed += units
        if hits:
            found.append((position, hits * UNITS / units))
    return found


def check(scores, bounds, blocks, num_samples, capacity=None, budgets=None):
    """What the kernel returns, after comparing it with the literal sampler."""
    capacity = num_samples + 8 if capacity is None else capacity
    found = sample_blocks(scores, bounds, blocks, num_samples, capacity, budgets)
    slots, log_weights, counts = found
    shape = (*scores.shape[:2], blocks.num_blocks)
    assert slots.shape == log_weights.shape == (*shape, blocks.sink_size + capacity)
    assert counts.shape == shape
    assert slots.dtype == counts.dtype == torch.int32
    assert log_weights.dtype == torch.float32
    for row, (start, end) in enumerate(bounds.tolist()):
        for head in range(shape[1]):
            for index in range(blocks.num_blocks):
                expected = []
                if end - start > (blocks.first + index) * blocks.size:
                    begin = blocks.offset(index) + blocks.sink_size
                    own = scores[row, head, begin : max(blocks.offset(index + 1), begin)]
                    number = num_samples if budgets is None else float(budgets[row, head, index])
                    expected = [(sink, 1.0) for sink in range(blocks.sink_size)]
                    samples = literal_samples(own, number)[:capacity]
                    expected += [(blocks.sink_size + at, weight) for at, weight in samples]
                entries = int(counts[row, head, index])
                assert entries == len(expected)
                mine = slots[row, head, index, :entries].tolist()
                assert mine == [start + position for position, _ in expected]
                weights = torch.tensor([weight for _, weight in expected]).double().log2()
                own = log_weights[row, head, index, :entries].double().cpu()
                torch.testing.assert_close(own, weights, rtol=1e-6, atol=2e-6)
    return found


def one_row(length):
    return torch.tensor([[0, length]], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 40, 300, 2000])
def test_the_keys_of_a_block(kind, count):
    blocks = Blocks(512, 4, 600, 5, 2, 1)
    _, _, counts = check(scores_of(kind, blocks, heads=2), one_row(1100), blocks, count)
    # A key at which two points are passed is one entry.
    assert (counts - 5 - min(count, blocks.first_reach - 5)).abs().max() <= max(2, 0.2 * count)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_the_real_size(kind, monkeypatch):
    monkeypatch.undo()
    blocks = Blocks(8192, 4, 8192, 3, 2, 1)
    check(scores_of(kind, blocks), one_row(20000), blocks, 500)


@pytest.mark.parametrize("sinks", [0, 7])
def test_padded_sequences(sinks):
    blocks = Blocks(64, 4, 70, sinks, 2, 4)
    bounds = torch.tensor(
        [[0, 500], [133, 500], [20, 277], [7, 8], [60, 189]], dtype=torch.int32, device=DEVICE
    )
    scores = scores_of("soft", blocks, 5, 2)
    scores[2, :, blocks.offset(3) :] = torch.nan  # of a block that does not exist
    scores[3] = torch.nan
    scores[4, :, blocks.offset(1) :] = torch.nan
    generator = torch.Generator(DEVICE).manual_seed(3)
    budgets = 90 * torch.rand(5, 2, 4, dtype=torch.float64, device=DEVICE, generator=generator)
    budgets[0, 0] = torch.tensor([0.0, 0.5, 1e9, 50.25], dtype=torch.float64)
    check(scores, bounds, blocks, 20, 400, budgets)
    counts = check(scores, bounds, blocks, 20)[2]
    present = torch.tensor([[4], [4], [3], [0], [1]], device=DEVICE)
    present = torch.arange(4, device=DEVICE) < present
    assert torch.equal(counts > 0, present[:, None].expand_as(counts))


def test_what_exceeds_the_capacity_is_dropped():
    blocks = Blocks(64, 4, 64, 2, 4, 2)
    check(scores_of("soft", blocks), one_row(400), blocks, 90, 50)


def test_blocks_that_reach_no_further_than_the_sinks():
    blocks = Blocks(16, 4, 40, 10, 2, 2)  # the first reaches 8, the second 24
    _, _, counts = check(scores_of("soft", blocks), one_row(64), blocks, 5)
    assert counts.flatten().tolist()[0] == 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("sinks", "position"), [(3, 1), (3, 77), (0, 77), (300, 77)])
def test_scores_that_are_not_finite(value, sinks, position):
    """The block's first entry, at the sequence's start, has no number as its weight."""
    blocks = Blocks(64, 4, 64, sinks, 2, 3)
    scores = scores_of("soft", blocks, 2, 2)
    others = check(scores, bounds := two_rows(300, 300), blocks, 20)
    scores[1, 0, blocks.offset(1) + position] = value
    slots, log_weights, counts = sample_blocks(scores, bounds, blocks, 20, 28)
    broken = torch.zeros_like(counts, dtype=torch.bool)
    broken[1, 0, 1] = True
    number = int(counts[1, 0, 1])
    assert number == max(sinks, 1)
    assert slots[1, 0, 1, :number].tolist() == list(range(number))
    assert log_weights[1, 0, 1, :number].isnan().all()
    assert torch.equal(counts[~broken], others[2][~broken])
    real = (torch.arange(slots.shape[-1], device=DEVICE) < counts[..., None]) & ~broken[..., None]
    assert torch.equal(slots[real], others[0][real])
    assert torch.equal(log_weights[real], others[1][real])
    missing = sample_blocks(scores, two_rows(300, 3 * 64), blocks, 20, 28)
    assert missing[2][1, :, 1:].tolist() == [[0, 0], [0, 0]]


def test_nothing_is_written_behind_the_last_entry():
    """Without room for samples the next block's sinks lie there."""
    blocks = Blocks(64, 4, 64, 3, 2, 2)
    scores = scores_of("soft", blocks)
    scores[..., blocks.offset(1) :] = torch.nan
    _, log_weights, counts = sample_blocks(scores, one_row(256), blocks, 20, 0)
    assert counts.tolist() == [[[3, 3]]]
    assert log_weights.isnan().all(-1).tolist() == [[[False, True]]]


def two_rows(*lengths):
    return torch.tensor([[0, length] for length in lengths], dtype=torch.int32, device=DEVICE)


@settings(max_examples=20)
@given(st.data())
def test_other_blocks_and_sequences_change_nothing(data):
    sinks, window = data.draw(st.integers(0, 20)), data.draw(st.integers(32, 60))
    first, count = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5))
    blocks = Blocks(32, 4, window, sinks, first, count)
    lengths = data.draw(st.lists(st.integers(1, (first + count) * 32), min_size=1, max_size=2))
    bounds = torch.tensor(
        [[3 * row, 3 * row + length] for row, length in enumerate(lengths)],
        dtype=torch.int32, device=DEVICE,
    )  # fmt: skip
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 99))
    scores = scores_of(kind, blocks, len(lengths), 2, seed)
    num_samples = data.draw(st.integers(0, 90))
    whole = check(scores, bounds, blocks, num_samples)
    skipped = data.draw(st.integers(0, count - 1))
    taken = data.draw(st.integers(1, count - skipped))
    row = data.draw(st.integers(0, len(lengths) - 1))
    part = blocks._replace(first=first + skipped, num_blocks=taken)
    own = scores[row : row + 1, :, blocks.offset(skipped) : blocks.offset(skipped + taken)]
    mine = sample_blocks(own, bounds[row : row + 1], part, num_samples, num_samples + 8)
    entries = mine[2]
    assert torch.equal(entries, whole[2][row : row + 1, :, skipped : skipped + taken])
    real = torch.arange(mine[0].shape[-1], device=DEVICE) < entries[..., None]
    for one, other in zip(mine[:2], whole):
        assert torch.equal(one[real], other[row : row + 1, :, skipped : skipped + taken][real])


def test_no_blocks():
    blocks = Blocks(32, 4, 32, 3, 1, 0)
    scores = torch.empty(2, 3, 0, device=DEVICE)
    slots, _, counts = sample_blocks(scores, two_rows(30, 30), blocks, 1, 9)
    assert slots.shape == (2, 3, 0, 12)
    assert counts.shape == (2, 3, 0)
