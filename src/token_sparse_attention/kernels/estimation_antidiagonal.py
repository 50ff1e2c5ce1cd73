"""XAttention's estimate in one product: antidiagonal sums, their softmax, sums by block.

The product of strided rows is computed once and reduced to a log-sum-exp per row and block of
keys, a sixteenth of the logits at a stride of 8. A second kernel computes each row's softmax
over these and averages the rows of a block. Tensor memory accelerator descriptors read strided
rows in place: `stride` tokens of a head are columns of one matrix row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from token_sparse_attention.device import on_its_device
from token_sparse_attention.kernels.softmax import LOG2_E, finite_maximum, update_statistics

_KEPT_ELEMENTS = 2**27  # log-sum-exps held at once: half a GiB
_BAND = 8  # rows of tiles that run side by side, to share keys in the cache


class Tiles(NamedTuple):
    """Block sizes and launch options of the product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _pick_tiles(dtype: torch.dtype, head_dim: int, per_block: int) -> Tiles:
    block_k = min(64, head_dim & -head_dim)
    if dtype == torch.float32:  # exact products do not use tensor cores
        return Tiles(32, max(32, per_block), min(block_k, 32), 4, 2)
    return Tiles(128, max(128, per_block), block_k, 4, 3)


def can_run(query: Tensor, stride: int, block_size: tuple[int, int]) -> bool:
    """Return whether `antidiagonal_scores` takes this head size and these blocks."""
    per_row, per_column = (size // stride for size in block_size)
    powers = all(size & (size - 1) == 0 for size in (per_row, per_column))
    return query.shape[3] % 16 == 0 and powers and max(per_row, per_column) <= 128


@on_its_device
def antidiagonal_scores(
    query: Tensor, key: Tensor, stride: int, block_size: tuple[int, int], scale: float, *,
    tiles: Tiles | None = None, kept_elements: int = _KEPT_ELEMENTS,
) -> Tensor:  # fmt: skip
    """Estimate each block's share of attention, ``[B, H, Q, K]`` float32.

    Args:
        query: ``[B, H, S_q, D]``; see `can_run`.
        key: ``[B, H_kv, S_kv, D]``.
        stride: of the antidiagonals; it divides the block size.
        block_size: queries and keys per block.
        scale: factor of the logits.
        tiles: options of the product, for tuning.
        kept_elements: log-sum-exps to hold at once, as far as a band of tiles allows.
    """
    num_heads, query_len = query.shape[1:3]
    num_problems = len(query) * num_heads
    kv_len, offset = key.shape[2], key.shape[2] - query_len
    kv_blocks = triton.cdiv(kv_len, block_size[1])
    per_row, per_column = block_size[0] // stride, block_size[1] // stride
    tiles = tiles or _pick_tiles(query.dtype, query.shape[3], per_column)
    left, right = _strided(query, stride), _strided(key, stride)
    num_rows = triton.cdiv(query_len, stride)
    scores = torch.empty(
        len(query), num_heads, triton.cdiv(query_len, block_size[0]), kv_blocks,
        dtype=torch.float32, device=query.device,
    )  # fmt: skip
    band_rows = max(_BAND * tiles.block_m, per_row)
    at_once = max(kept_elements // kv_blocks // band_rows, 1) * band_rows
    row_step = min(at_once, triton.cdiv(num_rows, band_rows) * band_rows)
    head_step = min(max(at_once // row_step, 1), num_problems)
    kept = scores.new_empty(head_step, row_step, kv_blocks)
    for head in range(0, num_problems, head_step):
        heads = range(num_problems)[head : head + head_step]
        for row in range(0, num_rows, row_step):
            rows = range(num_rows)[row : row + row_step]
            # Tiles of keys that the rows before this portion's first already see.
            earlier = triton.cdiv(offset + row * stride, tiles.block_n * stride)
            band_columns = max(_BAND * tiles.block_m // tiles.block_n, 1)
            bands = triton.cdiv(triton.cdiv(len(rows), tiles.block_m), _BAND)
            programs = _BAND * (band_columns * bands * (bands + 1) // 2 + bands * earlier)
            strided_product_kernel[(programs, len(heads))](
                left.descriptor(tiles.block_m, tiles.block_k),
                right.descriptor(tiles.block_n, tiles.block_k),
                kept, scale / stride * LOG2_E.value, head, row, len(rows),
                triton.cdiv(kv_len, stride), offset, earlier,
                num_heads, num_heads // key.shape[1], row_step, kv_blocks,
                *left.places(), *right.places(),
                STRIDE=stride, HEAD_DIM=left.head_dim, PER_COLUMN=per_column,
                BAND=_BAND, BAND_COLUMNS=band_columns,
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
                PRECISION="ieee" if query.is_cuda and query.dtype == torch.float32 else "tf32",
                UPCAST=not query.is_cuda,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
            mean_share_kernel[(triton.cdiv(len(rows), per_row), len(heads))](
                kept, scores, head, row, len(rows), offset, row_step, kv_blocks, scores.shape[2],
                STRIDE=stride, PER_ROW=per_row, KV_BLOCK=block_size[1],
                BLOCK_K=min(triton.next_power_of_2(kv_blocks), 4096 // per_row), num_warps=4,
            )  # fmt: skip
    return scores


class _Strided(NamedTuple):
    """A tensor as a matrix whose rows each hold `stride` tokens.

    Token i of strided row r of a head begins in row ``b * per_batch + h * per_head + r`` and
    column ``h * head_columns + i * token_columns``.
    """

    matrix: Tensor
    head_dim: int
    per_batch: int
    per_head: int
    head_columns: int
    token_columns: int

    def descriptor(self, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(self.matrix, [rows, columns])

    def places(self) -> tuple[int, ...]:
        return self[2:]


def _strided(tokens: Tensor, stride: int) -> _Strided:
    """View tokens as strided rows; copy them where the last row is short or memory is odd."""
    batch_size, num_heads, length, head_dim = tokens.shape
    padding = -length % stride
    aligned = tokens.data_ptr() % 16 == 0 and tokens.stride(3) == 1
    aligned &= all(step * tokens.element_size() % 16 == 0 for step in tokens.stride()[:3])
    for copied in (False, True):
        if copied:
            tokens = F.pad(tokens, (0, 0, 0, padding)).contiguous()
        elif padding or not aligned:
            continue
        step_b, step_h, step_s = tokens.stride()[:3]
        row = stride * step_s
        rows = tokens.shape[2] // stride
        if batch_size > 1 and (step_b % row or step_b < row):
            continue
        per_batch = step_b // row if batch_size > 1 else 0
        if step_h * num_heads <= step_s:  # heads lie within a token
            width = (stride - 1) * step_s + (num_heads - 1) * step_h + head_dim
            height = (batch_size - 1) * per_batch + rows
            matrix = tokens.as_strided((height, width), (row, 1))
            return _Strided(matrix, head_dim, per_batch, 0, step_h, step_s)
        if num_heads == 1 or (step_h % row == 0 and step_h >= row):
            per_head = step_h // row if num_heads > 1 else 0
            height = (batch_size - 1) * per_batch + (num_heads - 1) * per_head + rows
            matrix = tokens.as_strided((height, (stride - 1) * step_s + head_dim), (row, 1))
            return _Strided(matrix, head_dim, per_batch, per_head, 0, step_s)
    raise RuntimeError("a contiguous copy must have strided rows")


@triton.jit(
    do_not_specialize=[
        "head_begin", "row_begin", "count", "columns", "offset", "earlier", "kept_rows",
        "kv_blocks", "left_per_batch", "left_per_head", "right_per_batch", "right_per_head",
    ]
)  # fmt: skip
def strided_product_kernel(
    left, right, kept_ptr, scale_log2, head_begin, row_begin, count, columns, offset, earlier,
    num_heads, group, kept_rows, kv_blocks,
    left_per_batch, left_per_head, left_head_columns, left_token_columns,
    right_per_batch, right_per_head, right_head_columns, right_token_columns,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PER_COLUMN: tl.constexpr,
    BAND: tl.constexpr, BAND_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, base 2, of one tile's antidiagonal sums, by row and block of keys.

    Tiles are numbered band by band, each band wider than the one before, and down the columns
    within a band; tiles above the diagonal have no number except in a band's last columns.
    """
    # Tiles before band g: BAND * (BAND_COLUMNS * g * (g + 1) / 2 + earlier * g).
    column = tl.program_id(0) // BAND
    half = BAND_COLUMNS * 0.5
    linear = half + earlier
    root = tl.sqrt(linear * linear + 4 * half * column.to(tl.float32))
    band = ((root - linear) / (2 * half)).to(tl.int32)
    band += tl.where(_tiles_before(band + 1, earlier, BAND_COLUMNS) <= column, 1, 0)
    band -= tl.where(_tiles_before(band, earlier, BAND_COLUMNS) > column, 1, 0)
    o_m = (band * BAND + tl.program_id(0) % BAND) * BLOCK_M
    o_n = (column - _tiles_before(band, earlier, BAND_COLUMNS)) * BLOCK_N
    last_position = (row_begin + o_m + BLOCK_M) * STRIDE - 1 + offset
    if (o_m < count) & (o_n < columns) & (o_n * STRIDE <= last_position):
        b = (head_begin + tl.program_id(1)) // num_heads
        head = (head_begin + tl.program_id(1)) % num_heads
        kv_head = head // group
        left_row = b * left_per_batch + head * left_per_head + row_begin + o_m
        right_row = b * right_per_batch + kv_head * right_per_head + o_n
        STEPS: tl.constexpr = HEAD_DIM // BLOCK_K
        b_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(STRIDE * STEPS):
            i = step // STEPS
            d = (step % STEPS) * BLOCK_K
            left_column = head * left_head_columns + (STRIDE - 1 - i) * left_token_columns + d
            b_left = left.load([left_row, left_column])
            right_column = kv_head * right_head_columns + i * right_token_columns + d
            b_right = right.load([right_row, right_column])
            if UPCAST:
                b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
            b_sums = tl.dot(b_left, tl.trans(b_right), b_sums, input_precision=PRECISION)
        o_row = o_m + tl.arange(0, BLOCK_M)
        o_column = o_n + tl.arange(0, BLOCK_N)
        position = (row_begin + o_row + 1) * STRIDE - 1 + offset
        seen = (o_column * STRIDE)[None, :] <= position[:, None]
        seen = seen & (o_column < columns)[None, :]
        b_logits = tl.where(seen, b_sums * scale_log2, float("-inf"))
        b_safe = finite_maximum(tl.max(b_logits, 1))
        b_exp = tl.exp2(b_logits - b_safe[:, None])
        b_sum = tl.sum(tl.reshape(b_exp, [BLOCK_M, BLOCK_N // PER_COLUMN, PER_COLUMN]), 2)
        # A block so far below the tile's highest logit that its sum is 0 has no share either.
        b_lse = tl.where(b_sum > 0, b_safe[:, None] + tl.log2(b_sum), float("-inf"))
        o_block = o_n // PER_COLUMN + tl.arange(0, BLOCK_N // PER_COLUMN)
        o_kept = tl.program_id(1).to(tl.int64) * kept_rows + o_row
        p_kept = kept_ptr + o_kept[:, None] * kv_blocks + o_block[None, :]
        tl.store(p_kept, b_lse, mask=(o_row < count)[:, None] & (o_block < kv_blocks)[None, :])


@triton.jit
def _tiles_before(band, earlier, BAND_COLUMNS: tl.constexpr):
    """How many tiles each row of tiles has in the bands before this one."""
    return BAND_COLUMNS * (band * (band + 1) // 2) + earlier * band


@triton.jit(
    do_not_specialize=[
        "head_begin", "row_begin", "count", "offset", "kept_rows", "kv_blocks", "query_blocks"
    ]
)  # fmt: skip
def mean_share_kernel(
    kept_ptr, scores_ptr, head_begin, row_begin, count, offset, kept_rows, kv_blocks,
    query_blocks,
    STRIDE: tl.constexpr, PER_ROW: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean over one block's rows of each block of keys' share in the row's softmax."""
    o_row = tl.program_id(0) * PER_ROW + tl.arange(0, PER_ROW)
    exists = o_row < count
    position = (row_begin + o_row + 1) * STRIDE - 1 + offset
    o_k = tl.arange(0, BLOCK_K)
    p_kept = kept_ptr + (tl.program_id(1).to(tl.int64) * kept_rows + o_row)[:, None] * kv_blocks
    last = tl.max(tl.where(exists, position, 0), 0)
    visible = tl.minimum(last // KV_BLOCK + 1, kv_blocks)
    b_max = tl.full([PER_ROW], float("-inf"), tl.float32)
    b_sum = tl.zeros([PER_ROW], tl.float32)
    for first in range(0, visible, BLOCK_K):
        o_block = first + o_k
        seen = exists[:, None] & ((o_block * KV_BLOCK)[None, :] <= position[:, None])
        seen = seen & (o_block < kv_blocks)[None, :]
        b_lse = tl.load(p_kept + o_block[None, :], mask=seen, other=float("-inf"))
        b_max, b_sum = update_statistics(b_lse, b_max, b_sum)
    b_norm = tl.where(exists, b_max + tl.log2(b_sum), float("inf"))
    rows = tl.minimum(count - tl.program_id(0) * PER_ROW, PER_ROW)
    block_row = (head_begin + tl.program_id(1)).to(tl.int64) * query_blocks
    block_row += row_begin // PER_ROW + tl.program_id(0)
    for first in range(0, kv_blocks, BLOCK_K):
        o_block = first + o_k
        seen = exists[:, None] & ((o_block * KV_BLOCK)[None, :] <= position[:, None])
        seen = seen & (o_block < kv_blocks)[None, :]
        b_lse = tl.load(p_kept + o_block[None, :], mask=seen, other=float("-inf"))
        b_share = tl.sum(tl.exp2(b_lse - b_norm[:, None]), 0) / rows
        tl.store(scores_ptr + block_row * kv_blocks + o_block, b_share, mask=o_block < kv_blocks)
