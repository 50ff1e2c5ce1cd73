"""Sampled keys, merged into the attention of sliding windows that have left them behind.

Windows run on the fastest kernel there is, with their log-sum-exp; one more kernel goes on from
there over the sampled keys. The result is one softmax over both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.sdpa import attend_masked
from token_sparse_attention.blocks import Blocks
from token_sparse_attention.impls import load_kernels
from token_sparse_attention.inputs import Problem
from token_sparse_attention.results import Attended

_LOGITS = 2**21  # at once, where PyTorch adds the sampled keys


class SampledKeys(NamedTuple):
    """Keys that the queries of a block see where their windows have left them behind.

    Attributes:
        slots: ``[B, H, count, E]`` int32, ascending, sinks first.
        log_weights: ``[B, H, count, E]`` float32, the logarithm to base 2 of how many keys each
            stands for: of the inverse of its inclusion probability; 0 for sinks.
        counts: ``[B, H, count]`` int32, how many entries there are.
    """

    slots: Tensor
    log_weights: Tensor
    counts: Tensor


def add_sampled_keys(
    problem: Problem,
    blocks: Blocks,
    sampled: SampledKeys,
    begins: Tensor | None,
    windowed: Attended,
) -> None:
    """Merge sampled keys into sliding-window attention, where the windows have left them.

    Args:
        problem: the inputs.
        blocks: the blocks whose queries see the keys.
        sampled: the keys.
        begins: ``[B]`` int32, the slot of each sequence's first query that attends, its end for
            none; None for every query of sequences without padding.
        windowed: the windowed attention and its log-sum-exp; updated in place.
    """
    if not sampled.slots.shape[3]:
        return
    begins = problem.tokens.bounds[:, 0].contiguous() if begins is None else begins
    if problem.impl == "triton":
        load_kernels("sampled_attention").add_sampled_keys(
            *problem[:3], sampled, (problem.tokens.bounds, begins), windowed, blocks, problem.scale
        )
        return
    for number, begin in enumerate(begins.tolist()):
        _add_sampled_keys(problem, number, begin, (blocks, sampled), windowed)


def _add_sampled_keys(
    problem: Problem,
    number: int,
    begin: int,
    sampled: tuple[Blocks, SampledKeys],
    windowed: Attended,
) -> None:
    """Merge sampled keys into a sequence's sliding-window attention.

    Args:
        problem: the inputs.
        number: the sequence.
        begin: the slot of its first query that is changed.
        sampled: the keys of some blocks.
        windowed: the windowed attention and its log-sum-exp; updated in place.
    """
    blocks, keys = sampled
    span, first_query = problem.tokens.host_spans()[number], problem.first_query
    for index in range(blocks.num_blocks):
        first = span.start + (blocks.first + index) * blocks.size
        slots = range(max(first, begin), min(first + blocks.size, span.end))
        present = int(keys.counts[number, :, index].max()) if slots else 0
        if not present:
            continue
        own = SampledKeys(*(numbers[number, :, index] for numbers in keys))
        size = max(_LOGITS // (problem.num_heads * present), 1)
        own = own._replace(slots=own.slots[:, :present], log_weights=own.log_weights[:, :present])
        gathered = _gather(problem, number, own)
        for some in range(slots.start, slots.stop, size):
            queries = slice(some - first_query, min(some + size, slots.stop) - first_query)
            part = Attended(*(x[number, :, queries] for x in windowed if x is not None))
            _merge(problem.query[number, :, queries], some - blocks.window, own.slots, gathered,
                   problem.scale, part)  # fmt: skip


def _gather(problem: Problem, number: int, own: SampledKeys) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sequence's keys and values ``[H, E, D]`` of one block, and what is added."""
    precision = torch.promote_types(problem.query.dtype, torch.float32)
    kv_head = torch.arange(problem.num_heads, device=own.slots.device)
    kv_head = kv_head // (problem.num_heads // problem.key.shape[1])
    exists = torch.arange(own.slots.shape[1], device=own.slots.device) < own.counts[:, None]
    at = own.slots.clamp(max=problem.kv_len - 1).long()
    key = problem.key[number][kv_head[:, None], at].to(precision)
    value = problem.value[number][kv_head[:, None], at].to(precision)
    # Where there is no sampled key, what was gathered may be padding, and hold anything.
    bias = (own.log_weights.to(precision) * math.log(2)).masked_fill(~exists, -torch.inf)
    hidden = ~exists[..., None]
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0), bias


def _merge(
    query: Tensor,
    reach: int,
    slots: Tensor,
    gathered: tuple[Tensor, Tensor, Tensor],
    scale: float,
    windowed: Attended,
) -> None:
    """Continue the softmax of some queries ``[H, S, D]`` over keys behind their windows.

    Args:
        query: the queries.
        reach: the last slot before the first one's window.
        slots: ``[H, E]``, of the keys.
        gathered: the keys, the values, and what is added to the logits.
        scale: factor of the logits.
        windowed: output and log-sum-exp so far; updated in place.
    """
    out, lse = windowed
    assert lse is not None
    key, value, bias = gathered
    hidden = int((slots <= reach).sum(-1).min())  # the first entry that some query does not see
    last = reach + torch.arange(query.shape[1], device=query.device)[:, None]
    bias = bias[:, None].repeat(1, query.shape[1], 1)
    bias[..., hidden:].masked_fill_(slots[:, None, hidden:] > last, -torch.inf)
    own = attend_masked(query.to(key.dtype), key, value, bias, scale)
    assert own.lse is not None
    new = torch.logaddexp(lse, own.lse)
    mixed = out * (lse - new).exp()[..., None] + own.out * (own.lse - new).exp()[..., None]
    any_seen = slots[:, :1] <= last[:, 0]  # they ascend
    lse.copy_(torch.where(any_seen, new, lse))
    out.copy_(torch.where(any_seen[..., None], mixed.to(out.dtype), out))
