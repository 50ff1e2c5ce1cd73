"""Which code scores, chooses and moves tokens: plain PyTorch, or Triton kernels."""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

IMPLS = ("auto", "reference", "triton")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_MAX_HEAD_DIM = 256


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is a known name."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def resolve_impl(impl: str, tensor: Tensor, head_dim: int | None = None) -> str:
    """Return which code runs: ``"triton"`` on CUDA where it takes the input, else reference.

    Args:
        impl: ``"auto"``, or a choice that must be able to run.
        tensor: gives device and dtype.
        head_dim: D, None where no product is computed.

    Raises:
        ValueError: if `impl` is unknown or cannot run.
    """
    check_impl(impl)
    if impl == "reference":
        return impl
    obstacle = None
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = f"tensors on {tensor.device.type}"
    elif tensor.dtype not in _TRITON_DTYPES:
        obstacle = f"{tensor.dtype}"
    elif head_dim is not None and head_dim > _TRITON_MAX_HEAD_DIM:
        obstacle = f"head size {head_dim}"
    if impl == "auto":
        return "triton" if tensor.is_cuda and obstacle is None else "reference"
    if obstacle is not None:
        raise ValueError(
            f"impl 'triton' takes CUDA tensors of float32, float16 or bfloat16 and head sizes "
            f"up to {_TRITON_MAX_HEAD_DIM}, got {obstacle}; choose 'auto' or 'reference'"
        )
    return impl


@functools.cache
def load_kernels(name: str) -> ModuleType:
    """Import a module of Triton kernels, which needs Triton: not installed everywhere."""
    return importlib.import_module(f"token_sparse_attention.kernels.{name}")
