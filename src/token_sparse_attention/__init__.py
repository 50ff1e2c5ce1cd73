"""Token Sparse Attention: training-free sparse prefill for long-context language models."""

from token_sparse_attention.compression import compress, decompress
from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
    config_from_json,
)
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.inputs import AuxRequest
from token_sparse_attention.methods.base import Method
from token_sparse_attention.methods.selection import select_tokens
from token_sparse_attention.profile import LayerProfile, load_config
from token_sparse_attention.results import PackedSequences, SparseOutput, TokenSelection
from token_sparse_attention.scoring import score_tokens

__version__ = "0.1.0"

__all__ = [
    "AuxRequest",
    "DenseReason",
    "Execution",
    "KVSamplingConfig",
    "LayerProfile",
    "Method",
    "PackedSequences",
    "SparseConfig",
    "SparseOutput",
    "TokenSelection",
    "TokenSelectionConfig",
    "compress",
    "config_from_json",
    "decompress",
    "load_config",
    "score_tokens",
    "select_tokens",
    "token_sparse_attention",
]
