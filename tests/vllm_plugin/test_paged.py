"""A request's keys and values come out of a paged cache as they went in."""

from __future__ import annotations

import pytest
import torch

from token_sparse_attention.integrations.vllm.paged import measure_order, read_cpu, read_gpu

BLOCK, HEADS, DIM, BLOCKS = 32, 2, 16, 7


def by_column(tokens):
    """Keys as vLLM's vector code keeps them: ``[D, block]``."""
    return tokens.T.flatten()


def in_pairs(tokens):
    """Pairs of neighbouring numbers side by side, as matrix instructions want them."""
    return tokens.view(BLOCK // 16, 16, DIM // 2, 2).transpose(1, 2).flatten()


def by_row(tokens):
    return tokens.flatten()


def fill(kv_len, pack_key, pack_value):
    """A cache in which one request has scattered blocks; the rest of it is NaN."""
    key, value = torch.randn(2, kv_len, HEADS, DIM)
    table = torch.randperm(BLOCKS)
    cache = torch.full((BLOCKS, HEADS, BLOCK, 2 * DIM), torch.nan)
    for number in range(-(-kv_len // BLOCK)):
        for head in range(HEADS):
            sides = cache[table[number], head].view(2, BLOCK * DIM)
            for side, tokens, pack in ((0, key, pack_key), (1, value, pack_value)):
                part = torch.full((BLOCK, DIM), torch.nan)
                found = tokens[number * BLOCK : (number + 1) * BLOCK, head]
                part[: len(found)] = found
                sides[side] = pack(part)
    return cache, table, key.transpose(0, 1)[None], value.transpose(0, 1)[None]


@pytest.mark.parametrize("kv_len", [1, 31, 32, 33, 111, 7 * BLOCK])
@pytest.mark.parametrize(
    ("pack_key", "pack_value"), [(by_column, by_row), (in_pairs, by_column), (by_row, in_pairs)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_blocks_in_any_order(kv_len, pack_key, pack_value, dtype):
    def write(key, value, cache):
        sides = cache.view(2, BLOCK * DIM)
        sides[0], sides[1] = pack_key(key[:, 0]), pack_value(value[:, 0])

    order = measure_order(BLOCK, DIM, dtype, write)
    cache, table, key, value = fill(kv_len, pack_key, pack_value)
    found = read_cpu(cache, table, kv_len, order)
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], value)


@pytest.mark.parametrize("broken", [lambda x: x * 0.5, lambda x: x.clamp(max=3)])
def test_blocks_that_do_not_hold_the_numbers_have_no_order(broken):
    def write(key, value, cache):
        cache.view(2, -1)[:] = torch.stack([broken(key).flatten(), value.flatten()])

    assert measure_order(BLOCK, DIM, torch.float32, write) is None


@pytest.mark.parametrize("kv_len", [1, 31, 32, 33, 111, 7 * BLOCK])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_gpu_blocks_in_either_order(kv_len, tokens_first):
    key, value = torch.randn(2, 1, HEADS, kv_len, DIM)
    table = torch.randperm(BLOCKS)
    cache = torch.full((BLOCKS, HEADS, BLOCK, 2 * DIM), torch.nan)
    if tokens_first:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    for token in range(kv_len):
        cache[table[token // BLOCK], :, token % BLOCK, :DIM] = key[0, :, token]
        cache[table[token // BLOCK], :, token % BLOCK, DIM:] = value[0, :, token]
    found = read_gpu(cache, table, kv_len)
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], value)
