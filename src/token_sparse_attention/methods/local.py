"""Sliding windows, merged with keys sampled from behind them.

The window runs on the fastest kernel there is, with its log-sum-exp; one more kernel goes on
from there over the sampled keys. The result is one softmax over both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.backend import Backend
from token_sparse_attention.impls import load_kernels
from token_sparse_attention.inputs import Problem
from token_sparse_attention.results import Attended

_LOGITS = 2**21  # at once, where PyTorch adds the sampled keys


class SampledKeys(NamedTuple):
    """Keys that every query of a head sees where its window has left them behind.

    Attributes:
        slots: ``[B, H, M]`` integers, ascending, S_kv behind a head's last one.
        weights: ``[B, H, M]`` float32, how many keys each stands for: the inverse of its
            inclusion probability; 1 for sinks.
    """

    slots: Tensor
    weights: Tensor


def attend_windows(
    problem: Problem,
    sampled: SampledKeys | None,
    sequences: Tensor,
    into: Attended,
    *,
    window: int,
    backend: Backend,
) -> None:
    """Attend every query of some sequences to its window and the sampled keys, in place.

    Args:
        problem: the inputs.
        sampled: the keys behind the windows; None for none.
        sequences: ``[B]`` bool, the sequences wanted; others stay.
        into: output ``[B, H, S_q, D]`` and log-sum-exp to write.
        window: keys each query sees, itself included.
        backend: what attends within the windows.
    """
    tokens, window = problem.tokens, min(window, problem.kv_len)
    start, end = tokens.bounds.unbind(-1)
    begins = torch.where(sequences, start, end)
    if sampled is None or not sampled.slots.shape[2]:
        backend.dense.attend_sequences(problem, begins, into, window=window)
        return
    lse = backend.dense.attend_windows(problem, begins, into, window)
    if problem.impl == "triton":
        load_kernels("sampled_attention").add_sampled_keys(
            *problem[:3], sampled, (tokens.bounds, sequences), (into.out, lse),
            window=window, scale=problem.scale,
        )  # fmt: skip
        return
    slots = torch.where(sequences[:, None, None], sampled.slots, tokens.kv_len)
    fullest = int((slots < tokens.kv_len).sum(-1).max())
    present = SampledKeys(slots[..., :fullest], sampled.weights[..., :fullest])
    _add_sampled_keys(problem, present, Attended(into.out, lse), window)


def _add_sampled_keys(
    problem: Problem, sampled: SampledKeys, windowed: Attended, window: int
) -> None:
    """Merge sampled keys into sliding-window attention, where the window has left them.

    Args:
        problem: the inputs.
        sampled: the keys.
        windowed: the windowed attention and its log-sum-exp; updated in place.
        window: keys each query saw, itself included.
    """
    query, key, value = problem.query, problem.key, problem.value
    out, lse = windowed
    assert lse is not None
    group = query.shape[1] // key.shape[1]
    precision = torch.promote_types(query.dtype, torch.float32)
    end = problem.tokens.bounds.long()[:, 1]
    num_sampled = sampled.slots.shape[2]
    size = max(_LOGITS // max(len(key) * key.shape[1] * num_sampled, 1), 1)
    for member in range(group):
        heads = slice(member, None, group)
        slots = sampled.slots[:, heads]
        at = slots.clamp(max=key.shape[2] - 1)[..., None]
        keys = torch.take_along_dim(key, at, 2).to(precision)
        # Where there is no sampled key, what was gathered may be padding, and hold anything.
        exists = (slots < key.shape[2])[..., None]
        values = torch.take_along_dim(value, at, 2).to(precision).masked_fill(~exists, 0.0)
        bias = sampled.weights[:, heads, None].log()
        for begin in range(0, query.shape[2], size):
            queries = slice(begin, min(begin + size, query.shape[2]))
            position = torch.arange(queries.start, queries.stop, device=query.device)
            position = (problem.first_query + position)[:, None]
            seen = slots[:, :, None, :] <= position - window
            seen = seen & (position < end[:, None, None, None])
            logits = query[:, heads, queries].to(precision) @ keys.transpose(2, 3)
            logits = (logits * problem.scale + bias).masked_fill(~seen, -torch.inf)
            old = lse[:, heads, queries]
            new = torch.logaddexp(old, logits.logsumexp(-1))
            mixed = out[:, heads, queries] * (old - new).exp()[..., None]
            mixed = mixed + (logits - new[..., None]).exp() @ values
            any_seen = seen.any(-1)
            old.copy_(torch.where(any_seen, new, old))
            target = out[:, heads, queries]
            target.copy_(torch.where(any_seen[..., None], mixed.to(out.dtype), target))
