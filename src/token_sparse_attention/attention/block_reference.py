"""Block-sparse attention in tensor operations: the executor off CUDA, and the tests' oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.attention.block_mask import BlockMask

_BLOCKS = 32  # blocks of keys gathered at once, which bounds memory


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`block_sparse_attention` on checked arguments, a block of queries at a time.

    Keys and values of blocks that no head lists are never read.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    key_blocks, value_blocks = (_in_blocks(x, mask) for x in (key, value))
    size, kv_size = mask.grid.block_size
    first_query = mask.grid.kv_len - mask.grid.query_len
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if want_lse else None
    for block, most_full in enumerate(mask.full_count.amax((0, 1)).tolist()):
        queries = slice(block * size, (block + 1) * size)
        part = query[:, :, queries].to(precision) * scale
        position = torch.arange(part.shape[2], device=query.device) + queries.start + first_query
        state = OnlineSoftmax.start(part)
        for numbers, listed in _listed_blocks(mask, block, most_full):
            keys, values = (
                gather_by_head(x, numbers).flatten(2, 3) for x in (key_blocks, value_blocks)
            )
            logits = part @ keys.to(precision).transpose(2, 3)
            inside = torch.arange(kv_size, device=query.device)
            slots = (numbers[..., None] * kv_size + inside).flatten(2)[:, :, None]
            seen = listed.repeat_interleave(kv_size, -1)[:, :, None]
            seen = seen & (slots <= position[:, None])
            state = state.add(logits.masked_fill(~seen, -torch.inf), values.to(precision))
        out[:, :, queries] = state.output().to(out.dtype)
        if lse is not None:
            lse[:, :, queries] = state.lse()
    return out, lse


def _in_blocks(tensor: Tensor, mask: BlockMask) -> Tensor:
    """``[B, H_kv, S_kv, D]`` as ``[B, H_kv, K, block, D]``, the last block padded with zeros."""
    size = mask.grid.block_size[1]
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % size))
    return padded.reshape(*tensor.shape[:2], -1, size, tensor.shape[3])


def gather_by_head(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries of ``[B, H_kv, N, ...]`` by ``index [B, H, M]``: ``[B, H, M, ...]``."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    head = torch.arange(index.shape[1], device=index.device)[:, None]
    return tensor[batch, head // (index.shape[1] // tensor.shape[1]), index]


def _listed_blocks(mask: BlockMask, block: int, most_full: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield block numbers ``[B, H, N]`` and whether each is listed, in bounded portions.

    Entries that are not listed become the diagonal block, so no other block is read.
    """
    for name, most in (("partial", mask.partial_index.shape[-1]), ("full", most_full)):
        count = getattr(mask, f"{name}_count")[:, :, block, None]
        index = getattr(mask, f"{name}_index")[:, :, block]
        for begin in range(0, most, _BLOCKS):
            portion = index[..., begin : min(begin + _BLOCKS, most)].long()
            listed = torch.arange(portion.shape[-1], device=count.device) + begin < count
            yield torch.where(listed, portion, mask.partial_index[:, :, block, :1]), listed


class OnlineSoftmax(NamedTuple):
    """Softmax attention over portions of keys: running maximum, sum and weighted values.

    Attributes:
        top: ``[B, H, S_q]``, the highest logit so far.
        total: ``[B, H, S_q]``, the sum of ``exp(logit - top)``.
        weighted: ``[B, H, S_q, D]``, the sum of the values times ``exp(logit - top)``.
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
