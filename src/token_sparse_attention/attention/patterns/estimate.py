"""What the patterns estimate with: block means, the last queries' attention, coverage.

Shapes depend on no data, so nothing waits for the device; no memory is quadratic in tokens. Each
estimate has a Triton kernel and a reference in tensor operations; `impl` is as in `score_tokens`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.attention.block_mask import BlockGrid
from token_sparse_attention.impls import load_kernels, resolve_impl
from token_sparse_attention.inputs import unit_stride


def query_groups(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Return the query heads ``[B, G, S_q, D]`` of each KV head."""
    return torch.split(query, query.shape[1] // key.shape[1], 1)


def check_count(name: str, value: object, minimum: int) -> None:
    """Raise TypeError or ValueError unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_share(name: str, value: object, *, zero: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is in ``(0, 1]``; or 0, where allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and (0 < value <= 1 or (zero and value == 0))):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {value}")


def check_per_head(name: str, what: str, values: Sequence[object], num_heads: int) -> None:
    """Raise ValueError unless there is a value for each query head."""
    if len(values) != num_heads:
        raise ValueError(
            f"{name} must hold a {what} for each of the {num_heads} query heads, got {len(values)}"
        )


@functools.lru_cache(maxsize=256)
def per_head(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[H, 1]``, a number per head; cached, because a copy to the device waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def block_means(tokens: Tensor, size: int, *, impl: str = "auto") -> Tensor:
    """Mean of each block of rows, ``[B, H, S, D]`` to ``[B, H, ceil(S / size), D]`` float32."""
    if resolve_impl(impl, tokens, tokens.shape[-1]) == "triton":
        means: Tensor = load_kernels("estimation").block_means(tokens, size)
        return means
    length = tokens.shape[-2]
    blocks = -(-length // size)
    padded = F.pad(tokens, (0, 0, 0, blocks * size - length))
    split = padded.reshape(*tokens.shape[:-2], blocks, size, tokens.shape[-1])
    sums = split.sum(-2, dtype=torch.float32)
    begin = torch.arange(blocks, device=tokens.device) * size
    return sums / (length - begin).clamp(max=size)[:, None]


def block_sums(mass: Tensor, size: int) -> Tensor:
    """Sum over each block of tokens, ``[..., S]`` to ``[..., ceil(S / size)]``."""
    blocks = -(-mass.shape[-1] // size)
    padded = F.pad(mass, (0, blocks * size - mass.shape[-1]))
    return padded.reshape(*mass.shape[:-1], blocks, size).sum(-1)


def last_query_attention(query: Tensor, head_key: Tensor, count: int, scale: float) -> Tensor:
    """Causal softmax attention of the last `count` queries of one group.

    Args:
        query: ``[B, G, S_q, D]``, the query heads that share the KV head.
        head_key: ``[B, S_kv, D]``.
        count: queries, at most S_q.
        scale: factor of the logits.

    Returns:
        ``[B, G, count, S_kv]`` float32.
    """
    recent = (query[:, :, -count:].float() * scale).flatten(1, 2)
    logits = recent @ head_key.float().transpose(1, 2)
    logits = logits.view(*query.shape[:2], count, -1)
    future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
    logits[..., -count:].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def distance_mass(attention: Tensor) -> Tensor:
    """Sum attention along its diagonals: the mass at each distance from query to key.

    Args:
        attention: ``[..., W, S]``, of the last W queries.

    Returns:
        ``[..., S]``: entry d sums the W entries whose key lies d positions back.
    """
    window, length = attention.shape[-2:]
    # Reversed, row r begins W - 1 - r entries late: concatenate the rows, each one entry shorter.
    skewed = F.pad(attention.flip(-1), (0, window)).flatten(-2)[..., window - 1 :]
    width = length + window - 1
    rows = skewed[..., : window * width].reshape(*attention.shape[:-1], width)
    return rows[..., :length].sum(-2)


def last_query_mass(
    query: Tensor, key: Tensor, count: int, scale: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mean attention of the last `count` queries by key, and by distance back from the query.

    Args:
        query: ``[B, H, S_q, D]``.
        key: ``[B, H_kv, S_kv, D]``.
        count: queries, at most S_q.
        scale: factor of the logits.
        impl: as in `score_tokens`.

    Returns:
        Two tensors ``[B, H, S_kv]`` float32; each sums to 1 over its last dimension.
    """
    if resolve_impl(impl, query, query.shape[-1]) == "triton":
        query, key = unit_stride(query), unit_stride(key)
        masses: tuple[Tensor, Tensor] = load_kernels("estimation").last_query_mass(
            query, key, count, scale
        )
        return masses
    by_key, by_distance = [], []
    for kv_head, group in enumerate(query_groups(query, key)):
        attention = last_query_attention(group, key[:, kv_head], count, scale)
        by_key.append(attention.mean(2))
        by_distance.append(distance_mass(attention) / count)
    return torch.cat(by_key, 1), torch.cat(by_distance, 1)


def smallest_cover(
    mass: Tensor, share: float | Tensor, minimum: int = 0, *, impl: str = "auto"
) -> Tensor:
    """Mark the fewest entries of the last dimension that hold `share` of its mass.

    At least `minimum` entries are marked, the heaviest first, the first of equal ones. A row that
    holds NaN is marked as a whole, so that it yields what dense attention yields.

    Args:
        mass: ``[..., N]``, not negative.
        share: in ``[0, 1]``; 1 marks everything. A tensor holds one per row, ``[..., 1]``.
        minimum: entries to mark at least.
        impl: as in `score_tokens`; the kernel takes float32.

    Returns:
        ``[..., N]`` bool.
    """
    if resolve_impl(impl, mass) == "triton" and mass.dtype == torch.float32:
        shares: Tensor | None = None
        if isinstance(share, Tensor):
            shares = share.to(mass.dtype).expand(*mass.shape[:-1], 1).reshape(-1)
        elif share:
            shares = torch.full((1,), share, device=mass.device)
        cover: Tensor = load_kernels("estimation_lists").smallest_cover(mass, shares, minimum)
        return cover
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    marked = ~(before >= share * ordered.sum(-1, keepdim=True))
    marked |= torch.arange(mass.shape[-1], device=mass.device) < minimum
    marked |= torch.as_tensor(share, device=mass.device) >= 1
    return torch.zeros_like(marked).scatter_(-1, order, marked)


def blocks_at_distances(chosen: Tensor, grid: BlockGrid, *, impl: str = "auto") -> Tensor:
    """Mark the blocks that hold a pair of query and key at a chosen distance.

    Args:
        chosen: ``[B, H, S_kv]`` bool, by distance.
        grid: the blocks.
        impl: as in `score_tokens`.

    Returns:
        ``[B, H, Q, K]`` bool.
    """
    before = F.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))
    offset = grid.kv_len - grid.query_len
    # A float dtype: `resolve_impl` refuses that of the counts, which the kernel does take.
    if resolve_impl(impl, chosen.new_empty(0, dtype=torch.float32)) == "triton":
        marked: Tensor = load_kernels("estimation_lists").blocks_at_distances(
            before, offset, grid.query_len, grid.block_size
        )
        return marked
    first, last = grid.query_span(chosen.device)
    begin = grid.kv_begin(chosen.device)
    nearest = (first[:, None] - (begin + grid.block_size[1] - 1)).clamp(min=0)
    beyond = (last[:, None] - begin + 1).clamp(min=0)
    return before[..., beyond] > before[..., nearest]
