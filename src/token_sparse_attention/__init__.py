"""Token Sparse Attention: training-free sparse prefill for long-context language models."""

from token_sparse_attention.compression import Compressed, compress, decompress
from token_sparse_attention.config import (
    DenseReason,
    LayerProfile,
    TokenSparseConfig,
    load_config,
)
from token_sparse_attention.functional import SparseOutput, token_sparse_attention
from token_sparse_attention.library import prefill as _prefill  # noqa: F401  registers it
from token_sparse_attention.selection import TokenSelection, score_tokens, select_tokens

__version__ = "0.1.0"

__all__ = [
    "Compressed",
    "DenseReason",
    "LayerProfile",
    "SparseOutput",
    "TokenSelection",
    "TokenSparseConfig",
    "compress",
    "decompress",
    "load_config",
    "score_tokens",
    "select_tokens",
    "token_sparse_attention",
]
