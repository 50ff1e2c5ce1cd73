"""The block-sparse executors on a GPU: against the reference, in half precision's own units."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from support import relative_error
from token_sparse_attention.attention.block_mask import BlockGrid, BlockMask
from token_sparse_attention.attention.block_sparse import block_sparse_attention
from token_sparse_attention.attention.columns import Columns, attend_columns
from token_sparse_attention.attention.flash import fa4_installed
from token_sparse_attention.attention.patterns import PATTERNS
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
    xattention_mask,
)

DEVICE = "cuda"
BACKENDS = [
    pytest.param(
        "fa4", marks=pytest.mark.skipif(not fa4_installed(), reason="flash-attn-4 is missing")
    ),
    "flex",
]
SETTINGS = {
    "flexprefill": {"gamma": 0.7, "min_budget": 256},
    "minference": {"vertical_size": 200, "slash_size": 300},
    "streaming": {"local_size": 512},
    "xattention": {},
}


def make_inputs(batch, heads, kv_heads, query_len, kv_len, head_dim):
    """Tensors as models hand them over: [B, S, H, D] in memory."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, query_len, heads, head_dim, generator=generator) * 2
    key, value = torch.randn(2, batch, kv_len, kv_heads, head_dim, generator=generator)
    return [x.to(DEVICE, torch.bfloat16).transpose(1, 2) for x in (query, key, value)]


def random_mask(query, key, share):
    grid = BlockGrid(query.shape[2], key.shape[2])
    generator = torch.Generator(DEVICE).manual_seed(1)
    kept = torch.rand(
        *query.shape[:2], grid.query_blocks, grid.kv_blocks, generator=generator, device=DEVICE
    )
    return BlockMask.from_block_map(kept < share, grid)


def eager(query, key, value, mask):
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return logits.masked_fill(~mask.dense_view(), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "query_len", "kv_len", "head_dim"),
    [
        (1, 4, 4, 512, 512, 128),
        (2, 8, 2, 1000, 1000, 128),
        (1, 8, 4, 63, 63, 64),
        (2, 4, 2, 111, 2047, 128),
        (1, 8, 2, 300, 1333, 96),
        (1, 4, 1, 1, 700, 128),
    ],
)
def test_an_executor_is_as_close_as_eager(
    backend, share, batch, heads, kv_heads, query_len, kv_len, head_dim
):
    inputs = make_inputs(batch, heads, kv_heads, query_len, kv_len, head_dim)
    mask = random_mask(inputs[0], inputs[1], share)
    mask.validate()
    exact, exact_lse = block_sparse_attention(
        *(x.double() for x in inputs), mask, backend="reference", return_lse=True
    )
    out, lse = block_sparse_attention(*inputs, mask, backend=backend, return_lse=True)
    budget = 2 * relative_error(eager(*inputs, mask), exact) + 1e-5
    assert relative_error(out, exact) <= budget
    assert (lse - exact_lse).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_columns_of_any_head_size_are_attended_to(head_dim, dtype):
    query, key, value = (x.to(dtype) for x in make_inputs(1, 8, 2, 700, 1500, head_dim))
    grid = BlockGrid(700, 1500)
    columns = torch.rand(1, 8, 1500, device=DEVICE).topk(200).indices
    covered = torch.rand(1, 8, grid.query_blocks, grid.kv_blocks, device=DEVICE) < 0.5
    call = partial(attend_columns, columns=Columns(columns, covered, grid))
    exact = call(query.double(), key.double(), value.double(), scale=0.1, backend="reference")
    eager = call(query, key, value, scale=0.1, backend="reference")
    ours = call(query, key, value, scale=0.1, backend="flex")
    budget = 2 * relative_error(eager.out, exact.out) + 1e-3
    assert relative_error(ours.out, exact.out) <= budget
    sees = exact.lse > -torch.inf
    assert torch.equal(ours.lse > -torch.inf, sees)
    assert (ours.lse - exact.lse)[sees].abs().max() < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_nobody_selects_are_not_read(backend):
    query, key, value = make_inputs(1, 8, 2, 1024, 1024, 128)
    kept = torch.rand(1, 8, 8, 8, device=DEVICE) < 0.5
    kept[..., 2] = False
    mask = BlockMask.from_block_map(kept, BlockGrid(1024, 1024))
    clean = block_sparse_attention(query, key, value, mask, backend=backend)
    key[:, :, 256:384] = value[:, :, 256:384] = torch.nan
    out = block_sparse_attention(query, key, value, mask, backend=backend)
    others = torch.ones(1024, dtype=torch.bool, device=DEVICE)
    others[256:384] = False  # their own block is always kept
    assert torch.equal(out[:, :, others], clean[:, :, others])


@pytest.mark.parametrize("choose", ["flexprefill", "minference", "xattention"])
@pytest.mark.parametrize(
    ("query_len", "kv_len", "head_dim"), [(4096, 4096, 128), (3001, 5555, 64), (900, 900, 96)]
)
def test_estimates_choose_what_the_reference_chooses(choose, query_len, kv_len, head_dim):
    query, key, _ = make_inputs(2, 8, 2, query_len, kv_len, head_dim)
    masks = {
        "flexprefill": lambda q, k, impl: flexprefill_mask(
            q, k, FlexPrefillConfig(gamma=0.7, min_budget=256), 0.1, impl=impl
        ),
        "minference": lambda q, k, impl: slash_blocks(
            vertical_slash(q, k, MInferenceConfig(200, 300), 0.1, impl), query_len, impl=impl
        ),
        "xattention": lambda q, k, impl: xattention_mask(q, k, XAttentionConfig(), 0.1, impl=impl),
    }
    ours = masks[choose](query, key, "triton")
    ours.validate()
    exact = masks[choose](query.double(), key.double(), "reference").block_map()
    apart = (ours.block_map() ^ exact).sum() / exact.sum()
    assert apart < 0.01, "more than blocks on the edge differ"


def test_lists_of_many_heads_stay_within_a_gib():
    kept = torch.zeros(1, 1, 2048, 2048, dtype=torch.bool, device=DEVICE)
    kept[..., :300] = True
    kept = kept.expand(1, 80, -1, -1)
    mask = BlockMask.from_block_map(kept, BlockGrid(2048 * 128, 2048 * 128))
    assert mask.full_index.shape[-1] == 300
    mask.validate()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_does_not_wait_for_the_device(name, backend):
    inputs = make_inputs(1, 8, 2, 3000, 3333, 128)
    pattern = PATTERNS[name]
    config = pattern.config(**SETTINGS[name])
    exact, exact_lse = pattern.attend(*inputs, config, backend="reference", return_lse=True)
    out, lse = pattern.attend(*inputs, config, backend=backend, return_lse=True)
    assert relative_error(out, exact) < 1e-2
    assert (lse - exact_lse).abs().max() < 2e-2
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pattern.attend(*inputs, config, backend=backend, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
