"""vLLM's FlashAttention backend with sparse prefills."""

from __future__ import annotations

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from token_sparse_attention.integrations.vllm.attention import SparsePrefillImpl
from token_sparse_attention.integrations.vllm.backend import SparsePrefillBuilder
from token_sparse_attention.integrations.vllm.paged import ReadCache, read_gpu


class FlashTokenSparseBackend(FlashAttentionBackend):
    """The stock backend, with long prefills sparse where the settings say so."""

    supports_kv_cache_update_bypass = False  # prefills need the step's own keys and values

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Say no: other requests decide how a prompt is cut, and so which queries are dense."""
        return False

    @staticmethod
    def get_impl_cls() -> type[FlashTokenSparseImpl]:
        return FlashTokenSparseImpl

    @staticmethod
    def get_builder_cls() -> type[FlashTokenSparseMetadataBuilder]:
        return FlashTokenSparseMetadataBuilder


class FlashTokenSparseMetadataBuilder(SparsePrefillBuilder, FlashAttentionMetadataBuilder):
    """The stock builder, and the step's splits."""

    # Graphs of whole steps are for decoding only; prefills run eagerly in this layer.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def cache_reader(self) -> ReadCache | None:
        """Return the reader of vLLM's one GPU layout."""
        return read_gpu


class FlashTokenSparseImpl(SparsePrefillImpl, FlashAttentionImpl):
    """The stock implementation, but for the splits."""
