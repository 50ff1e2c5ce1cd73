"""Tensor parallelism: what ranks exchange so that all decide as one process would.

A budget and the crossover depend on all query heads of a layer. Where ranks hold some heads
each, they exchange their parts here, and every rank gets the same result. Whether ranks
exchange depends on shapes and settings alone, never on data, so no rank waits for a message that
another does not send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def resolve_tp_group(tp_group: ProcessGroup | None) -> ProcessGroup | None:
    """Return the group, or None where this process has all heads.

    Raises:
        TypeError: if it is no process group with this process in it.
    """
    if tp_group is None:
        return None
    if not (dist.is_available() and isinstance(tp_group, dist.ProcessGroup)):
        raise TypeError(
            "tp_group must be a torch.distributed.ProcessGroup that this process belongs to, "
            f"or None; got {tp_group!r}"
        )
    return None if tp_group.size() == 1 else tp_group


def gather_heads(local: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Return all ranks' heads ``[B, ranks * H, ...]``, of each rank's ``local [B, H, ...]``."""
    ranks, batch_size = tp_group.size(), local.shape[0]
    gathered = local.new_empty(ranks * batch_size, *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=tp_group)
    by_sequence = gathered.view(ranks, batch_size, *local.shape[1:]).transpose(0, 1)
    return by_sequence.flatten(1, 2)


def own_heads(heads: Tensor, num_heads: int, tp_group: ProcessGroup) -> Tensor:
    """Return this rank's part ``[B, H, ...]`` of what `gather_heads` returned."""
    return heads.narrow(1, tp_group.rank() * num_heads, num_heads).contiguous()


def local_heads(
    heads: Sequence[int], num_heads: int, tp_group: ProcessGroup | None
) -> tuple[int, ...]:
    """Return which of the given heads this rank has, by their numbers on this rank.

    Args:
        heads: numbers of query heads in the layer.
        num_heads: how many heads each rank has.
        tp_group: the ranks; None for one that has all heads.
    """
    first = 0 if tp_group is None else tp_group.rank() * num_heads
    return tuple(head - first for head in heads if first <= head < first + num_heads)


def mean_of_ranks(
    mean: Tensor, not_finite: Tensor, tp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the mean over all ranks' heads, and which sequences have scores that are not finite.

    Args:
        mean: ``[B, N]`` float32, the mean over this rank's heads.
        not_finite: ``[B]`` int32, above 0 where this rank has such scores.
        tp_group: the ranks.
    """
    both = torch.cat((mean, not_finite[:, None].to(mean.dtype)), 1)
    dist.all_reduce(both, group=tp_group)
    both /= tp_group.size()
    return both[:, :-1].contiguous(), (both[:, -1] > 0).to(not_finite.dtype)


def counts_of_ranks(
    droppable: Tensor, not_finite: Tensor, tp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return all ranks' counts ``[B, ranks * H]``, and which sequences have non-finite scores.

    Args:
        droppable: ``[B, H]`` int32, this rank's counts.
        not_finite: ``[B]`` int32, above 0 where this rank has such scores.
        tp_group: the ranks.
    """
    num_heads = droppable.shape[1]
    both = gather_heads(torch.cat((droppable, not_finite[:, None]), 1), tp_group)
    by_rank = both.view(len(both), tp_group.size(), num_heads + 1)
    return by_rank[..., :num_heads].flatten(1), by_rank[..., num_heads].amax(1)
