"""From masses to lists of blocks: fewest entries that cover a share, diagonals, compaction.

Nothing is sorted. Non-negative floats are ordered as their bits are, so the lightest entry that
a cover needs is found bit by bit: is the mass of all entries from here on still enough?
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_sparse_attention.device import on_its_device

_ROW = 8192  # the longest row that one program holds in registers
_CHUNK = 4096  # entries of a longer row that one program looks at
_LEVEL_BITS = (27, 23, 19, 15, 11, 7, 3, 0)  # lowest bit of each level's digit


@on_its_device
def smallest_cover(mass: Tensor, share: Tensor | None, minimum: int) -> Tensor:
    """Mark the fewest entries of the last dimension that hold a share of its mass.

    Args:
        mass: ``[..., N]`` float32, not negative.
        share: ``[G]`` float32, of G runs of equally many rows; None for 0.
        minimum: entries to mark at least.

    Returns:
        ``[..., N]`` bool; among equal entries the first are marked.
    """
    mass = mass.contiguous()
    length = mass.shape[-1]
    marked = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    rows = mass.numel() // length
    if length > _ROW:
        share = mass.new_zeros(1) if share is None else share
        _cover_long(mass.view(rows, length), share, minimum, marked.view(rows, length))
        return marked
    block = triton.next_power_of_2(length)
    cover_row_kernel[(rows,)](
        mass, share, marked.view(torch.uint8), length,
        rows if share is None else rows // share.numel(), min(minimum, length),
        BLOCK=block, BITS=31, SHARED=share is not None, num_warps=max(min(block // 256, 8), 1),
    )  # fmt: skip
    return marked


def _cover_long(mass: Tensor, share: Tensor, minimum: int, marked: Tensor) -> None:
    """Fill ``marked [R, N]`` for rows longer than one program holds, a digit at a time."""
    rows, length = mass.shape
    chunks = triton.cdiv(length, _CHUNK)
    share = share.repeat_interleave(rows // share.numel())
    grid = (rows, chunks)  # rows first: there can be more than a grid takes in its second place
    by_chunk = mass.new_zeros(2, rows, chunks, 16)
    floors = torch.zeros(2, rows, dtype=torch.int32, device=mass.device)
    wanted = torch.zeros(2, rows, device=mass.device)
    wanted[1] = min(minimum, length)
    digits = torch.arange(16, device=mass.device)
    for level, low in enumerate(_LEVEL_BITS):
        digit_sum_kernel[grid](
            mass, floors, by_chunk, length, rows, low,
            DIGITS=16, MINIMUM=minimum > 0, BLOCK=_CHUNK,
        )  # fmt: skip
        held = by_chunk.sum(2)  # [2, R, 16]: mass and number from each digit on
        if level == 0:
            wanted[0] = share * held[0, :, 0]
        digit = ((held >= wanted[..., None]) * digits).amax(-1)
        floors += (digit << low).int()
    edge_kernel[grid](mass, floors, by_chunk, length, rows, BLOCK=_CHUNK)
    above, equal = by_chunk[..., 0], by_chunk[..., 1]
    lightest = floors.view(torch.float32)
    missing = wanted - above.sum(-1)
    # How many of the entries equal to the lightest are needed: by mass, and by number.
    missing[0] = (missing[0] / lightest[0]).ceil().clamp(min=1)
    earlier = equal.cumsum(-1) - equal
    covers = torch.stack([share >= 1, wanted[0] > 0, wanted[0].isnan()]).to(torch.uint8)
    mark_kernel[grid](
        mass, floors, missing, earlier, covers, marked.view(torch.uint8), length, rows,
        MINIMUM=minimum > 0, BLOCK=_CHUNK,
    )  # fmt: skip


@on_its_device
def blocks_at_distances(
    before: Tensor, offset: int, query_len: int, block_size: tuple[int, int]
) -> Tensor:
    """Mark the blocks that hold a pair of query and key at a chosen distance.

    Args:
        before: ``[B, H, S_kv + 1]`` int32, how many distances below each are chosen.
        offset: position of the first query.
        query_len: queries.
        block_size: queries and keys per block.

    Returns:
        ``[B, H, Q, K]`` bool.
    """
    batch_size, num_heads, kv_len = before.shape[0], before.shape[1], before.shape[2] - 1
    before = before.contiguous()
    query_blocks = triton.cdiv(query_len, block_size[0])
    kv_blocks = triton.cdiv(kv_len, block_size[1])
    shape = batch_size, num_heads, query_blocks, kv_blocks
    marked = torch.empty(shape, dtype=torch.bool, device=before.device)
    distance_block_kernel[(query_blocks, batch_size * num_heads)](
        before, marked.view(torch.uint8), offset, kv_len, kv_blocks,
        QUERY_BLOCK=block_size[0], KV_BLOCK=block_size[1],
        BLOCK=min(triton.next_power_of_2(kv_blocks), 1024),
    )  # fmt: skip
    return marked


@on_its_device
def pack_blocks(
    kept: Tensor, offset: int, block_size: tuple[int, int], index: Tensor, count: Tensor
) -> None:
    """List each row's kept blocks of keys that end before the row's first query.

    Args:
        kept: ``[B, H, Q, K]`` bool, unit stride over K.
        offset: position of the first query.
        block_size: queries and keys per block.
        index: ``[B, H, Q, W]`` int32, filled as far as the rows have blocks and W allows.
        count: ``[B, H, Q]`` int32, filled.
    """
    batch_size, num_heads, query_blocks, kv_blocks = kept.shape
    pack_row_kernel[(query_blocks, batch_size * num_heads)](
        kept.view(torch.uint8), index, count, *kept.stride()[:3], num_heads, offset, kv_blocks,
        index.shape[-1], QUERY_BLOCK=block_size[0], KV_BLOCK=block_size[1],
        BLOCK=min(triton.next_power_of_2(kv_blocks), 1024),
    )  # fmt: skip


@triton.jit
def _load_masses(mass_ptr, row, first, length, BLOCK: tl.constexpr):
    """A row's entries from `first` on: numbers, which exist, masses, and bits (-1 beyond)."""
    o_n = first + tl.arange(0, BLOCK)
    exists = o_n < length
    b_mass = tl.load(mass_ptr + row.to(tl.int64) * length + o_n, mask=exists, other=0.0)
    return o_n, exists, b_mass, tl.where(exists, b_mass.to(tl.int32, bitcast=True), -1)


@triton.jit
def _lightest_bits(b_bits, b_weight, wanted, BITS: tl.constexpr):
    """The most bits, as a number, from which on the entries weigh at least as much as wanted."""
    lightest = 0
    for step in range(BITS):
        bit = 1 << (BITS - 1 - step)
        b_from = b_bits >= (lightest + bit)
        lightest += tl.where(tl.sum(tl.where(b_from, b_weight, 0), 0) >= wanted, bit, 0)
    return lightest


@triton.jit(do_not_specialize=["length", "rows_per_share", "minimum"])
def cover_row_kernel(
    mass_ptr, share_ptr, marked_ptr, length, rows_per_share, minimum,
    BLOCK: tl.constexpr, BITS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The cover of one row that fits into registers; without `SHARED`, of a share of 0."""
    row = tl.program_id(0)
    o_n, exists, b_mass, b_bits = _load_masses(mass_ptr, row, 0, length, BLOCK)
    total = tl.sum(b_mass, 0)
    b_nothing = tl.zeros([BLOCK], tl.float32)
    b_marked = b_nothing > 0
    if SHARED:
        share = tl.load(share_ptr + row // rows_per_share)
        wanted = share * total
        lightest = _lightest_bits(b_bits, b_mass, wanted, BITS)  # of the cover
        b_above = b_bits > lightest
        b_equal = b_bits == lightest
        value = tl.max(tl.where(b_equal, b_mass, 0.0), 0)
        missing = (wanted - tl.sum(tl.where(b_above, b_mass, 0.0), 0)) / tl.maximum(value, 1e-45)
        needed = tl.maximum(tl.ceil(missing), 1.0)
        b_marked = b_above | (b_equal & (tl.cumsum(b_equal.to(tl.float32), 0) <= needed))
        b_marked = (b_marked & (b_nothing + wanted > 0)) | (b_nothing + share >= 1)
    if minimum > 0:
        b_one = tl.full([BLOCK], 1, tl.int32)
        lightest = _lightest_bits(b_bits, b_one, minimum, BITS)  # of the heaviest `minimum`
        b_above = b_bits > lightest
        b_equal = b_bits == lightest
        needed_count = minimum - tl.sum(b_above.to(tl.int32), 0)
        b_marked = b_marked | b_above
        b_marked = b_marked | (b_equal & (tl.cumsum(b_equal.to(tl.int32), 0) <= needed_count))
    b_marked = b_marked | (b_nothing + total != b_nothing + total)
    p_marked = marked_ptr + row.to(tl.int64) * length + o_n
    tl.store(p_marked, b_marked.to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=["length", "rows", "low"])
def digit_sum_kernel(
    mass_ptr, floors_ptr, by_chunk_ptr, length, rows, low,
    DIGITS: tl.constexpr, MINIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mass and number of a chunk's entries from each value of the next digit on."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    _, _, b_mass, b_bits = _load_masses(mass_ptr, row, chunk * BLOCK, length, BLOCK)
    p_mass = by_chunk_ptr + (row * tl.num_programs(1) + chunk) * DIGITS
    p_number = p_mass + rows * tl.num_programs(1) * DIGITS
    by_mass = tl.load(floors_ptr + row)
    by_number = tl.load(floors_ptr + rows + row)
    for digit in tl.static_range(DIGITS):
        b_from = b_bits >= by_mass + (digit << low)
        tl.store(p_mass + digit, tl.sum(tl.where(b_from, b_mass, 0.0), 0))
        if MINIMUM:
            b_from = b_bits >= by_number + (digit << low)
            tl.store(p_number + digit, tl.sum(b_from.to(tl.float32), 0))


@triton.jit(do_not_specialize=["length", "rows"])
def edge_kernel(mass_ptr, floors_ptr, by_chunk_ptr, length, rows, BLOCK: tl.constexpr):
    """Of a chunk: mass above the lightest, number equal to it; number above, number equal."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    _, _, b_mass, b_bits = _load_masses(mass_ptr, row, chunk * BLOCK, length, BLOCK)
    by_mass = tl.load(floors_ptr + row)
    by_number = tl.load(floors_ptr + rows + row)
    p_mass = by_chunk_ptr + (row * tl.num_programs(1) + chunk) * 16
    p_number = p_mass + rows * tl.num_programs(1) * 16
    tl.store(p_mass, tl.sum(tl.where(b_bits > by_mass, b_mass, 0.0), 0))
    tl.store(p_mass + 1, tl.sum((b_bits == by_mass).to(tl.float32), 0))
    tl.store(p_number, tl.sum((b_bits > by_number).to(tl.float32), 0))
    tl.store(p_number + 1, tl.sum((b_bits == by_number).to(tl.float32), 0))


@triton.jit
def _mark_heaviest(floors_ptr, missing_ptr, earlier_ptr, b_bits, row, chunk):
    """Mark a chunk's entries above a row's lightest, and as many equal to it as are missing."""
    lightest = tl.load(floors_ptr + row)
    b_equal = b_bits == lightest
    b_rank = tl.cumsum(b_equal.to(tl.float32), 0)
    b_rank += tl.load(earlier_ptr + row * tl.num_programs(1) + chunk)
    return (b_bits > lightest) | (b_equal & (b_rank <= tl.load(missing_ptr + row)))


@triton.jit(do_not_specialize=["length", "rows"])
def mark_kernel(
    mass_ptr, floors_ptr, missing_ptr, earlier_ptr, covers_ptr, marked_ptr, length, rows,
    MINIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mark a chunk's entries of the cover, and of the heaviest `minimum`."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    o_n, exists, _, b_bits = _load_masses(mass_ptr, row, chunk * BLOCK, length, BLOCK)
    everything = tl.load(covers_ptr + row) + tl.load(covers_ptr + 2 * rows + row) > 0
    b_marked = _mark_heaviest(floors_ptr, missing_ptr, earlier_ptr, b_bits, row, chunk)
    b_marked = (b_marked & (tl.load(covers_ptr + rows + row) > 0)) | everything
    if MINIMUM:
        b_marked = b_marked | _mark_heaviest(
            floors_ptr, missing_ptr, earlier_ptr, b_bits, rows + row, chunk
        )  # fmt: skip
    p_marked = marked_ptr + row.to(tl.int64) * length + o_n
    tl.store(p_marked, b_marked.to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=["offset", "kv_len", "kv_blocks"])
def distance_block_kernel(
    before_ptr, marked_ptr, offset, kv_len, kv_blocks,
    QUERY_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which blocks of keys one block of queries reaches by a chosen distance."""
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * QUERY_BLOCK + offset
    last = tl.minimum(begin + QUERY_BLOCK, kv_len) - 1
    p_before = before_ptr + head * (kv_len + 1)
    p_marked = marked_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * kv_blocks
    for first in range(0, kv_blocks, BLOCK):
        o_k = first + tl.arange(0, BLOCK)
        exists = o_k < kv_blocks
        nearest = tl.maximum(begin - (o_k * KV_BLOCK + KV_BLOCK - 1), 0)
        beyond = tl.maximum(last - o_k * KV_BLOCK + 1, 0)
        b_nearest = tl.load(p_before + nearest, mask=exists, other=0)
        b_beyond = tl.load(p_before + beyond, mask=exists, other=0)
        tl.store(p_marked + o_k, (b_beyond > b_nearest).to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=[
    "stride_b", "stride_h", "stride_q", "offset", "kv_blocks", "width"
])  # fmt: skip
def pack_row_kernel(
    kept_ptr, index_ptr, count_ptr, stride_b: tl.int64, stride_h: tl.int64, stride_q: tl.int64,
    num_heads, offset, kv_blocks, width,
    QUERY_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List one row's kept blocks."""
    block = tl.program_id(0)
    b, head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    p_kept = kept_ptr + b * stride_b + head * stride_h + block * stride_q
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block
    earlier = tl.minimum((block * QUERY_BLOCK + offset) // KV_BLOCK, kv_blocks)
    listed = 0
    for first in range(0, earlier, BLOCK):
        o_k = first + tl.arange(0, BLOCK)
        b_kept = (tl.load(p_kept + o_k, mask=o_k < earlier, other=0) > 0).to(tl.int32)
        o_list = listed + tl.cumsum(b_kept, 0) - 1
        tl.store(index_ptr + row * width + o_list, o_k, mask=(b_kept > 0) & (o_list < width))
        listed += tl.sum(b_kept, 0)
    tl.store(count_ptr + row, listed)
