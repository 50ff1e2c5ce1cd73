"""vLLM's CPU backend with sparse prefills."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from token_sparse_attention.integrations.vllm.attention import SparsePrefillImpl
from token_sparse_attention.integrations.vllm.backend import SparsePrefillBuilder
from token_sparse_attention.integrations.vllm.paged import (
    ReadCache,
    measure_order,
    quantised_cache,
    read_cpu,
)


class CPUTokenSparseBackend(CPUAttentionBackend):
    """The stock CPU backend, with long prefills sparse where the settings say so."""

    @staticmethod
    def get_impl_cls() -> type[CPUTokenSparseImpl]:
        return CPUTokenSparseImpl

    @staticmethod
    def get_builder_cls() -> type[CPUTokenSparseMetadataBuilder]:
        return CPUTokenSparseMetadataBuilder


class CPUTokenSparseMetadataBuilder(SparsePrefillBuilder, CPUAttentionMetadataBuilder):
    """The stock builder, and the step's splits."""

    def cache_reader(self) -> ReadCache | None:
        """Measure the order of numbers in a block, which depends on the processor."""

        def write(key: Tensor, value: Tensor, cache: Tensor) -> None:
            sides = cache.view(1, 1, 2 * self.block_size, -1).chunk(2, dim=2)
            slots = torch.arange(len(key))
            name = self.kv_cache_dtype
            ops.cpu_attn_reshape_and_cache(
                key, value, *sides, slots, self.isa, kv_cache_dtype=name
            )

        quantised = quantised_cache(self.kv_cache_dtype, self.dtype)
        stored = None if quantised is None else quantised.stored
        order = measure_order(self.block_size, self.head_dim, self.dtype, write, stored)
        return None if order is None else partial(read_cpu, order=order)


class CPUTokenSparseImpl(SparsePrefillImpl, CPUAttentionBackendImpl):
    """The stock implementation, but for the splits."""
