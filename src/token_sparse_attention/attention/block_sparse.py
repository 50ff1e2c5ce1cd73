"""Attention over the blocks of a `BlockMask`: one executor, three kernels.

Causal and aligned at the end; GQA is native, keys and values are never repeated.
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
from token_sparse_attention.attention.flash import fa4_installed
from token_sparse_attention.device import on_its_device
from token_sparse_attention.inputs import (
    check_attention_inputs,
    check_no_gradients,
    resolve_scale,
)
from token_sparse_attention.results import Attended

BLOCK_BACKENDS = ("auto", "fa4", "flex", "reference")
_REFERENCE_BLOCKS = 32  # blocks of keys the reference gathers at once, which bounds its memory
_FLEX_VARIANTS = 256  # compiled kernels of FlexAttention kept in a process
_FA4_HEAD_DIM = 128  # beyond it flash-attn-4's Hopper tiles are not 128 keys wide


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each query over the keys that `mask` leaves it.

    Args:
        query: ``[B, H, S_q, D]``, the last S_q positions.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv.
        value: ``[B, H_kv, S_kv, D]``.
        mask: the blocks, for the same B, H and lengths.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        backend: ``"auto"``, ``"fa4"`` (flash-attn-4, Hopper), ``"flex"`` (PyTorch's
            FlexAttention, compiled at the first call) or ``"reference"``, which reads counts
            on the host. An explicit choice never falls back.
        return_lse: also return the log-sum-exp of each query's scaled logits.

    Returns:
        ``[B, H, S_q, D]`` in query's dtype, or a pair with ``[B, H, S_q]`` float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, an input requires a gradient, or the backend cannot
            run the input.

    Example:
        >>> query = torch.randn(1, 4, 300, 32)
        >>> key, value = torch.randn(2, 1, 2, 300, 32)
        >>> kept = torch.rand(1, 4, 3, 3) < 0.5
        >>> mask = BlockMask.from_block_map(kept, query_len=300, kv_len=300)
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    backend: str,
    want_lse: bool,
) -> Attended:
    """`block_sparse_attention` on checked arguments."""
    chosen = choose_block_backend(backend, query, mask.block_size, want_lse=want_lse).name
    run = {"fa4": _fa4_attention, "flex": _flex_blocks, "reference": _reference_attention}[chosen]
    out, lse = run(query, key, value, mask, scale, want_lse)
    return Attended(out, lse if want_lse else None)


def check_mask(mask: BlockMask, query: Tensor, key: Tensor) -> None:
    """Raise TypeError or ValueError unless `mask` was made for these tensors."""
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    made_for = (*mask.full_count.shape[:2], mask.query_len, mask.kv_len)
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
    """Return the block-sparse backend to run: the given one, or the first that can.

    Order for ``"auto"``: fa4 on Hopper, flex on CUDA, the reference.

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

    With ``causal=True`` it applies the causal rule inside every listed block, aligned at the
    end, which is what partial blocks need and full blocks do not mind; it checks the end of
    the keys in the highest block of each list only, so lists must ascend. Heads differ, so
    groups cannot be packed.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    blocks = interface.BlockSparseTensorsTorch(
        mask_block_cnt=mask.partial_count,
        mask_block_idx=mask.partial_index,
        full_block_cnt=mask.full_count,
        full_block_idx=mask.full_index,
        block_size=mask.block_size,
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
    # A tensor, because a number would be compiled in and every length would compile anew.
    offset = torch.full((), mask.kv_len - mask.query_len, device=query.device)

    def causal(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
        return slot <= row + offset

    partial = mask.partial_count, mask.partial_index
    full = mask.full_count, mask.full_index
    return flex_attention(
        query, key, value, partial, full, causal, mask.block_size, scale, want_lse
    )


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partial: tuple[Tensor, Tensor],
    full: tuple[Tensor, Tensor] | None,
    allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    block_size: tuple[int, int],
    scale: float,
    want_lse: bool,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention on lists of blocks made by hand, compiled.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        value: likewise.
        partial: counts ``[B, H, Q]`` and numbers ``[B, H, Q, K]`` of the blocks in which
            `allowed` is asked.
        full: of the blocks in which it is not.
        allowed: may ``(batch, head, query, key)`` attend?
        block_size: queries and keys per block.
        scale: factor of the logits.
        want_lse: whether the log-sum-exp is wanted, which the CPU does not give.
        tiles: FlexAttention's kernel options on CUDA, where its own choice does not do.
    """
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    kv_blocks = -(-key.shape[2] // block_size[1])
    lists = [_of_width(*some, kv_blocks) for some in (partial, full) if some]
    blocks = flex.BlockMask.from_kv_blocks(
        *lists[0],
        *(lists[1] if full else (None, None)),
        BLOCK_SIZE=block_size,
        mask_mod=allowed,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    # Lengths do not compile anew; head sizes, dtypes, factors and the like do.
    dynamo = importlib.import_module("torch._dynamo")
    with dynamo.config.patch(recompile_limit=_FLEX_VARIANTS):
        result = _compiled_flex()(
            query,
            key,
            value,
            block_mask=blocks,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            # Its kernel for few queries wants the heads of a group to share their blocks.
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
        # Where compiling is off or gives up, this runs as it is, and FlexAttention would then
        # attend to every block: it reads the lists only when compiled.
        if not torch.compiler.is_compiling():
            raise ValueError(
                "backend 'flex' needs torch.compile, which is disabled here or has given up; "
                "choose another"
            )
        return flex.flex_attention(*tensors, **options)

    return torch.compile(compiled_only, dynamic=True, fullgraph=True)


def _reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """A block of queries at a time, over the blocks of keys it lists and no others."""
    precision = torch.promote_types(query.dtype, torch.float32)
    key_blocks, value_blocks = (_in_blocks(x, mask) for x in (key, value))
    first_query = mask.kv_len - mask.query_len
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if want_lse else None
    for block, most_full in enumerate(mask.full_count.amax((0, 1)).tolist()):
        rows = slice(block * mask.block_size[0], (block + 1) * mask.block_size[0])
        part = query[:, :, rows].to(precision) * scale
        position = torch.arange(part.shape[2], device=query.device) + rows.start + first_query
        state = OnlineSoftmax.start(part)
        for numbers, listed in _listed_blocks(mask, block, most_full):
            keys, values = _gather(key_blocks, numbers), _gather(value_blocks, numbers)
            logits = part @ keys.to(precision).transpose(2, 3)
            inside = torch.arange(mask.block_size[1], device=query.device)
            slots = (numbers[..., None] * mask.block_size[1] + inside).flatten(2)[:, :, None]
            seen = (slots <= position[:, None]) & listed.repeat_interleave(mask.block_size[1], -1)[
                :, :, None
            ]
            state = state.add(logits.masked_fill(~seen, -torch.inf), values.to(precision))
        out[:, :, rows] = state.output().to(out.dtype)
        if lse is not None:
            lse[:, :, rows] = state.lse()
    return out, lse


def _in_blocks(tensor: Tensor, mask: BlockMask) -> Tensor:
    """``[B, H_kv, S_kv, D]`` as ``[B, H_kv, K, block, D]``, the last block padded with zeros."""
    padding = mask.grid.kv_blocks * mask.block_size[1] - mask.kv_len
    padded = F.pad(tensor, (0, 0, 0, padding))
    return padded.reshape(*tensor.shape[:2], -1, mask.block_size[1], tensor.shape[3])


def _gather(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Blocks ``[B, H_kv, K, block, D]`` by ``numbers [B, H, N]``: ``[B, H, N * block, D]``."""
    batch = torch.arange(numbers.shape[0], device=numbers.device)[:, None, None]
    head = torch.arange(numbers.shape[1], device=numbers.device)[:, None]
    return blocks[batch, head // (numbers.shape[1] // blocks.shape[1]), numbers].flatten(2, 3)


def _listed_blocks(mask: BlockMask, block: int, most_full: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield block numbers ``[B, H, N]`` and whether each is listed, in bounded portions.

    What is not listed is replaced by the diagonal block, so no other block is read.
    """
    for name, most in (("partial", mask.partial_index.shape[-1]), ("full", most_full)):
        count = getattr(mask, f"{name}_count")[:, :, block, None]
        index = getattr(mask, f"{name}_index")[:, :, block]
        for begin in range(0, most, _REFERENCE_BLOCKS):
            portion = index[..., begin : min(begin + _REFERENCE_BLOCKS, most)].long()
            listed = torch.arange(portion.shape[-1], device=count.device) + begin < count
            yield torch.where(listed, portion, mask.partial_index[:, :, block, :1]), listed


class OnlineSoftmax(NamedTuple):
    """Softmax attention over portions of keys: running maximum, sum and weighted values.

    Attributes:
        top: ``[B, H, S_q]``, the highest logit so far.
        total: ``[B, H, S_q]``, the sum of ``exp(logit - top)``.
        weighted: ``[B, H, S_q, D]``, the values weighted likewise.
    """

    top: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def start(cls, query: Tensor) -> OnlineSoftmax:
        """No keys yet, for queries ``[B, H, S_q, D]``."""
        zero = query.new_zeros(query.shape[:3])
        return cls(zero - torch.inf, zero, torch.zeros_like(query))

    def add(self, logits: Tensor, values: Tensor) -> OnlineSoftmax:
        """Add keys by their logits ``[B, H, S_q, N]`` and values ``[B, H, N, D]``."""
        top = torch.maximum(self.top, logits.amax(-1))
        base = top.masked_fill(top == -torch.inf, 0.0)  # where nothing was seen yet
        faded = (self.top - base).exp()
        weights = (logits - base[..., None]).exp()
        total = self.total * faded + weights.sum(-1)
        return OnlineSoftmax(top, total, self.weighted * faded[..., None] + weights @ values)

    def output(self) -> Tensor:
        """Return the attention output; zero where no key was seen."""
        return self.weighted / self.total.masked_fill(self.total == 0, 1.0)[..., None]

    def lse(self) -> Tensor:
        """Return the log-sum-exp in float32; -inf where no key was seen."""
        return (self.top + self.total.log()).float()
