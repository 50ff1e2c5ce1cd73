"""Which tokens each head attends over: score, smooth, budget, select (Dynamic Token Coverage)."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention import reference
from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.crossover import NEVER_DENSE, BreakEven, effective_length
from token_sparse_attention.inputs import (
    RealTokens,
    Span,
    check_attention_inputs,
    check_config,
    check_kept,
    check_no_gradients,
    real_tokens,
    resolve_scale,
    single_precision,
    unit_stride,
)
from token_sparse_attention.tensor_parallel import gather_heads, own_heads, resolve_tp_group

if TYPE_CHECKING:
    from types import ModuleType

    from torch.distributed import ProcessGroup

IMPLS = ("auto", "reference", "triton")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_MAX_HEAD_DIM = 256


class TokenSelection(NamedTuple):
    """The tokens every head keeps.

    Attributes:
        indices: ``[B, H, K]`` integers, the kept slots in ascending order, -1 after a head's
            last one; K is any capacity that fits. A dense row lists all its real tokens.
        lengths: ``[B, H]`` integers, how many tokens each head keeps.
        ran_sparse: ``[B]`` bool, whether the row was sparsified at all.
        kv_len: slots that the indices count from 0; None means as many as there are queries.
        budget: ``[B, H]`` integers, tokens that the method would keep, where the crossover
            made a row run dense; None means `lengths`.
    """

    indices: Tensor
    lengths: Tensor
    ran_sparse: Tensor
    kv_len: int | None = None
    budget: Tensor | None = None

    def sparse_rows_only(self) -> TokenSelection:
        """Return the selection with the dense rows emptied."""
        dense = ~self.ran_sparse
        return self._replace(
            indices=self.indices.masked_fill(dense[:, None, None], -1),
            lengths=self.lengths.masked_fill(dense[:, None], 0),
        )

    def without_indices(self) -> TokenSelection:
        """Return how many tokens each head keeps, but not which; holds no memory of these."""
        return self._replace(indices=self.indices.new_empty(*self.lengths.shape, 0))

    def to_int64(self) -> TokenSelection:
        """Return the selection with 64-bit indices and lengths, which index tensors."""
        budget = self.lengths if self.budget is None else self.budget
        return self._replace(
            indices=self.indices.long(), lengths=self.lengths.long(), budget=budget.long()
        )


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is a known name."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def check_return_selection(return_selection: bool | str) -> None:
    """Raise ValueError unless it says whether to return a selection, or its lengths."""
    if not isinstance(return_selection, bool) and return_selection != "lengths":
        raise ValueError(
            f"return_selection must be True, False or 'lengths', got {return_selection!r}"
        )


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


def load_kernels(name: str) -> ModuleType:
    """Import a module of Triton kernels, which needs Triton: not installed everywhere."""
    return importlib.import_module(f"token_sparse_attention.kernels.{name}")


def score_tokens(
    query: Tensor,
    key: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Score every token before the window by the attention it gets from the window.

    The score of key j is the mean over the last W real queries i of
    ``softmax_j(scale * q_i . k_j)``, causal inside the window.

    Args:
        query: ``[B, H, S_q, D]``, any floating dtype, after position encoding; the queries
            occupy the slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv.
        config: gives W, the ``window_size``.
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, one run per row.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        impl: which code runs: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``[B, H, N]`` float32 with ``N = max(S_kv - W, 0)``, indexed by slot. Padding and the
        row's window hold 0; a row with fewer than W real queries has no scores: NaN.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or the mask do not fit.

    Source:
        arXiv 2602.03216, token scoring; `reference.window_scores` is the literal form.

    Example:
        >>> query, key = torch.randn(1, 4, 300, 32), torch.randn(1, 2, 300, 32)
        >>> score_tokens(query, key, TokenSparseConfig(window_size=128)).shape
        torch.Size([1, 4, 172])
    """
    check_config(config)
    check_attention_inputs(query, key, None)
    check_no_gradients(query=query, key=key)
    impl = resolve_impl(impl, query, query.shape[-1])
    scale = resolve_scale(scale, query.shape[-1])
    tokens = real_tokens(
        padding_mask, len(key), key.shape[2], key.device, on_device=impl == "triton"
    )
    return score_rows(query.detach(), key.detach(), config, tokens, scale, impl)


def score_rows(
    query: Tensor,
    key: Tensor,
    config: TokenSparseConfig,
    tokens: RealTokens,
    scale: float,
    impl: str,
) -> Tensor:
    """`score_tokens` on checked arguments."""
    window_size, kv_len = config.window_size, key.shape[2]
    if impl == "triton":
        kernels = load_kernels("scoring")
        query, key = unit_stride(query), unit_stride(key)
        scores: Tensor = kernels.score_tokens(
            query, key, tokens.bounds, window_size, scale, padded=tokens.padded
        )
        return scores
    batch_size, num_heads, query_len, _ = query.shape
    first_query = kv_len - query_len
    num_scored = max(kv_len - window_size, 0)
    scores = query.new_zeros(batch_size, num_heads, num_scored, dtype=torch.float32)
    for row, span in enumerate(tokens.host_spans()):
        row_queries = query[row, :, max(span.start - first_query, 0) : span.end - first_query]
        if span.end <= first_query or row_queries.shape[1] < window_size:
            scores[row] = torch.nan
        elif span.end - span.start > window_size:
            scores[row, :, span.start : span.end - window_size] = reference.window_scores(
                row_queries, key[row, :, span.start : span.end], window_size, scale
            )
    return scores


def select_tokens(
    scores: Tensor,
    config: TokenSparseConfig,
    *,
    padding_mask: Tensor | None = None,
    kept: float | None = None,
    impl: str = "auto",
    tp_group: ProcessGroup | None = None,
) -> TokenSelection:
    """Choose each head's tokens from the scores: smooth, budget, top-k, plus the window.

    Args:
        scores: ``[B, H, N]`` float32 from `score_tokens`.
        config: the config that the scores were made with; one that selects queries.
        padding_mask: the mask that the scores were made with. Without one, the sequence has
            ``N + window_size`` tokens.
        kept: keep this share of a row's real tokens, window included, in place of the
            budget; in ``(0, 1]``. For benchmarks and ablations: ``min_tokens`` and the rule
            for short contexts do not apply then.
        impl: which code runs: ``"auto"``, ``"triton"`` or ``"reference"``.
        tp_group: the ranks that hold the layer's other query heads, see
            `token_sparse_attention`; `scores` are of this rank's heads.

    Returns:
        The selection; its indices have capacity for all slots where Triton ran. Queries are
        not known here, so the crossover has no say. A row runs dense if it is no longer than
        ``min_tokens + window_size``, has no finite scores, if ``drop_mass`` is 0, or if no
        token fits under it.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes do not fit, `kept` is out of range, or `config` selects no queries.

    Source:
        arXiv 2602.03216, Dynamic Token Coverage; `reference.keep_tokens` is the literal form.

    Example:
        >>> config = TokenSparseConfig.published(window_size=4, min_tokens=2)
        >>> selection = select_tokens(torch.rand(1, 2, 12), config, kept=0.5)
        >>> selection.lengths
        tensor([[8, 8]])
    """
    check_config(config)
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        given = getattr(scores, "dtype", type(scores).__name__)
        raise TypeError(f"scores must be a float32 tensor, got {given}")
    if scores.dim() != 3:
        raise ValueError(f"scores must have shape [B, H, N], got {list(scores.shape)}")
    if not config.select_queries:
        raise ValueError("config must have select_queries=True or a drop_mass, got neither")
    check_kept(kept, config)
    kept = single_precision(kept)
    tp_group = resolve_tp_group(tp_group)
    impl = resolve_impl(impl, scores)
    batch_size, _, num_scored = scores.shape
    kv_len = num_scored + config.window_size
    if padding_mask is not None and isinstance(padding_mask, Tensor) and padding_mask.dim() == 2:
        kv_len = padding_mask.shape[1]
        if num_scored != max(kv_len - config.window_size, 0):
            raise ValueError(
                f"scores must have N = {max(kv_len - config.window_size, 0)} entries for a "
                f"padding_mask of {kv_len} slots and window_size {config.window_size}, "
                f"got {num_scored}"
            )
    tokens = real_tokens(
        padding_mask, batch_size, kv_len, scores.device, on_device=impl == "triton"
    )
    selection = select_rows(scores, config, tokens, impl, kept=kept, tp_group=tp_group)
    return selection.to_int64()


def select_rows(
    scores: Tensor,
    config: TokenSparseConfig,
    tokens: RealTokens,
    impl: str,
    *,
    query_len: int | None = None,
    kept: float | None = None,
    even: BreakEven = NEVER_DENSE,
    tp_group: ProcessGroup | None = None,
) -> TokenSelection:
    """`select_tokens` on checked arguments; `query_len` and `even` say where dense is faster."""
    num_heads, kv_len = scores.shape[1], tokens.kv_len
    if scores.shape[2] == 0:
        return dense_selection(tokens, num_heads)
    first_query = kv_len - (kv_len if query_len is None else query_len)
    if kept is not None:
        even = NEVER_DENSE
    if impl == "triton":
        kernels = load_kernels("selection")
        rule = kernels.Rule(
            config.drop_mass or 0.0,
            config.window_size,
            config.pool_size,
            config.min_tokens,
            config.budget == "per_head",
            kept,
            even.max_work,
            even.fixed_tokens,
            even.min_length,
        )
        selected = kernels.select_tokens(
            scores.contiguous(), tokens.bounds, kv_len, first_query, rule, tp_group
        )
        return TokenSelection(
            selected.indices, selected.lengths, selected.ran_sparse, kv_len, selected.budget
        )
    if tp_group is not None:
        scores = gather_heads(scores, tp_group)  # decides for all heads, as one process would
    rows, budgets = [], []
    spans = tokens.host_spans()
    for row, span in enumerate(spans):
        row_scores = scores[row, :, span.start : max(span.end - config.window_size, span.start)]
        row_len = span.end - span.start
        keep = _keep_row(row_scores, config, row_len, kept)
        lengths = scores.new_full((scores.shape[1],), row_len) if keep is None else keep.sum(-1)
        budgets.append(lengths.long())
        row_queries = span.end - max(span.start, first_query)
        if keep is not None and _is_slower(lengths.double() / row_len, row_queries, row_len, even):
            keep = None
        rows.append(keep)
    selection = selection_of_rows(rows, spans, scores.shape[1], kv_len, scores.device)
    selection = selection._replace(budget=torch.stack(budgets))
    return selection if tp_group is None else _own_part(selection, num_heads, tp_group)


def _own_part(selection: TokenSelection, num_heads: int, tp_group: ProcessGroup) -> TokenSelection:
    """Return what a selection of all ranks' heads says about this rank's."""
    budget = selection.lengths if selection.budget is None else selection.budget
    return selection._replace(
        indices=own_heads(selection.indices, num_heads, tp_group),
        lengths=own_heads(selection.lengths, num_heads, tp_group),
        budget=own_heads(budget, num_heads, tp_group),
    )


def _is_slower(shares: Tensor, query_len: int, kv_len: int, even: BreakEven) -> bool:
    """Return whether heads that keep these shares of a row would attend slower than dense."""
    length = effective_length(query_len, kv_len)
    limit = even.max_work - even.fixed_tokens / length
    return length < even.min_length or float(shares.square().mean()) > limit


def dense_selection(
    tokens: RealTokens, num_heads: int, *, want_indices: bool = True
) -> TokenSelection:
    """Return the selection of a batch in which every row runs dense."""
    start, end = tokens.bounds.long().unbind(-1)
    slot = torch.arange(tokens.kv_len if want_indices else 0, device=start.device)
    listed = torch.where(slot < (end - start)[:, None], slot + start[:, None], -1)
    lengths = (end - start)[:, None].expand(-1, num_heads).contiguous()
    return TokenSelection(
        indices=listed[:, None].expand(-1, num_heads, -1).contiguous(),
        lengths=lengths,
        ran_sparse=torch.zeros(len(start), dtype=torch.bool, device=start.device),
        kv_len=tokens.kv_len,
        budget=lengths,
    )


def _keep_row(
    scores: Tensor, config: TokenSparseConfig, kv_len: int, kept: float | None
) -> Tensor | None:
    if scores.shape[1] == 0:
        return None
    if kept is None:
        return reference.keep_tokens(scores, config)
    if not scores.isfinite().all():
        return None
    count = min(max(int(kept * kv_len + 0.5) - config.window_size, 0), scores.shape[1])
    counts = torch.full((scores.shape[0],), count, device=scores.device)
    return reference.top_tokens(
        reference.smooth(scores, config.pool_size), counts, config.window_size
    )


def selection_of_rows(
    rows: list[Tensor | None],
    spans: list[Span],
    num_heads: int,
    kv_len: int,
    device: torch.device,
) -> TokenSelection:
    """Turn each row's mask of kept real tokens, None for a dense row, into a selection."""
    keep = torch.zeros(len(spans), num_heads, kv_len, dtype=torch.bool, device=device)
    for row, (row_keep, span) in enumerate(zip(rows, spans)):
        keep[row, :, span.start : span.end] = True if row_keep is None else row_keep
    lengths = keep.sum(-1)
    slot = torch.arange(kv_len, device=device)
    capacity = int(lengths.max())
    indices = torch.where(keep, slot, kv_len).sort(-1).values[..., :capacity]
    return TokenSelection(
        indices=indices.masked_fill(indices == kv_len, -1),
        lengths=lengths,
        ran_sparse=torch.tensor([row_keep is not None for row_keep in rows], device=device),
        kv_len=kv_len,
    )
