"""``python -m token_sparse_attention.cli`` is `tsa`."""

from token_sparse_attention.cli import script

script()
