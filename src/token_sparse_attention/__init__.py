"""Token Sparse Attention: training-free sparse prefill for long-context language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from token_sparse_attention.compression import Compressed, compress, decompress
    from token_sparse_attention.config import (
        DenseReason,
        LayerProfile,
        TokenSparseConfig,
        load_config,
    )
    from token_sparse_attention.functional import SparseOutput, token_sparse_attention
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

# Where each name is; a module is imported when its name is first asked for.
_MODULES = {
    "Compressed": "compression",
    "DenseReason": "config",
    "LayerProfile": "config",
    "SparseOutput": "functional",
    "TokenSelection": "selection",
    "TokenSparseConfig": "config",
    "compress": "compression",
    "decompress": "compression",
    "load_config": "config",
    "score_tokens": "selection",
    "select_tokens": "selection",
    "token_sparse_attention": "functional",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
