"""Training on several GPUs: one process each, which average their gradients.

``torchrun`` starts the processes and tells each its rank by the environment; without it there is
one process, rank 0 of 1, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


def join() -> tuple[int, int]:
    """This process's rank and the number of processes; with several, a group is made of them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), world


def wait() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average(parameters: Iterable[torch.nn.Parameter], seconds: float) -> float:
    """Average the gradients of all processes, in place, and their clocks; return the clocks' mean.

    The schedule goes by the clock, so all must read the same one: they would otherwise take
    different learning rates, and stop at different steps.
    """
    if not dist.is_initialized():
        return seconds
    gradients = [p.grad for p in parameters if p.grad is not None]
    clock = gradients[0].new_tensor([seconds])
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [clock])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, clock = flat.split([gradient.numel() for gradient in gradients] + [1])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))
    return float(clock)
