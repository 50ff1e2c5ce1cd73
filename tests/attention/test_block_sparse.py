"""The block-sparse executor against a float64 softmax over the tokens its mask leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import causal_attention, make_problem, relative_error
from token_sparse_attention.attention import block_reference, block_sparse
from token_sparse_attention.attention import columns as columns_module
from token_sparse_attention.attention.block_mask import BlockGrid, BlockMask
from token_sparse_attention.attention.block_sparse import (
    block_sparse_attention,
    choose_block_backend,
)
from token_sparse_attention.attention.columns import (
    Columns,
    add_columns,
    attend_columns,
    choose_tiles,
    merge_into,
)
from token_sparse_attention.reference import masked_attention
from token_sparse_attention.results import Attended

SCALE = 0.3


def random_mask(problem, block_size, share=0.4, seed=0):
    query_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    grid = BlockGrid(query_len, kv_len, block_size)
    generator = torch.Generator().manual_seed(seed)
    shape = (*problem.query.shape[:2], grid.query_blocks, grid.kv_blocks)
    return BlockMask.from_block_map(torch.rand(shape, generator=generator) < share, grid)


def expected(problem, allowed):
    """Output and log-sum-exp over the tokens `allowed [B, H, S_q, S_kv]`, in float64."""
    query, key, value = (tensor.double() for tensor in problem)
    out = torch.stack(
        [
            masked_attention(query[row], key[row], value[row], allowed[row], SCALE)
            for row in range(len(query))
        ]
    )
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ keys.transpose(2, 3) * SCALE).masked_fill(~allowed, -torch.inf)
    return out, logits.logsumexp(-1)


@given(
    query_len=st.integers(1, 90),
    earlier=st.sampled_from([0, 0, 5, 48]),
    heads=st.sampled_from([(2, 2), (4, 1), (6, 3)]),
    block_size=st.sampled_from([(16, 16), (8, 16), (16, 8), (7, 5)]),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    portion=st.sampled_from([1, 3, 32]),
    seed=st.integers(0, 9),
)
def test_reference(query_len, earlier, heads, block_size, share, portion, seed):
    problem = make_problem(
        batch=2,
        heads=heads[0],
        kv_heads=heads[1],
        query_len=query_len,
        kv_len=query_len + earlier,
        seed=seed,
    )
    mask = random_mask(problem, block_size, share, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_reference, "_BLOCKS", portion)
        out, lse = block_sparse_attention(*problem, mask, scale=SCALE, return_lse=True)
    exact_out, exact_lse = expected(problem, mask.dense_view())
    assert relative_error(out, exact_out) < 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("query_len", "kv_len"), [(63, 63), (40, 111), (257, 300)])
def test_all_blocks_are_dense_attention(query_len, kv_len):
    problem = make_problem(query_len=query_len, kv_len=kv_len)
    mask = random_mask(problem, (16, 16), share=1.1)
    out = block_sparse_attention(*problem, mask, scale=SCALE)
    dense = causal_attention(*(tensor.double() for tensor in problem), scale=SCALE)
    assert relative_error(out, dense) < 1e-6


def test_dropping_one_block_masks_that_block():
    problem = make_problem(query_len=100)
    kept = torch.ones(1, 4, 7, 7, dtype=torch.bool)
    kept[0, 2, 5, 3] = False
    mask = BlockMask.from_block_map(kept, BlockGrid(100, 100, (16, 16)))
    out = block_sparse_attention(*problem, mask, scale=SCALE)
    allowed = torch.ones(1, 4, 100, 100, dtype=torch.bool).tril()
    allowed[0, 2, 80:96, 48:64] = False
    assert relative_error(out, expected(problem, allowed)[0]) < 1e-6
    everything = block_sparse_attention(*problem, random_mask(problem, (16, 16), 1.1), scale=SCALE)
    changed = (out - everything).abs().amax(-1)[0] > 0
    where = torch.zeros_like(changed)
    where[2, 80:96] = True
    assert torch.equal(changed, where)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_close_as_eager(dtype):
    problem = make_problem(query_len=120, dtype=dtype)
    mask = random_mask(problem, (16, 16))
    out = block_sparse_attention(*problem, mask, scale=SCALE)
    assert out.dtype == dtype
    exact, _ = expected(problem, mask.dense_view())
    eager = masked_attention(*(tensor[0] for tensor in problem), mask.dense_view()[0], SCALE)
    budget = 2 * relative_error(eager[None], exact) + 4 * torch.finfo(torch.float64).eps
    assert relative_error(out, exact) <= budget


@pytest.mark.parametrize("block", [0, 2])
def test_blocks_that_no_head_selects_are_never_read(block):
    """NaN in the keys and values of a block that nobody lists does not reach the output."""
    problem = make_problem(query_len=128, heads=4, kv_heads=2)
    kept = torch.rand(1, 4, 8, 8) < 0.5
    kept[..., block] = False  # some counts are below others, so lists are padded
    mask = BlockMask.from_block_map(kept, BlockGrid(128, 128, (16, 16)))
    clean = block_sparse_attention(*problem, mask, scale=SCALE)
    inside = slice(block * 16, block * 16 + 16)
    problem.key[:, :, inside] = torch.nan
    problem.value[:, :, inside] = torch.nan
    poisoned = block_sparse_attention(*problem, mask, scale=SCALE)
    rows = torch.ones(128, dtype=torch.bool)
    rows[inside] = False  # their own block is on the diagonal
    assert torch.equal(poisoned[:, :, rows], clean[:, :, rows])


def test_memory_stays_below_the_attention_matrix():
    problem = make_problem(query_len=2048, heads=8, kv_heads=1, head_dim=16)
    mask = random_mask(problem, (128, 128), 0.5)
    with torch.profiler.profile(profile_memory=True) as profile:
        block_sparse_attention(*problem, mask, scale=SCALE)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 8 * 2048 * 2048 * 4 / 8


def test_flex_equals_the_reference():
    problem = make_problem(batch=2, heads=4, kv_heads=2, query_len=100, kv_len=333, head_dim=32)
    mask = random_mask(problem, (64, 32))
    flex = block_sparse_attention(*problem, mask, scale=SCALE, backend="flex")
    assert relative_error(flex, expected(problem, mask.dense_view())[0]) < 1e-6


def test_flex_gets_two_lists_of_one_shape_and_one_stride(monkeypatch):
    """Its CUDA kernel steps through both lists by the strides of the first."""
    seen = []

    def attend(query, *_, block_mask, **__):
        for name in ("num_blocks", "indices"):
            lists = [getattr(block_mask, f"{full}kv_{name}") for full in ("", "full_")]
            seen.append([(tensor.shape, tensor.stride()) for tensor in lists])
        return query

    monkeypatch.setattr(block_sparse, "_compiled_flex", lambda: attend)
    problem = make_problem(query_len=300, kv_len=700)
    block_sparse_attention(*problem, random_mask(problem, (64, 32)), backend="flex")
    assert len(seen) == 2
    assert all(one == other for one, other in seen)


def test_flex_refuses_to_run_uncompiled():
    """Uncompiled it would ignore the lists and silently attend to every block."""
    problem = make_problem(query_len=48)
    mask = random_mask(problem, (16, 16))
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ValueError, match=r"'flex' needs torch\.compile"),
    ):
        block_sparse_attention(*problem, mask, backend="flex")


def test_backends():
    problem = make_problem(query_len=48)
    mask = random_mask(problem, (16, 16))
    name, reason = choose_block_backend("auto", problem.query)
    assert name == "reference"
    assert "fa4 (not on cpu)" in reason
    with pytest.raises(ValueError, match="backend must be one of auto, fa4, flex, reference"):
        block_sparse_attention(*problem, mask, backend="triton")
    with pytest.raises(ValueError, match="backend 'fa4' cannot run this input: not on cpu"):
        block_sparse_attention(*problem, mask, backend="fa4")
    with pytest.raises(ValueError, match=r"'flex' cannot run.*no log-sum-exp"):
        block_sparse_attention(*problem, mask, backend="flex", return_lse=True)


def test_what_does_not_fit_is_refused():
    problem = make_problem(query_len=48)
    mask = random_mask(problem, (16, 16))
    with pytest.raises(TypeError, match="mask must be a BlockMask, got Tensor"):
        block_sparse_attention(*problem, mask.block_map())
    longer = make_problem(query_len=49)
    with pytest.raises(ValueError, match=r"mask must be made for B, H, S_q, S_kv = \(1, 4, 49"):
        block_sparse_attention(*longer, mask)
    with pytest.raises(ValueError, match="value must have key's shape"):
        block_sparse_attention(problem.query, problem.key, problem.value[:, :1], mask)
    with torch.enable_grad(), pytest.raises(ValueError, match="query must not require a gradient"):
        block_sparse_attention(problem.query.requires_grad_(), *problem[1:], mask)


@settings(max_examples=20)
@given(
    query_len=st.integers(1, 70),
    earlier=st.sampled_from([0, 9, 40]),
    seed=st.integers(0, 9),
)
def test_blocks_and_columns_merge_to_attention_over_both(query_len, earlier, seed):
    kv_len = query_len + earlier
    problem = make_problem(batch=2, query_len=query_len, kv_len=kv_len, seed=seed)
    mask = random_mask(problem, (16, 16), 0.2, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(2, 4, kv_len, generator=generator) < 0.3
    chosen[0, 1] = False  # a head without columns
    columns = torch.where(chosen, torch.arange(kv_len), kv_len).sort(-1).values
    columns = columns[..., : max(int(chosen.sum(-1).max()), 1)]
    blocks = Attended(*block_sparse_attention(*problem, mask, scale=SCALE, return_lse=True))
    beside = Columns(columns, mask.block_map(), mask.grid)
    rest = attend_columns(*problem, beside, scale=SCALE, backend="reference")
    assert (rest.lse[0, 1] == -torch.inf).all()
    assert (rest.out[0, 1] == 0).all()
    merged = Attended(blocks.out.clone(), blocks.lse.clone())
    merge_into(merged, rest)
    slot = torch.arange(kv_len)
    causal = slot <= slot[earlier:, None]
    out, lse = expected(problem, mask.dense_view() | (chosen[:, :, None] & causal))
    assert relative_error(merged.out, out) < 1e-6
    torch.testing.assert_close(merged.lse.double(), lse, atol=1e-5, rtol=1e-5)
    for numbers in (1, 97):  # a KV head at a time, a few queries at a time
        in_parts = Attended(blocks.out.clone(), blocks.lse.clone())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(columns_module, "_GROUP_NUMBERS", numbers)
            patch.setattr(columns_module, "_MERGED_NUMBERS", numbers * 64)
            add_columns(in_parts, *problem, beside, scale=SCALE, backend="reference")
        torch.testing.assert_close(in_parts.out, merged.out, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(in_parts.lse, merged.lse, atol=1e-6, rtol=1e-6)


def test_values_that_stand_for_no_column_are_not_attended_to():
    """What is gathered for an absent column is the last key's, which may hold anything."""
    problem = make_problem(query_len=40)
    index = torch.tensor([3, 20, 40, 40]).expand(1, 4, 4)  # two columns, two absent ones
    grid = BlockGrid(40, 40, (16, 16))
    columns = Columns(index, torch.zeros(1, 4, 3, 3, dtype=torch.bool), grid)
    clean = attend_columns(*problem, columns, scale=SCALE, backend="reference")
    for tensor in problem[1:]:
        tensor[:, :, -1] = torch.nan
    out, lse = attend_columns(*problem, columns, scale=SCALE, backend="reference")
    assert torch.equal(out, clean.out)
    assert torch.equal(lse, clean.lse)


def test_merging_in_parts_is_merging_at_once(monkeypatch):
    one, other = (
        Attended(torch.randn(2, 3, 50, 8).bfloat16(), torch.randn(2, 3, 50)) for _ in range(2)
    )
    one.lse[0, 0], other.lse[0, 0, :20] = -torch.inf, -torch.inf
    one.out[0, 0], other.out[0, 0, :20] = 0, 0
    weight = torch.softmax(torch.stack([one.lse, other.lse]), 0).nan_to_num(0)[..., None]
    expected_out = one.out * weight[0] + other.out * weight[1]
    results = []
    for numbers in (2**24, 7, 1000):
        monkeypatch.setattr(columns_module, "_MERGED_NUMBERS", numbers)
        results.append(Attended(one.out.clone(), one.lse.clone()))
        merge_into(results[-1], other)
        assert torch.equal(results[-1].out, results[0].out)
        assert torch.equal(results[-1].lse, results[0].lse)
    torch.testing.assert_close(results[0].out.float(), expected_out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(results[0].lse, torch.logaddexp(one.lse, other.lse))


class LiveBytes(TorchDispatchMode):
    """The most bytes alive between two operations, of the tensors made meanwhile."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {storage._cdata for storage in storages((arguments, options))}
        result = function(*arguments, **(options or {}))
        self.made = {
            place: (alive, size)
            for place, (alive, size) in self.made.items()
            if not alive.expired()
        }
        for storage in storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result


def storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def test_adding_columns_needs_no_more_memory_for_more_heads(monkeypatch):
    length, head_dim, size = 256, 64, (16, 16)
    monkeypatch.setattr(columns_module, "_GROUP_NUMBERS", length * head_dim)
    monkeypatch.setattr(columns_module, "_MERGED_NUMBERS", 16 * head_dim)
    grid, most = BlockGrid(length, length, size), []
    for heads in (2, 8):
        problem = make_problem(heads=heads, kv_heads=heads, query_len=length, head_dim=head_dim)
        into = Attended(torch.zeros_like(problem.query), torch.zeros(1, heads, length))
        covered = torch.zeros(1, heads, grid.query_blocks, grid.kv_blocks, dtype=torch.bool)
        columns = Columns(torch.arange(3).expand(1, heads, 3), covered, grid)
        with LiveBytes() as live:
            add_columns(into, *problem, columns, scale=SCALE, backend="reference")
        most.append(live.most)
    assert most[0] == most[1] < 8 * length * head_dim * 4
    assert most[0] > length * head_dim * 4, "a head's output at least"


def test_merging_needs_both_log_sum_exps():
    part = Attended(torch.zeros(1, 1, 1, 1), None)
    with pytest.raises(ValueError, match="lse must be given by both parts"):
        merge_into(part, part)


@pytest.mark.parametrize("shared_memory", [232448, 166912, 101376, 65536])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_tiles_for_columns_fit_into_shared_memory(head_dim, element_size, shared_memory):
    """Queries, two pipelined tensors of keys, and the pipelined numbers of a query and key."""
    tiles = choose_tiles(head_dim, element_size, shared_memory)
    rows, keys, stages = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["num_stages"]
    width = element_size * (128 if head_dim == 96 else head_dim)
    mask = 4 * rows * keys * max(stages - 1, 1)
    assert rows * width + 2 * keys * width * stages + mask <= shared_memory
    assert 128 % rows == 128 % keys == 0
    if (head_dim, element_size, shared_memory) == (128, 2, 232448):
        assert (rows, keys, stages) == (128, 64, 3), "what FlexAttention takes on such a device"
