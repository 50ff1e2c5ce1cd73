"""Ways in which a worker process fails; apart, so that it need not load transformers first."""

from __future__ import annotations

import os

from token_sparse_attention.errors import UsageError


def bad_input():
    raise UsageError("there is no such model")


def unforeseen():
    raise KeyError("abacus")


def sudden_death():
    os._exit(7)
