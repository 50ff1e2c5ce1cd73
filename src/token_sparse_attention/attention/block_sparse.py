"""Attention over the blocks of a `BlockMask`, by flash-attn-4, FlexAttention or the reference.

Causal, aligned at the end. GQA is native: keys and values are never repeated.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockMask
from token_sparse_attention.attention.block_reference import attend_reference
from token_sparse_attention.attention.flash import fa4_installed
from token_sparse_attention.device import on_its_device
from token_sparse_attention.inputs import (
    check_attention_inputs,
    check_no_gradients,
    resolve_scale,
)
from token_sparse_attention.results import Attended

BLOCK_BACKENDS = ("auto", "fa4", "flex", "reference")
_FLEX_VARIANTS = 256  # compiled kernels of FlexAttention kept in a process
_FA4_HEAD_DIM = 128  # above it flash-attn-4's Hopper tiles are not 128 keys wide


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *,
    scale: float | None = ..., backend: str = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *,
    scale: float | None = ..., backend: str = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *,
    scale: float | None = None, backend: str = "auto", return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention of each query over the keys that `mask` leaves it.

    Args:
        query: ``[B, H, S_q, D]``, the last S_q positions.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv.
        value: ``[B, H_kv, S_kv, D]``.
        mask: the blocks, for the same B, H and lengths.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        backend: ``"auto"``, ``"fa4"`` (flash-attn-4, Hopper), ``"flex"`` (PyTorch's
            FlexAttention, compiled at the first call) or ``"reference"``, which reads counts
            on the host. An explicit choice is never replaced by another.
        return_lse: also return the log-sum-exp of each query's scaled logits.

    Returns:
        ``[B, H, S_q, D]`` in query's dtype, or a pair with ``[B, H, S_q]`` float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, an input requires a gradient, or the backend cannot
            run the input.

    Example:
        >>> from token_sparse_attention.attention.block_mask import BlockGrid
        >>> query = torch.randn(1, 4, 300, 32)
        >>> key, value = torch.randn(2, 1, 2, 300, 32)
        >>> kept = torch.rand(1, 4, 3, 3) < 0.5
        >>> mask = BlockMask.from_block_map(kept, BlockGrid(300, 300))
        >>> block_sparse_attention(query, key, value, mask).shape
        torch.Size([1, 4, 300, 32])
    """
    check_attention_inputs(query, key, value)
    check_no_gradients(query=query, key=key, value=value)
    check_mask(mask, query, key)
    scale = resolve_scale(scale, query.shape[-1])
    with torch.no_grad():
        out, lse = attend_blocks(
            query, key, value, mask, scale=scale, backend=backend, want_lse=return_lse
        )
    return out if lse is None else (out, lse)


@on_its_device
def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *,
    scale: float, backend: str, want_lse: bool,
) -> Attended:  # fmt: skip
    """`block_sparse_attention` on checked arguments."""
    chosen = choose_block_backend(backend, query, mask.grid.block_size, want_lse=want_lse).name
    run = {"fa4": _fa4_attention, "flex": _flex_blocks, "reference": attend_reference}[chosen]
    out, lse = run(query, key, value, mask, scale, want_lse)
    return Attended(out, lse if want_lse else None)


def kv_head_portions(
    num_heads: int, num_kv_heads: int, portion: int
) -> Iterator[tuple[slice, slice]]:
    """Yield a portion of the KV heads at a time: its query heads, and its KV heads."""
    group = num_heads // num_kv_heads
    for first in range(0, num_kv_heads, portion):
        last = min(first + portion, num_kv_heads)
        yield slice(first * group, last * group), slice(first, last)


def check_mask(mask: BlockMask, query: Tensor, key: Tensor) -> None:
    """Raise TypeError or ValueError unless `mask` was made for these tensors."""
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    made_for = (*mask.full_count.shape[:2], mask.grid.query_len, mask.grid.kv_len)
    given = (*query.shape[:3], key.shape[2])
    if made_for != given:
        raise ValueError(
            f"mask must be made for B, H, S_q, S_kv = {given}, the tensors'; got {made_for}"
        )
    if mask.full_count.device != query.device:
        raise ValueError(
            f"mask must be on query's device {query.device}, got {mask.full_count.device}"
        )


class BlockBackendChoice(NamedTuple):
    """A block-sparse backend and why it was chosen."""

    name: str
    reason: str


def choose_block_backend(
    backend: str,
    query: Tensor,
    block_size: tuple[int, int] = BLOCK_SIZE,
    *,
    want_lse: bool = False,
) -> BlockBackendChoice:
    """Return the block-sparse backend to run: the given one, or the first that can run.

    The order for ``"auto"`` is fa4 on Hopper, flex on CUDA, the reference.

    Args:
        backend: one of `BLOCK_BACKENDS`.
        query: ``[B, H, S_q, D]``.
        block_size: queries and keys per block.
        want_lse: whether the log-sum-exp is wanted.

    Raises:
        ValueError: if the name is unknown, or an explicit backend cannot run the input.
    """
    if backend not in BLOCK_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BLOCK_BACKENDS)}; got {backend!r}")
    obstacles = {
        "fa4": _fa4_obstacle(query, block_size),
        "flex": _flex_obstacle(query, block_size, want_lse),
        "reference": None,
    }
    if backend != "auto":
        if obstacles[backend] is not None:
            raise ValueError(
                f"backend {backend!r} cannot run this input: {obstacles[backend]}; choose "
                "another or 'auto'"
            )
        return BlockBackendChoice(backend, "asked for")
    if obstacles["flex"] is None and not query.is_cuda:
        obstacles["flex"] = "compiled for CUDA only unless asked for"
    passed_over = [f"{name} ({why})" for name, why in obstacles.items() if why]
    name = next(name for name, why in obstacles.items() if why is None)
    return BlockBackendChoice(name, f"passed over: {', '.join(passed_over) or 'none'}")


def _fa4_obstacle(query: Tensor, block_size: tuple[int, int]) -> str | None:
    if not query.is_cuda:
        return f"not on {query.device.type}"
    if not fa4_installed():
        return "needs flash-attn-4: pip install 'token-sparse-attention[fa4]'"
    if torch.cuda.get_device_capability(query.device)[0] != 9:
        return "its block-sparse tiles are known for Hopper only"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"no {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > _FA4_HEAD_DIM:
        return f"no head size {query.shape[-1]}"
    return None if block_size == BLOCK_SIZE else f"blocks must be {BLOCK_SIZE}, not {block_size}"


def _flex_obstacle(query: Tensor, block_size: tuple[int, int], want_lse: bool) -> str | None:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no {query.dtype}"
    if query.device.type not in ("cuda", "cpu"):
        return f"not on {query.device.type}"
    if query.is_cuda and (block_size[0] % 128 or block_size[1] % 128):
        return f"blocks must be multiples of 128, not {block_size}"
    if query.is_cuda and query.shape[-1] < 16:
        return f"no head size {query.shape[-1]}"
    if want_lse and not query.is_cuda:
        return "PyTorch's CPU kernel gives no log-sum-exp"
    return None


def _fa4_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """flash-attn-4's block-sparse forward pass.

    With ``causal=True`` it applies the causal rule, aligned at the end, inside every listed
    block: partial blocks need the rule, in full ones it masks nothing. It checks the end of the
    keys in the highest block of each list only, so lists must ascend. The heads of a group list
    different blocks, so groups cannot be packed.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    blocks = interface.BlockSparseTensorsTorch(
        mask_block_cnt=mask.partial_count,
        mask_block_idx=mask.partial_index,
        full_block_cnt=mask.full_count,
        full_block_idx=mask.full_index,
        block_size=mask.grid.block_size,
    )
    out, lse = interface._flash_attn_fwd(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scale,
        causal=True,
        pack_gqa=False,
        block_sparse_tensors=blocks,
        return_lse=want_lse,
    )[:2]
    return out.transpose(1, 2), lse


def _flex_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    # A tensor: an int would be compiled in, and every length would compile anew.
    offset = torch.full((), mask.grid.kv_len - mask.grid.query_len, device=query.device)

    def causal(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
        return slot <= row + offset

    partial, full = (mask.partial_count, mask.partial_index), (mask.full_count, mask.full_index)
    blocks = FlexBlocks(partial, full, causal, mask.grid.block_size)
    return flex_attention(query, key, value, blocks, scale, want_lse)


class FlexBlocks(NamedTuple):
    """Lists of blocks for FlexAttention.

    Attributes:
        partial: counts ``[B, H, Q]`` and numbers ``[B, H, Q, K]`` of the blocks in which
            `allowed` masks.
        full: counts and numbers of the blocks without a mask; None for no such blocks.
        allowed: whether ``(batch, head, query, key)`` may attend.
        block_size: queries and keys per block.
    """

    partial: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor] | None
    allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    block_size: tuple[int, int]


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: FlexBlocks, scale: float, want_lse: bool,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """FlexAttention on given lists of blocks, compiled.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: ``[B, H_kv, S_kv, D]``.
        blocks: the lists.
        scale: factor of the logits.
        want_lse: whether to return the log-sum-exp, which the CPU kernel does not give.
        tiles: kernel options on CUDA, in place of FlexAttention's own choice.
    """
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    kv_blocks = -(-key.shape[2] // blocks.block_size[1])
    mask = flex.BlockMask.from_kv_blocks(
        *_of_width(*blocks.partial, kv_blocks),
        *(_of_width(*blocks.full, kv_blocks) if blocks.full else (None, None)),
        BLOCK_SIZE=blocks.block_size,
        mask_mod=blocks.allowed,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    # A new length compiles nothing; a new head size, dtype or scale compiles a kernel.
    dynamo = importlib.import_module("torch._dynamo")
    with dynamo.config.patch(recompile_limit=_FLEX_VARIANTS):
        result = _compiled_flex()(
            query,
            key,
            value,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            # Its kernel for few queries requires the heads of a group to share their blocks.
            kernel_options=(
                {"FORCE_USE_FLEX_ATTENTION": True, **(tiles or {})} if query.is_cuda else None
            ),
            return_aux=flex.AuxRequest(lse=True) if want_lse else None,
        )
    return (result[0], result[1].lse) if want_lse else (result, None)


def _of_width(count: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return a list of blocks padded to `width` entries, contiguous.

    FlexAttention's CUDA kernel steps through both of its lists by the strides of the first, and
    its CPU kernel checks their width against the keys.
    """
    padded = F.pad(index, (0, width - index.shape[-1])) if index.shape[-1] < width else index
    return count.contiguous(), padded.contiguous()


@functools.cache
def _compiled_flex() -> Any:
    flex = importlib.import_module("torch.nn.attention.flex_attention")

    def compiled_only(*tensors: Tensor, **options: Any) -> Any:
        # Where compiling is off or gives up, this runs eagerly. FlexAttention would then attend
        # to every block: it reads the lists only when compiled.
        if not torch.compiler.is_compiling():
            raise ValueError(
                "backend 'flex' needs torch.compile, which is disabled here or has given up; "
                "choose another"
            )
        return flex.flex_attention(*tensors, **options)

    return torch.compile(compiled_only, dynamic=True, fullgraph=True)
