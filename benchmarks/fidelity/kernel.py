"""Attention within windows and to weighted keys drawn per block and head: Triton, and a reference.

Emulates block-wise sampling for measurements of accuracy; the package's own kernels are faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
_LOG2E = 1.4426950408889634


@dataclass
class Entries:
    """What the queries of each block see beside their windows, per head.

    Attributes:
        index: ``[blocks, H, L]`` row of the key, int32.
        position: ``[blocks, H, L]`` the last position it stands for; seen once out of the window.
        bias: ``[blocks, H, L]`` log of its weight.
        count: ``[blocks, H]`` how many of the `L` count, int32.
        sign: ``[blocks, H, L]`` of its weight, where weights can be negative.
        keys: ``[blocks, H, L, D]`` keys in place of `index`, where they are no rows of the cache.
        values: of the shape of `keys`.
    """

    index: Tensor
    position: Tensor
    bias: Tensor
    count: Tensor
    sign: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@triton.jit
def _attend(
    Q, K, V, O, INDEX, POSITION, BIAS, COUNT, SIGN, EK, EV,
    queries, keys, first, block, window, scale, H, entries, kv_rows,
    GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_ENTRIES: tl.constexpr, SIGNED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BM
    head = tl.program_id(1)
    rows = start + tl.arange(0, BM)
    d = tl.arange(0, D)
    live = rows < queries
    q = tl.load(
        Q + (head.to(tl.int64) * queries + rows[:, None]) * D + d[None, :],
        mask=live[:, None],
        other=0.0,
    )
    at = first + rows
    top = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    kv = (head // GROUP).to(tl.int64) * kv_rows * D
    begin = tl.maximum(first + start - window + 1, 0) // BN * BN
    end = tl.minimum(first + start + BM, keys)
    n = tl.arange(0, BN)
    for j in range(begin, end, BN):
        col = j + n
        inside = col < end
        k = tl.load(K + kv + col[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
        logit = tl.dot(q, k) * scale
        seen = (col[None, :] <= at[:, None]) & (col[None, :] > at[:, None] - window)
        logit = tl.where(seen & inside[None, :], logit, float("-inf"))
        new = tl.maximum(top, tl.max(logit, 1))
        p = tl.exp2(logit - new[:, None])
        shrink = tl.exp2(top - new)
        v = tl.load(V + kv + col[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * shrink + tl.sum(p, 1)
        top = new
    if HAS_ENTRIES:
        of = ((first + start) // block * H + head).to(tl.int64)
        count = tl.load(COUNT + of)
        of = of * entries
        for j in range(0, count, BN):
            e = j + n
            inside = e < count
            position = tl.load(POSITION + of + e, mask=inside, other=2000000000)
            bias = tl.load(BIAS + of + e, mask=inside, other=0.0)
            if OWN:
                k = tl.load(
                    EK + (of + e)[None, :] * D + d[:, None], mask=inside[None, :], other=0.0
                )
                v = tl.load(
                    EV + (of + e)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0
                )
            else:
                row = tl.load(INDEX + of + e, mask=inside, other=0)
                k = tl.load(K + kv + row[None, :] * D + d[:, None])
                v = tl.load(V + kv + row[:, None] * D + d[None, :])
            logit = tl.dot(q, k) * scale + bias[None, :] * 1.4426950408889634
            seen = position[None, :] <= at[:, None] - window
            logit = tl.where(seen, logit, float("-inf"))
            new = tl.maximum(top, tl.max(logit, 1))
            p = tl.exp2(logit - new[:, None])
            if SIGNED:
                p *= tl.load(SIGN + of + e, mask=inside, other=0.0)[None, :]
            shrink = tl.exp2(top - new)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
            total = total * shrink + tl.sum(p, 1)
            top = new
    out = acc / total[:, None]
    tl.store(
        O + (head.to(tl.int64) * queries + rows[:, None]) * D + d[None, :],
        out.to(O.dtype.element_ty), mask=live[:, None],
    )  # fmt: skip


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    num_keys: int,
    window: int,
    block: int = 1 << 30,
    entries: Entries | None = None,
) -> Tensor:
    """Attend, on CUDA by a kernel; elsewhere by `reference`, of the same arguments.

    Args:
        query: ``[H, n, D]``, at positions from `first`.
        key: ``[H_kv, rows, D]``, contiguous, of which `num_keys` count.
        value: of the shape of `key`.
        first: a multiple of `TILE` where there are entries.
        num_keys: keys in the cache.
        window: keys that a query sees up to itself.
        block: queries that share entries, by absolute position.
        entries: what they see beside their windows.
    """
    if query.device.type != "cuda":
        return reference(query, key, value, first, num_keys, window, block, entries)
    query = query.contiguous()
    heads, count, size = query.shape
    out = torch.empty_like(query)
    e, none = entries, query
    own = e is not None and e.keys is not None
    signed = e is not None and e.sign is not None
    _attend[(triton.cdiv(count, TILE), heads)](
        query, key, value, out,
        e.index if e else none, e.position if e else none, e.bias if e else none,
        e.count if e else none, e.sign if signed else none,
        e.keys if own else none, e.values if own else none,
        count, num_keys, first, block, window, size**-0.5 * _LOG2E, heads,
        e.position.shape[-1] if e else 0, key.shape[1],
        GROUP=heads // key.shape[0], D=size, BM=TILE, BN=64,
        HAS_ENTRIES=e is not None, SIGNED=signed, OWN=own, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    num_keys: int,
    window: int,
    block: int = 1 << 30,
    entries: Entries | None = None,
) -> Tensor:
    """Attend in float32, a block at a time; see `attend`."""
    heads, count, size = query.shape
    group = heads // key.shape[0]
    out = torch.empty_like(query)
    done = 0
    while done < count:
        at_block = (first + done) // block
        stop = min(count, (at_block + 1) * block - first, done + 2048)
        at = torch.arange(first + done, first + stop, device=query.device)[:, None]
        q = query[:, done:stop].float()
        low, high = max(0, first + done - window + 1), min(first + stop, num_keys)
        k = key[:, low:high].float().repeat_interleave(group, 0)
        v = value[:, low:high].float().repeat_interleave(group, 0)
        col = torch.arange(low, high, device=query.device)[None]
        logit = (q @ k.mT) * size**-0.5
        logit = logit.masked_fill((col > at) | (col <= at - window), float("-inf"))
        sign = torch.ones_like(logit[:, :1])
        if entries is not None:
            most = int(entries.count[at_block].max())
            position = entries.position[at_block, :, :most]
            if entries.keys is not None and entries.values is not None:
                ek = entries.keys[at_block, :, :most].float()
                ev = entries.values[at_block, :, :most].float()
            else:
                row = entries.index[at_block, :, :most].long()
                kv_head = torch.arange(heads, device=row.device)[:, None] // group
                ek, ev = key[kv_head, row].float(), value[kv_head, row].float()
            more = (q @ ek.mT) * size**-0.5 + entries.bias[at_block, :, None, :most]
            here = torch.arange(most, device=query.device) < entries.count[at_block, :, None]
            seen = here[:, None] & (position[:, None] <= at - window)
            logit = torch.cat((logit, more.masked_fill(~seen, float("-inf"))), -1)
            v = torch.cat((v, ev), 1)
            extra = torch.ones_like(more[:, :1])
            if entries.sign is not None:
                extra = entries.sign[at_block, :, None, :most].float()
            sign = torch.cat((sign, extra), -1)
        p = (logit - logit.amax(-1, keepdim=True)).exp() * sign
        out[:, done:stop] = (p @ v / p.sum(-1, keepdim=True)).to(out.dtype)
        done = stop
    return out
