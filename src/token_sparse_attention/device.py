"""Which device is the current one: kernels are launched there, wherever their tensors lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_its_device(function: _Function) -> _Function:
    """Return a function that runs with the device of its first argument, a tensor, as the current.

    The layers of a model that is split over several GPUs are called with tensors of their own
    GPU, while the current device stays the first one.
    """

    @functools.wraps(function)
    def moved(first: Any, *others: Any, **named: Any) -> Any:
        if not first.is_cuda or torch.compiler.is_compiling():
            return function(first, *others, **named)
        if first.device.index == torch.cuda.current_device():
            return function(first, *others, **named)
        with torch.cuda.device(first.device):
            return function(first, *others, **named)

    return cast("_Function", moved)
