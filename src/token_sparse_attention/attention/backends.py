"""Which attention kernels there are, and which one `auto` runs."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

BACKENDS = ("auto", "fa4", "flash", "cudnn", "efficient", "math")
_HALF = (torch.float16, torch.bfloat16)
MAX_FLASH_HEAD_DIM = 256


class BackendChoice(NamedTuple):
    """An attention backend and why it was chosen."""

    name: str
    reason: str


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name."""
    if backend not in BACKENDS:
        raise ValueError(
            f"attention_backend must be one of {', '.join(BACKENDS)}; got {backend!r}"
        )


@functools.cache
def fa4_installed() -> bool:
    """Return whether flash-attn-4 is installed."""
    try:
        return importlib.util.find_spec("flash_attn.cute.interface") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


def takes_packed(backend: str, query: Tensor) -> bool:
    """Return whether `backend` reads packed lengths on the device, so that no host waits."""
    return backend == "fa4" or (backend == "flash" and query.is_cuda)


def choose_backend(
    backend: str, query: Tensor, key: Tensor, *, masked: bool = False
) -> BackendChoice:
    """Return the backend to run: the given one, or for ``"auto"`` the fastest available.

    Order on CUDA: fa4 (measured on Hopper only, so chosen there only), flash, efficient,
    math, the first that takes the dtype and head size. cuDNN, though faster than flash, is
    left to an explicit choice: it plans anew, for tens of milliseconds, at every length,
    and each layer keeps another number of tokens. Off CUDA, PyTorch's own fused kernel.

    Args:
        backend: one of `BACKENDS`.
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        masked: whether the kernel must take a written-out mask.
    """
    check_backend(backend)
    if backend != "auto":
        return BackendChoice(backend, "asked for")
    if not query.is_cuda:
        return BackendChoice("flash", f"PyTorch's fused kernel for {query.device.type}")
    device = torch.cuda.get_device_name(query.device)
    passed_over = []
    if not masked:
        obstacle = _fa4_obstacle(query)
        if obstacle is None and _is_hopper(query.device.index or 0):
            return BackendChoice("fa4", f"first choice on {device}")
        passed_over.append(f"fa4 ({obstacle or 'not measured on this device'})")
    mask = query.new_empty(1, 1, 8, 8, dtype=torch.bool) if masked else None
    probe = query[:, :: query.shape[1] // key.shape[1], :8]
    params = SDPAParams(probe, key[:, :, :8], key[:, :, :8], mask, 0.0, not masked, False)
    checks = {"flash": can_use_flash_attention, "efficient": can_use_efficient_attention}
    for name, can_use in checks.items():
        if can_use(params, False) and not (name == "flash" and _flash_obstacle(query)):
            return BackendChoice(name, f"on {device}; passed over: {', '.join(passed_over)}")
        passed_over.append(name)
    return BackendChoice("math", "no fused kernel takes this dtype and head size")


def _fa4_obstacle(query: Tensor) -> str | None:
    return _flash_obstacle(query) if fa4_installed() else "not installed"


def _flash_obstacle(query: Tensor) -> str | None:
    """Why no FlashAttention can run; PyTorch's public functions would pad the head size."""
    if query.dtype not in _HALF:
        return f"no {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > MAX_FLASH_HEAD_DIM:
        return f"no head size {query.shape[-1]}"
    return None


def check_flash(backend: str, query: Tensor) -> None:
    """Raise ValueError if ``"fa4"`` or, on CUDA, ``"flash"`` cannot run inputs like `query`.

    Off CUDA ``"flash"`` is PyTorch's own fused kernel, which says for itself what it cannot run.
    """
    if backend == "flash":
        obstacle = _flash_obstacle(query) if query.is_cuda else None
    else:
        obstacle = _fa4_obstacle(query) if query.is_cuda else f"not on {query.device.type}"
    if obstacle == "not installed":
        raise ValueError(
            "attention_backend 'fa4' needs flash-attn-4: "
            "pip install 'token-sparse-attention[fa4]'; or choose another or 'auto'"
        )
    if obstacle is not None:
        raise ValueError(
            f"attention_backend {backend!r} cannot run {query.dtype} with head size "
            f"{query.shape[-1]} on {query.device.type}; choose another or 'auto'"
        )
