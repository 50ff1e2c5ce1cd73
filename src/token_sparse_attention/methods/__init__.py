"""The methods: `sampling` is the default, `selection` is the paper's. A third one is one file.

Importing this module registers both; `method_of` returns the one that a config is for.
"""

from token_sparse_attention.methods.base import LayerShape, Method, Plan, method_of
from token_sparse_attention.methods.sampling import KVSampling
from token_sparse_attention.methods.selection import TokenSelector

__all__ = ["KVSampling", "LayerShape", "Method", "Plan", "TokenSelector", "method_of"]
