"""Merging blocks' sampled keys into sliding-window attention, against a literal masked softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import make_problem
from token_sparse_attention.blocks import Blocks

pytest.importorskip("triton")

from token_sparse_attention.kernels import sampled_attention
from token_sparse_attention.kernels.sampled_attention import Tiles, add_sampled_keys
from token_sparse_attention.kernels.sampling import sample_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(sampled_attention, "pick_tiles", lambda *_: Tiles(32, 16, 4, 2))
    monkeypatch.setattr(sampled_attention, "_COUNTED", 2)


def padded_problem(bounds, kv_len, **shape):
    """Padding is NaN; so are the numbers of a KV head's last keys, which no one samples."""
    problem = make_problem(batch=len(bounds), kv_len=kv_len, device=DEVICE, **shape)
    slot = torch.arange(kv_len, device=DEVICE)
    real = (slot >= bounds[:, :1]) & (slot < bounds[:, 1:])
    first = kv_len - problem.query.shape[2]
    problem.query.masked_fill_(~real[:, None, first:, None], torch.nan)
    for tensor in problem[1:]:
        tensor.masked_fill_(~real[:, None, :, None], torch.nan)
    return problem, real


def samples_of(bounds, blocks, heads, capacity, seed=1):
    """Random entries; behind the last there is rubbish."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(bounds), heads, blocks.num_blocks, capacity)
    slots = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).int()
    log_weights = torch.full(shape, torch.nan)
    counts = torch.zeros(shape[:3], dtype=torch.int32)
    for row, (start, end) in enumerate(bounds.tolist()):
        for index in range(blocks.num_blocks):
            if end - start <= (blocks.first + index) * blocks.size:
                continue
            reach = max(blocks.first_reach + index * blocks.size, 0)
            for head in range(heads):
                most = min(reach, capacity)
                number = int(torch.randint(most // 2, most + 1, (1,), generator=generator))
                chosen = torch.randperm(reach, generator=generator)[:number].sort().values
                slots[row, head, index, :number] = start + chosen.int()
                weights = 40 * torch.rand(number, generator=generator) + 1
                log_weights[row, head, index, :number] = weights.log2()
                counts[row, head, index] = number
    return slots.to(DEVICE), log_weights.to(DEVICE), counts.to(DEVICE)


def literal_attention(problem, seen, extra=0.0):
    """Attention and log-sum-exp under a mask ``[B, H, S_q, S_kv]``, in float64.

    `extra` is added to the logits.
    """
    query, key, value = (tensor.double().nan_to_num() for tensor in problem)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = (query @ key.transpose(2, 3) * SCALE + extra).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ value).float(), logits.logsumexp(-1).float()


def windowed_and_expected(problem, real, bounds, sampled, blocks, begins):
    """Attention within the windows, and with the entries that each query sees."""
    slots, log_weights, counts = (tensor.cpu() for tensor in sampled)
    batch, heads, query_len, _ = problem.query.shape
    kv_len = problem.key.shape[2]
    first = kv_len - query_len
    slot = torch.arange(kv_len, device=DEVICE)
    causal = (slot <= slot[first:, None]) & real[:, None, None]
    near = (causal & (slot > slot[first:, None] - blocks.window)).expand(-1, heads, -1, -1)
    both, extra = near.cpu().clone(), torch.zeros(batch, heads, query_len, kv_len)
    for row, (start, end) in enumerate(bounds.tolist()):
        for index in range(blocks.num_blocks):
            begin = start + (blocks.first + index) * blocks.size
            low = max(begin, first, int(begins[row]))
            query = torch.arange(low, max(min(begin + blocks.size, end), low))[:, None]
            for head in range(heads):
                own = slots[row, head, index, : counts[row, head, index]].long()
                visible = own <= query - blocks.window
                both[row, head, query - first, own] |= visible
                weights = log_weights[row, head, index, : len(own)] * 0.6931471805599453
                extra[row, head, query - first, own] = torch.where(visible, weights, 0.0)
    results = (
        *literal_attention(problem, near),
        *literal_attention(problem, both.to(DEVICE), extra.to(DEVICE)),
    )
    for tensor in results:
        tensor[~real[:, None, first:].expand(-1, heads, -1)] = 7.0
    return results[:2], results[2:]


def check(problem, real, bounds, sampled, blocks, begins=None):
    """The kernel's output and log-sum-exp, after comparing them with the literal ones."""
    begins = bounds[:, 0].contiguous() if begins is None else begins
    windowed, expected = windowed_and_expected(problem, real, bounds, sampled, blocks, begins)
    out, lse = (tensor.clone() for tensor in windowed)
    # Contiguous over the tokens of a head or over the heads of a token, as models have it.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    add_sampled_keys(*problem, sampled, (bounds, begins), (out, lse), blocks, SCALE)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-5)
    return windowed, (out, lse)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("window", [32, 45])
@pytest.mark.parametrize(("query_len", "head_dim"), [(170, 24), (75, 16)])
def test_windows_and_sampled_keys(group, window, query_len, head_dim):
    kv_len = 170
    runs = ((0, 170), (57, 170), (3, 110), (150, 160))
    bounds = torch.tensor(runs, dtype=torch.int32, device=DEVICE)
    blocks = Blocks(32, 4, window, 0, 1 + window // 40, 3)
    kv_heads = 2 if group == 3 else 1
    problem, real = padded_problem(
        bounds, kv_len, heads=kv_heads * group, kv_heads=kv_heads, query_len=query_len,
        head_dim=head_dim,
    )  # fmt: skip
    sampled = samples_of(bounds, blocks, kv_heads * group, 80)
    windowed, mine = check(problem, real, bounds, sampled, blocks)
    for row in (0, 1):
        assert not torch.equal(windowed[0][row], mine[0][row]), "the sampled keys must matter"
    # Row 1 is to stay as it is, and row 0 but for its last slots.
    begins = torch.tensor([155, 170, 3, 150], dtype=torch.int32, device=DEVICE)
    _, part = check(problem, real, bounds, sampled, blocks, begins)
    first = kv_len - query_len
    for whole, some, before in zip(mine, part, windowed):
        assert torch.equal(some[1], before[1])
        assert torch.equal(some[0, :, : 155 - first], before[0, :, : 155 - first])
        assert torch.equal(some[0, :, 155 - first :], whole[0, :, 155 - first :])


@pytest.mark.parametrize("tiles", [Tiles(64, 16, 4, 2), Tiles(16, 64, 4, 2)])
def test_tiles_larger_than_blocks_or_samples(monkeypatch, tiles):
    monkeypatch.setattr(sampled_attention, "pick_tiles", lambda *_: tiles)
    bounds = torch.tensor([[5, 170]], dtype=torch.int32, device=DEVICE)
    blocks = Blocks(32, 4, 33, 0, 2, 3)
    problem, real = padded_problem(bounds, 175, query_len=170)
    check(problem, real, bounds, samples_of(bounds, blocks, 4, 70), blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_half_precision_and_the_tiles_of_each_head_size(monkeypatch, dtype, head_dim):
    monkeypatch.undo()
    bounds = torch.tensor([[0, 384], [9, 333]], dtype=torch.int32, device=DEVICE)
    blocks = Blocks(128, 4, 128, 0, 1, 2)
    problem, real = padded_problem(
        bounds, 384, heads=3, kv_heads=1, query_len=290, head_dim=head_dim, dtype=dtype
    )
    sampled = samples_of(bounds, blocks, 3, 150)
    begins = bounds[:, 0].contiguous()
    windowed, expected = windowed_and_expected(problem, real, bounds, sampled, blocks, begins)
    out, lse = windowed[0].to(dtype), windowed[1]
    add_sampled_keys(*problem, sampled, (bounds, begins), (out, lse), blocks, SCALE)
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected[1], rtol=2e-3, atol=2e-3)


@settings(max_examples=15)
@given(st.data())
def test_other_calls_and_sequences_change_nothing(data):
    """A part of the queries, in a batch of their own, gets the same bits."""
    first, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    blocks = Blocks(32, 4, data.draw(st.integers(32, 60)), 0, first, count)
    longest = (first + count) * 32
    lengths = data.draw(st.lists(st.integers(1, longest + 9), min_size=1, max_size=2))
    kv_len = max(lengths) + data.draw(st.integers(0, 5))
    bounds = torch.tensor(
        [[kv_len - length, kv_len] for length in lengths], dtype=torch.int32, device=DEVICE
    )
    problem, real = padded_problem(
        bounds, kv_len, heads=2, kv_heads=1, query_len=kv_len, seed=data.draw(st.integers(0, 9))
    )
    # Exact sums of products, in whatever order: only the interpreter's products need them.
    problem = problem._replace(query=(8 * problem.query).round() / 8, key=problem.key.round())
    sampled = samples_of(bounds, blocks, 2, 60)
    windowed, whole = check(problem, real, bounds, sampled, blocks)
    row = data.draw(st.integers(0, len(lengths) - 1))
    begin = data.draw(st.integers(0, kv_len - 1))
    rows = slice(row, row + 1)
    own = bounds[rows].contiguous()
    out, lse = (tensor[rows, :, begin:].clone() for tensor in windowed)
    add_sampled_keys(
        problem.query[rows, :, begin:], problem.key[rows], problem.value[rows],
        tuple(tensor[rows] for tensor in sampled), (own, own[:, 0].contiguous()), (out, lse),
        blocks, SCALE,
    )  # fmt: skip
    torch.testing.assert_close(out, whole[0][rows, :, begin:], rtol=0, atol=0)
    torch.testing.assert_close(lse, whole[1][rows, :, begin:], rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("sinks", "position"), [(0, 0), (0, 40), (3, 1), (3, 40)])
def test_scores_that_are_not_finite_make_their_block_nan(value, sinks, position):
    bounds = torch.tensor([[0, 150], [7, 157]], dtype=torch.int32, device=DEVICE)
    blocks = Blocks(32, 4, 32, sinks, 1, 4)
    problem, real = padded_problem(bounds, 157, heads=2, kv_heads=1, query_len=157)
    scores = torch.rand(2, 2, blocks.num_scores, device=DEVICE)
    begins = bounds[:, 0].contiguous()
    expected = check(problem, real, bounds, sample_blocks(scores, bounds, blocks, 15, 20), blocks)[
        1
    ]
    scores[1, 1, blocks.offset(2) + position] = value
    sampled = sample_blocks(scores, bounds, blocks, 15, 20)
    (out, lse), _ = windowed_and_expected(problem, real, bounds, sampled, blocks, begins)
    add_sampled_keys(*problem, sampled, (bounds, begins), (out, lse), blocks, SCALE)
    broken = torch.zeros_like(lse, dtype=torch.bool)
    broken[1, 1, 7 + 3 * 32 : 7 + 4 * 32] = True
    assert torch.equal(lse.isnan(), broken)
    assert torch.equal(out.isnan(), broken[..., None].expand_as(out))
    assert torch.equal(out[~broken], expected[0][~broken])
    assert torch.equal(lse[~broken], expected[1][~broken])


@pytest.mark.parametrize(("count", "capacity"), [(0, 9), (2, 0)])
def test_nothing_sampled(count, capacity):
    bounds = torch.tensor([[0, 96]], dtype=torch.int32, device=DEVICE)
    blocks = Blocks(32, 4, 32, 0, 1, count)
    problem, real = padded_problem(bounds, 96, query_len=96)
    windowed, mine = check(problem, real, bounds, samples_of(bounds, blocks, 4, capacity), blocks)
    assert torch.equal(windowed[0], mine[0])
