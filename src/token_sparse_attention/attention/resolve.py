"""Which attention backend runs: the one that was asked for, or what ``"auto"`` stands for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from token_sparse_attention.attention.backend import Backend
from token_sparse_attention.attention.flash import FlashBackend, fa4_installed
from token_sparse_attention.attention.names import BACKENDS, pattern_config
from token_sparse_attention.attention.pattern_backend import PatternBackend
from token_sparse_attention.attention.sdpa import SDPABackend

_HALF = (torch.float16, torch.bfloat16)
_MAX_FLASH_HEAD_DIM = 256


def resolve_backend(backend: str, query: Tensor, key: Tensor) -> Backend:
    """Return the backend that attends; for ``"auto"`` the fastest that is available.

    Order on CUDA: fa4 (measured on Hopper only, so chosen there only), flash, efficient,
    math, the first that takes the dtype and head size. cuDNN, though faster than flash, is
    left to an explicit choice: it plans anew, for tens of milliseconds, at every length,
    and each layer keeps another number of tokens. Off CUDA, PyTorch's own fused kernel.

    Args:
        backend: a string form, see `names.parse_backend`.
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.

    Raises:
        ValueError: if the name is unknown, or if flash-attn-4 or FlashAttention-2 was asked for
            and cannot run.
    """
    group = query.shape[1] // key.shape[1]
    return _resolve(backend, query.device, query.dtype, query.shape[-1], group)


@functools.lru_cache(maxsize=256)
def _resolve(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, group: int
) -> Backend:
    pattern = pattern_config(backend)
    if pattern is not None:
        dense = _resolve("auto", device, dtype, head_dim, group)
        return PatternBackend(backend.partition(":")[0], pattern=pattern, dense_kernel=dense)
    is_cuda = device.type == "cuda"
    if backend == "auto":
        return _fastest(device, dtype, head_dim, group)
    if backend == "fa4" or (backend == "flash" and is_cuda):
        _check_flash(backend, device, dtype, head_dim)
        return FlashBackend(backend)
    return SDPABackend(backend)


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> Backend:
    if device.type != "cuda":
        return SDPABackend("flash", f"PyTorch's fused kernel for {device.type}")
    name = torch.cuda.get_device_name(device)
    flash_obstacle = _flash_obstacle(dtype, head_dim)
    obstacle = flash_obstacle if fa4_installed() else "not installed"
    if obstacle is None and torch.cuda.get_device_capability(device)[0] == 9:
        return FlashBackend("fa4", f"first choice on {name}")
    passed_over = f"fa4 ({obstacle or 'not measured on this device'})"
    query = torch.empty(1, group, 8, head_dim, dtype=dtype, device=device)
    params = SDPAParams(query[:, :1], query[:, :1], query[:, :1], None, 0.0, True, False)
    if flash_obstacle is None and can_use_flash_attention(params, False):
        return FlashBackend("flash", f"on {name}; passed over: {passed_over}")
    if can_use_efficient_attention(params, False):
        return SDPABackend("efficient", f"on {name}; passed over: {passed_over}, flash")
    return SDPABackend("math", "no fused kernel takes this dtype and head size")


def _flash_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no FlashAttention can run; PyTorch's public functions would pad the head size."""
    if dtype not in _HALF:
        return f"no {dtype}"
    if head_dim % 8 or head_dim > _MAX_FLASH_HEAD_DIM:
        return f"no head size {head_dim}"
    return None


def _check_flash(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ValueError if ``"fa4"`` or, on CUDA, ``"flash"`` cannot run such inputs."""
    if device.type != "cuda":
        obstacle: str | None = f"not on {device.type}"
    elif backend == "fa4" and not fa4_installed():
        raise ValueError(
            "attention_backend 'fa4' needs flash-attn-4: "
            "pip install 'token-sparse-attention[fa4]'; or choose another or 'auto'"
        )
    else:
        obstacle = _flash_obstacle(dtype, head_dim)
    if obstacle is not None:
        raise ValueError(
            f"attention_backend {backend!r} cannot run {dtype} with head size {head_dim} on "
            f"{device.type}; choose another or 'auto'"
        )


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is the name of a dense kernel."""
    if backend not in BACKENDS:
        raise ValueError(
            f"attention_backend must be one of {', '.join(BACKENDS)}; got {backend!r}"
        )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, backend: str = "auto"
) -> Tensor:
    """Causal attention of every query over every key, aligned at the end.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``, ``S_kv >= S_q``.
        value: ``[B, H_kv, S_kv, D]``.
        scale: factor of the logits.
        backend: a string form, see `names.parse_backend`.

    Raises:
        ValueError: if the backend is unknown or cannot run these inputs.
    """
    return resolve_backend(backend, query, key).attend(query, key, value, scale=scale).out
