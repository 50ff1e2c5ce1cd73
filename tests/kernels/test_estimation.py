"""The estimation kernels, in Triton's interpreter where there is no GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from benchmarks.block_sparse.kernel import attend_block_lists

from support import make_problem, relative_error
from token_sparse_attention.attention.block_mask import BlockGrid, BlockMask
from token_sparse_attention.attention.block_sparse import block_sparse_attention
from token_sparse_attention.attention.patterns.estimate import (
    block_means,
    blocks_at_distances,
    last_query_mass,
    smallest_cover,
)
from token_sparse_attention.attention.patterns.flexprefill import (
    FlexPrefillConfig,
    flexprefill_mask,
)
from token_sparse_attention.attention.patterns.minference import (
    MInferenceConfig,
    slash_blocks,
    vertical_slash,
)
from token_sparse_attention.attention.patterns.xattention import (
    XAttentionConfig,
    antidiagonal_scores,
    xattention_mask,
)
from token_sparse_attention.kernels import estimation_antidiagonal as antidiagonal
from token_sparse_attention.kernels import estimation_lists as lists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("length", "size", "dtype"),
    [
        (63, 16, torch.float32),
        (111, 24, torch.float16),
        (7, 128, torch.bfloat16),
        (128, 64, torch.float32),
    ],
)
def test_block_means(length, size, dtype):
    tokens = make_problem(batch=2, query_len=length, head_dim=24, dtype=dtype, device=DEVICE).query
    tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    means = block_means(tokens, size, impl="triton")
    expected = block_means(tokens.double(), size, impl="reference")
    torch.testing.assert_close(means.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("query_len", "kv_len", "heads", "kv_heads", "count", "head_dim", "dtype"),
    [
        (63, 63, 4, 4, 16, 16, torch.float32),
        (111, 257, 4, 2, 64, 16, torch.float32),
        (20, 131, 3, 1, 20, 24, torch.float16),
        (20, 131, 3, 1, 20, 24, torch.bfloat16),
        (200, 300, 2, 1, 130, 16, torch.float32),  # more queries than one portion
        (1, 40, 2, 2, 1, 16, torch.float32),
    ],
)
def test_last_query_mass(query_len, kv_len, heads, kv_heads, count, head_dim, dtype):
    problem = make_problem(
        batch=2,
        heads=heads,
        kv_heads=kv_heads,
        query_len=query_len,
        kv_len=kv_len,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
        sharpness=1.0,
    )
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem[:2])
    masses = last_query_mass(query, key, count, SCALE, impl="triton")
    expected = last_query_mass(query.float(), key.float(), count, SCALE, impl="reference")
    for mass, exact in zip(masses, expected):
        torch.testing.assert_close(mass, exact, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "query_len", "kv_len", "stride", "block_size", "kept", "dtype"),
    [
        (1, 4, 2, 96, 96, 4, (16, 16), 2**27, torch.float32),
        *((2, 3, 1, 101, 101, 8, (32, 32), 2**27, dtype) for dtype in HALF),
        (2, 4, 4, 75, 130, 8, (32, 16), 1, torch.float32),  # one head, one band of rows at once
        (1, 2, 1, 5, 40, 4, (16, 32), 2**27, torch.float32),
        (1, 1, 1, 300, 333, 2, (16, 16), 1, torch.float32),
        (1, 1, 1, 40, 40, 1, (16, 16), 2**27, torch.float32),
    ],
)
def test_antidiagonal_scores(
    batch, heads, kv_heads, query_len, kv_len, stride, block_size, kept, dtype
):
    problem = make_problem(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        query_len=query_len,
        kv_len=kv_len,
        dtype=dtype,
        device=DEVICE,
    )
    grid = BlockGrid(query_len, kv_len, block_size)
    config = XAttentionConfig(stride=stride)
    expected = antidiagonal_scores(
        problem.query.double(), problem.key.double(), config, grid, SCALE, impl="reference"
    )
    in_tokens = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem[:2]]
    for query, key in (problem[:2], in_tokens):
        scores = antidiagonal.antidiagonal_scores(
            query, key, stride, block_size, SCALE, kept_elements=kept
        )
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("earlier", [0, 1, 7])
@pytest.mark.parametrize("band_columns", [1, 8])
def test_every_tile_at_or_below_the_diagonal_has_one_number(earlier, band_columns):
    """The numbering of tiles by a square root, up to sizes where float32 rounds."""

    def before(band):
        return band_columns * (band * (band + 1) // 2) + earlier * band

    place = torch.arange(before(300), dtype=torch.int32)
    half = torch.tensor(band_columns * 0.5)
    linear = half + earlier
    band = (((linear * linear + 4 * half * place.float()).sqrt() - linear) / (2 * half)).int()
    band += before(band + 1) <= place
    band -= (before(band) > place).int()
    assert ((before(band) <= place) & (place < before(band + 1))).all()


def masses(*shape):
    mass = torch.rand(*shape, device=DEVICE) ** 8
    mass[..., 3:9] = mass[..., 2:3]  # equal entries
    mass[0, 0] = 0.0
    mass[0, 1, 4] = torch.nan
    mass[0, 2] = 0.25
    return mass


@pytest.mark.parametrize("row", [8192, 64])
@pytest.mark.parametrize(
    ("share", "minimum"), [(0.0, 0), (0.0, 5), (0.3, 5), (0.9, 0), (0.999, 500), (1.0, 0)]
)
def test_smallest_cover(share, minimum, row, monkeypatch):
    monkeypatch.setattr(lists, "_ROW", row)
    monkeypatch.setattr(lists, "_CHUNK", 64)
    mass = masses(1, 4, 71)
    marked = smallest_cover(mass, share, minimum, impl="triton")
    expected = smallest_cover(mass.double(), share, minimum, impl="reference")
    assert torch.equal(marked, expected)


def test_smallest_cover_with_a_share_per_row():
    mass = torch.rand(2, 4, 3, 50, device=DEVICE) ** 8
    share = torch.tensor([0.2, 1.0, 0.6, 0.95], device=DEVICE)[:, None, None]
    marked = smallest_cover(mass, share, impl="triton")
    for head, own in enumerate(share.flatten().tolist()):
        alone = smallest_cover(mass[:, head].double(), own, impl="reference")
        assert torch.equal(marked[:, head], alone)


@pytest.mark.parametrize(
    ("query_len", "kv_len", "block_size"),
    [
        (48, 48, (8, 8)),
        (45, 45, (8, 8)),
        (30, 53, (8, 8)),
        (30, 53, (6, 10)),
        (9000, 9000, (8, 8)),
    ],
)
def test_lists_of_blocks(query_len, kv_len, block_size):
    grid = BlockGrid(query_len, kv_len, block_size)
    heads = 2 if query_len < 100 else 1
    if heads == 1:  # only a few rows of many blocks: the others take the interpreter too long
        grid = BlockGrid(40, kv_len, block_size)
    chosen = torch.rand(2, heads, kv_len, device=DEVICE) < 0.08
    marked = blocks_at_distances(chosen, grid, impl="triton")
    assert torch.equal(marked, blocks_at_distances(chosen, grid, impl="reference"))
    wider = torch.rand(2, grid.query_blocks, heads, grid.kv_blocks, device=DEVICE) < 0.5
    for kept in (marked, wider.transpose(1, 2), marked[:, :1].expand(-1, 3, -1, -1)):
        mask = BlockMask.from_block_map(kept, grid, impl="triton")
        mask.validate()
        expected = BlockMask.from_block_map(kept, grid, impl="reference")
        assert torch.equal(mask.full_count, expected.full_count)
        assert torch.equal(mask.full_index, expected.full_index)


@pytest.mark.parametrize("shape", [(101, 101, 4, 1), (75, 130, 4, 2)])
def test_patterns_choose_the_same_blocks(shape):
    query, key, _ = make_problem(
        query_len=shape[0], kv_len=shape[1], heads=shape[2], kv_heads=shape[3], device=DEVICE
    )
    block_size = (16, 16)

    def masks(impl):
        yield flexprefill_mask(
            query, key, FlexPrefillConfig(0.6, tau=0.35, min_budget=20), SCALE, block_size, impl
        )
        yield xattention_mask(
            query, key, XAttentionConfig(4, (0.5, 0.6, 0.7, 1.0)), SCALE, block_size, impl
        )
        config = MInferenceConfig(9, 4, last_queries=8, sink_size=2, local_size=2)
        chosen = vertical_slash(query, key, config, SCALE, impl)
        found.append(chosen.columns)
        yield slash_blocks(chosen, shape[0], block_size, impl)

    found: list[torch.Tensor] = []
    for ours, reference in zip(masks("triton"), masks("reference")):
        assert torch.equal(ours.block_map(), reference.block_map())
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "query_len", "kv_len"),
    [(2, 4, 2, 100, 100), (1, 3, 1, 63, 131)],
)
def test_the_plain_kernel_attends_over_the_listed_blocks(
    batch, heads, kv_heads, query_len, kv_len, dtype
):
    problem = make_problem(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        query_len=query_len,
        kv_len=kv_len,
        dtype=dtype,
        device=DEVICE,
    )
    grid = BlockGrid(query_len, kv_len, (32, 32))
    for share in (0.0, 0.5, 1.1):
        kept = torch.rand(batch, heads, grid.query_blocks, grid.kv_blocks, device=DEVICE) < share
        mask = BlockMask.from_block_map(kept, grid)
        partial, full = (
            (mask.partial_count, mask.partial_index),
            (mask.full_count, mask.full_index),
        )
        out = attend_block_lists(*problem, partial, full, grid.block_size, SCALE)
        exact = block_sparse_attention(*(x.double() for x in problem), mask, scale=SCALE)
        assert relative_error(out, exact) < (1e-6 if dtype == torch.float32 else 1e-2)
