"""Prefill a model with an attention function of one's own, to see what its layers attend to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "observed_attention"


@contextmanager
def attending(attention: Callable[..., tuple[Tensor, None]], model: Any) -> Iterator[None]:
    """Let a model's layers attend by `attention` meanwhile.

    Args:
        attention: on transformers' attention interface.
        model: a causal language model on that interface.
    """
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def prefill_with(attention: Callable[..., tuple[Tensor, None]], model: Any, ids: Tensor) -> None:
    """Run a model's prefill of ``[1, S]`` token ids, its layers attending by `attention`."""
    with attending(attention, model), torch.no_grad():
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
