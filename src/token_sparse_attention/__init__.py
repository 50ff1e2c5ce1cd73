"""Token Sparse Attention: training-free sparse prefill for long-context language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from token_sparse_attention.inputs import AuxRequest, Chunk, PastProbes
    from token_sparse_attention.methods.base import Method
    from token_sparse_attention.methods.selection import select_tokens
    from token_sparse_attention.profile import LayerProfile, load_config
    from token_sparse_attention.results import PackedSequences, SparseOutput, TokenSelection
    from token_sparse_attention.scoring import score_tokens

__version__ = "0.1.0"

__all__ = [
    "AuxRequest",
    "Chunk",
    "DenseReason",
    "Execution",
    "KVSamplingConfig",
    "LayerProfile",
    "Method",
    "PackedSequences",
    "PastProbes",
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

# Which names a module has; it is imported when one of them is first asked for.
_NAMES = {
    "compression": ("compress", "decompress"),
    "config": ("KVSamplingConfig", "SparseConfig", "TokenSelectionConfig", "config_from_json"),
    "execution": ("Execution",),
    "functional": ("token_sparse_attention",),
    "gate": ("DenseReason",),
    "inputs": ("AuxRequest", "Chunk", "PastProbes"),
    "methods.base": ("Method",),
    "methods.selection": ("select_tokens",),
    "profile": ("LayerProfile", "load_config"),
    "results": ("PackedSequences", "SparseOutput", "TokenSelection"),
    "scoring": ("score_tokens",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
