"""The whole operator as one of PyTorch's, for compilers: ``token_sparse_attention::prefill``.

`token_sparse_attention` calls it where `torch.compile` traces it. Indices have capacity for
every slot, so that no shape depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.functional import Call, run
from token_sparse_attention.inputs import unit_stride

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    drop_mass: float | None,
    window_size: int,
    pool_size: int,
    min_tokens: int,
    budget: str,
    select_queries: bool,
    dense_queries: int,
    dense_heads: Sequence[int],
    fallback: str,
    fallback_window: int,
    fallback_sinks: int,
    fallback_landmarks: int,
    fallback_samples: int,
    crossover: str,
    scale: float,
    impl: str,
    attention_backend: str,
    head_chunk: int | None,
    kept: float | None,
    want_selection: bool,
    want_indices: bool,
    want_lse: bool,
) -> _Outputs:
    """Run the operator; returns output, lse, indices, lengths, budget and ran_sparse.

    What was not asked for is empty.
    """
    config = TokenSparseConfig(
        drop_mass,
        window_size,
        pool_size,
        min_tokens,
        budget,
        select_queries,
        dense_queries,
        tuple(dense_heads),
        fallback,
        fallback_window,
        fallback_sinks,
        fallback_landmarks,
        fallback_samples,
        crossover,
    )
    call = Call(
        scale, impl, attention_backend, head_chunk, kept, want_selection, want_indices, want_lse
    )
    output, selection, lse = run(query, key, value, padding_mask, config, call)
    layout = torch.empty_like(unit_stride(query), device="meta")
    if output.stride() != layout.stride():  # as dense kernels choose; a compiler was told this
        output = torch.empty_like(layout, device=query.device).copy_(output)
    lse = _empty(query, torch.float32) if lse is None else lse
    if selection is None:
        none = _empty(query, torch.int64)
        return output, lse, none, none.clone(), none.clone(), _empty(query, torch.bool)
    room = key.shape[2] - selection.indices.shape[2] if want_indices else 0
    indices = F.pad(selection.indices, (0, room), value=-1)
    lengths = selection.lengths
    chosen = lengths if selection.budget is None else selection.budget
    return output, lse, indices, lengths, chosen.clone(), selection.ran_sparse


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype)


prefill = torch.library.custom_op("token_sparse_attention::prefill", _prefill, mutates_args=())


@prefill.register_fake
def _fake(query: Tensor, key: Tensor, *arguments: object) -> _Outputs:
    want_selection, want_indices, want_lse = arguments[-3:]
    batch_size, num_heads, query_len = query.shape[:3]
    lse = query.new_empty(batch_size, num_heads, query_len, dtype=torch.float32)
    if not want_lse:
        lse = _empty(query, torch.float32)
    if not want_selection:
        indices, lengths, budget = (_empty(query, torch.int64) for _ in range(3))
        ran_sparse = _empty(query, torch.bool)
    else:
        room = key.shape[2] if want_indices else 0
        indices = query.new_empty(batch_size, num_heads, room, dtype=torch.int64)
        lengths, budget = (
            query.new_empty(batch_size, num_heads, dtype=torch.int64) for _ in range(2)
        )
        ran_sparse = query.new_empty(batch_size, dtype=torch.bool)
    return torch.empty_like(unit_stride(query)), lse, indices, lengths, budget, ran_sparse
