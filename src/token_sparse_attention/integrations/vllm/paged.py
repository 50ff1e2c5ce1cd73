"""Reading one request's keys and values from vLLM's paged cache, for chunks of prompts.

A prompt that is processed whole needs no cache: its keys and values are at hand. For a chunk
all of one request is copied, for one layer at a time: the probe queries attend to every
key, and the operator takes values of the same length, though no head may choose some of them.

On a GPU a block holds ``[H_kv, block, 2 D]``, keys before values; in memory its tokens come
before its heads unless vLLM is told otherwise. On a CPU a block holds each head's keys and then
its values, each in an order that suits the processor's instructions (keys by column, or in
tiles); that order is measured once, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ReadCache = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

_BASE = 256  # whole numbers below are exact in bfloat16


def read_gpu(kv_cache: Tensor, block_table: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """Return a request's keys and values from a cache laid out as on GPUs.

    Args:
        kv_cache: ``[blocks, H_kv, block, 2 D]``, in either order in memory.
        block_table: ``[n]``, the request's blocks in order, maybe more than it uses.
        kv_len: its tokens.

    Returns:
        Keys and values, ``[1, H_kv, kv_len, D]``.
    """
    block_size, width = kv_cache.shape[2:]
    blocks = block_table[: -(-kv_len // block_size)]
    # With tokens before heads in memory this copies once, otherwise twice.
    tokens = kv_cache.transpose(1, 2)[blocks].flatten(0, 1)[:kv_len]
    both = tokens.transpose(0, 1)[None]
    return both[..., : width // 2], both[..., width // 2 :]


class BlockOrder(NamedTuple):
    """Where a CPU block of one head holds its numbers.

    Attributes:
        key: ``[block, D]``, the place of each token's key numbers in the block's keys.
        value: the same for the value's numbers.
    """

    key: Tensor
    value: Tensor


def measure_order(
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    write: Callable[[Tensor, Tensor, Tensor], None],
) -> BlockOrder | None:
    """Write a block of known numbers, and see where they are.

    Args:
        block_size: tokens of a block.
        head_dim: D.
        dtype: the cache's.
        write: stores key and value ``[block, 1, D]`` in a cache ``[1, 1, block, 2 D]``.

    Returns:
        The order, None if the numbers do not lie in the block one for one.
    """
    total = block_size * head_dim
    codes = torch.arange(total)
    found = torch.zeros(2, total, dtype=torch.long)
    digits = 1
    while digits < total:
        numbers = (codes // digits % _BASE).to(dtype).view(block_size, 1, head_dim)
        cache = torch.full((1, 1, block_size, 2 * head_dim), -1, dtype=dtype)
        write(numbers, numbers.clone(), cache)
        found += cache.view(2, total).double().round().long() * digits
        digits *= _BASE
    if not all(torch.equal(side.sort().values, codes) for side in found):
        return None
    key, value = found.argsort(-1).view(2, block_size, head_dim)
    return BlockOrder(key, value)


def read_cpu(
    kv_cache: Tensor, block_table: Tensor, kv_len: int, order: BlockOrder
) -> tuple[Tensor, Tensor]:
    """Return a request's keys and values from a cache laid out as on CPUs.

    Args:
        kv_cache: ``[blocks, H_kv, block, 2 D]``.
        block_table: see `read_gpu`.
        kv_len: see `read_gpu`.
        order: of the cache's blocks.

    Returns:
        Keys and values, ``[1, H_kv, kv_len, D]``.
    """
    num_heads, block_size, width = kv_cache.shape[1:]
    blocks = kv_cache[block_table[: -(-kv_len // block_size)]]
    sides = blocks.view(len(blocks), num_heads, 2, -1)
    key, value = (
        sides[:, :, side, places.flatten()]
        .view(len(blocks), num_heads, block_size, width // 2)
        .transpose(0, 1)
        .reshape(num_heads, -1, width // 2)[None, :, :kv_len]
        for side, places in enumerate(order)
    )
    return key, value
