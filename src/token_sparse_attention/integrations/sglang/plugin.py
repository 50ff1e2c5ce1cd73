"""The entry point in SGLang's group ``sglang.srt.plugins``."""

from __future__ import annotations

NAME = "tsa"


def register() -> None:
    """Make the backend known to SGLang, in each of its processes.

    ``--attention-backend tsa`` chooses it.
    """
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from token_sparse_attention.integrations.sglang.backend import create_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create_backend)
