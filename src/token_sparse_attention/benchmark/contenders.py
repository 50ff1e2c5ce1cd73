"""What the operator is compared with: dense kernels, and the method composed in PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from token_sparse_attention.attention.names import BACKENDS
from token_sparse_attention.attention.resolve import causal_attention
from token_sparse_attention.benchmark.checks import Inputs
from token_sparse_attention.benchmark.timing import Call
from token_sparse_attention.config import TokenSelectionConfig
from token_sparse_attention.results import TokenSelection

DENSE = (*(name for name in BACKENDS if name != "auto"), "flex")
_HEADS_AT_ONCE = 4  # keeps the window's float32 probabilities small


def dense_call(backend: str, inputs: Inputs) -> Call:
    """Return a call of dense causal attention on one of `DENSE`."""
    if backend == "flex":
        return _flex_call(inputs)
    return partial(causal_attention, *inputs, scale=inputs.scale, backend=backend)


def _flex_call(inputs: Inputs) -> Call:
    def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    torch._dynamo.reset()  # each length compiles anew, and Dynamo limits how often
    seq_len, device = inputs.query.shape[2], inputs.query.device
    mask = create_block_mask(
        causal, None, None, seq_len, seq_len, device=str(device), _compile=True
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, *inputs, block_mask=mask, scale=inputs.scale, enable_gqa=True)


def eager_composition(
    inputs: Inputs, config: TokenSelectionConfig, keep_ratio: float
) -> tuple[Tensor, TokenSelection]:
    """Run the method as one would first write it: PyTorch operations and FlashAttention-2.

    The budget is computed and read on the host, as the count for ``topk`` must be, and then
    `keep_ratio` decides.

    Returns:
        The output ``[1, H, S, D]`` and the selection.
    """
    query, num_slots, window_size = inputs.query, inputs.key.shape[2], config.observation_window
    group = query.shape[1] // inputs.key.shape[1]
    key = inputs.key.repeat_interleave(group, dim=1)
    value = inputs.value.repeat_interleave(group, dim=1)

    scores = _window_scores(query, key, window_size, inputs.scale)
    smoothed = F.avg_pool1d(scores, config.pool_size, stride=1, padding=config.pool_size // 2)
    _budget(smoothed, config)  # for its time: `keep_ratio` decides
    count = min(max(round(keep_ratio * num_slots) - window_size, 0), smoothed.shape[-1])
    top = smoothed.topk(count, dim=-1).indices.sort(-1).values
    window = torch.arange(num_slots - window_size, num_slots, device=query.device)
    indices = torch.cat([top, window.expand(*top.shape[:2], -1)], dim=-1)
    rows = indices[..., None].expand(-1, -1, -1, query.shape[-1])
    gathered = (tensor.gather(2, rows) for tensor in (query, key, value))
    attended = causal_attention(*gathered, scale=inputs.scale, backend="flash")
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    out.scatter_(2, rows, attended)

    lengths = torch.full(indices.shape[:2], indices.shape[2], device=query.device)
    return out, TokenSelection(indices, lengths, torch.ones_like(lengths[:, 0], dtype=torch.bool))


def _budget(smoothed: Tensor, config: TokenSelectionConfig) -> int:
    mass = smoothed.mean(1)
    mass = mass / (mass.sum(-1, keepdim=True) + 1e-8)
    below = int((mass.sort(-1).values.cumsum(-1) < config.drop_mass).sum())
    return max(config.min_tokens, smoothed.shape[-1] - (below + 1))


def _window_scores(query: Tensor, key: Tensor, window_size: int, scale: float) -> Tensor:
    future = torch.ones(window_size, window_size, dtype=torch.bool, device=query.device).triu(1)
    scores = []
    for first in range(0, query.shape[1], _HEADS_AT_ONCE):
        heads = slice(first, first + _HEADS_AT_ONCE)
        logits = (query[:, heads, -window_size:] @ key[:, heads].transpose(-1, -2)).float() * scale
        logits[..., -window_size:].masked_fill_(future, -torch.inf)
        scores.append(logits.softmax(-1)[..., :-window_size].mean(2))
    return torch.cat(scores, dim=1)
