"""Reading one request's keys and values from vLLM's paged cache, for chunks of prompts.

A prompt that is processed whole needs no cache: its keys and values are at hand. For a chunk
all of one request is copied, for one layer at a time: the probe queries attend to every
key, and the operator takes values of the same length, though no head may choose some of them.

On a GPU a block holds ``[H_kv, block, 2 D]``, keys before values; in memory its tokens come
before its heads unless vLLM is told otherwise. On a CPU a block holds each head's keys and then
its values, each in an order that suits the processor's instructions (keys by column, or in
tiles); that order is measured once, not assumed.

A cache in 8-bit floats is read as bytes, and `Quantised` makes numbers of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.integrations.past_probes import Pages

ReadCache = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

_BASE = 256  # whole numbers below are exact in bfloat16
_QUANTISED_BASE = 8  # and these in each format of 8 bits


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
    stored: torch.dtype | None = None,
) -> BlockOrder | None:
    """Write a block of known numbers, and see where they are.

    Args:
        block_size: tokens of a block.
        head_dim: D.
        dtype: of the model's keys and values.
        write: stores key and value ``[block, 1, D]`` in a cache ``[1, 1, block, 2 D]``.
        stored: the 8-bit floats of a quantised cache, which `write` takes as uint8; None where
            the cache has the model's dtype.

    Returns:
        The order, None if the numbers do not lie in the block one for one.
    """
    total = block_size * head_dim
    codes = torch.arange(total)
    found = torch.zeros(2, total, dtype=torch.long)
    base = _BASE if stored is None else _QUANTISED_BASE
    shape = (1, 1, block_size, 2 * head_dim)
    digits = 1
    while digits < total:
        numbers = (codes // digits % base).to(dtype).view(block_size, 1, head_dim)
        cache = torch.full(shape, -1.0).to(dtype if stored is None else stored)
        write(numbers, numbers.clone(), cache if stored is None else cache.view(torch.uint8))
        found += cache.view(2, total).double().round().long() * digits
        digits *= base
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


def fit_pages(pages: Pages, kv_cache: Tensor) -> Pages:
    """Return the pages of a cache ``[blocks, H_kv, block, 2 D]``, new ones if it is another."""
    blocks, block_size = kv_cache.shape[0], kv_cache.shape[2]
    same = (pages.block_size, pages.cache_shape) == (block_size, (blocks * block_size,))
    return pages if same else Pages(block_size, (blocks * block_size,))


class Quantised(NamedTuple):
    """How a layer's numbers in 8 bits become the model's: times a scale per tensor or KV head.

    Attributes:
        stored: torch's dtype of the cache.
        dtype: the model's.
    """

    stored: torch.dtype
    dtype: torch.dtype

    def read(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return keys, values or queries.

        Args:
            codes: ``[1, heads, S, D]``, in the cache's dtype or as bytes.
            scale: one number, or ``[H_kv]``, each KV head's; H_kv divides the heads.
        """
        numbers = codes.view(self.stored).to(self.dtype)
        scale = scale.to(codes.device).flatten()
        if scale.numel() > 1:
            scale = scale.repeat_interleave(codes.shape[1] // scale.numel())
        return numbers.mul_(scale[:, None, None])


def quantised_cache(kv_cache_dtype: str, dtype: torch.dtype) -> Quantised | None:
    """Return how a cache with vLLM's name for its dtype is read; None for what is not known.

    Args:
        kv_cache_dtype: as in ``--kv-cache-dtype``.
        dtype: the model's.
    """
    from vllm.platforms import current_platform

    if kv_cache_dtype == "fp8_e5m2":
        return Quantised(torch.float8_e5m2, dtype)
    if kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return Quantised(current_platform.fp8_dtype(), dtype)
    return None
