"""The whole operator as one of PyTorch's, for compilers: ``token_sparse_attention::prefill``.

`token_sparse_attention` calls it where `torch.compile` traces it. Settings travel as one string
each, so that a new field of a config changes nothing here. Indices have capacity for every
slot, so that no shape depends on data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.config import config_from_json
from token_sparse_attention.execution import execution_of
from token_sparse_attention.inputs import AuxRequest, Chunk, PastProbes, unit_stride
from token_sparse_attention.prefill import prefill
from token_sparse_attention.results import SparseOutput, TokenSelection

_BETWEEN = " ## "
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def settings_text(execution: str, config: str) -> str:
    """Return `Execution.text` and `SparseConfig.text` as the string in which they travel.

    It is one line: a compiler writes it into its code as it stands.
    """
    return f"{execution}{_BETWEEN}{config}"


def aux_text(aux: AuxRequest, chunk: Chunk) -> str:
    """Return a request as the string in which it travels, with `Chunk.ends_prompt`."""
    return "".join("1" if wanted else "0" for wanted in (*aux, chunk.ends_prompt))


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    past_probes: list[Tensor],
    settings: str,
    scale: float,
    aux: str,
) -> _Outputs:
    """Run the operator; returns output, lse, indices, lengths, reasons and ran_sparse.

    What was not asked for is empty. See `settings_text` and `aux_text`.
    """
    *letters, ends_prompt = (letter == "1" for letter in aux)
    wanted = AuxRequest(*letters)
    execution, config = settings.split(_BETWEEN, 1)
    past = PastProbes(*past_probes) if past_probes else None
    output, selection, lse = prefill(
        (query, key, value),
        padding_mask,
        config_from_json(config),
        execution_of(execution),
        scale,
        wanted,
        Chunk(past, ends_prompt),
    )
    layout = torch.empty_like(unit_stride(query), device="meta")
    if output.stride() != layout.stride():  # as dense kernels choose; a compiler was told this
        output = torch.empty_like(layout, device=query.device).copy_(output)
    lse = _empty(query, torch.float32) if lse is None else lse
    if selection is None:
        none, no_reasons = _empty(query, torch.int64), _empty(query, torch.int32)
        return output, lse, none, none.clone(), no_reasons, _empty(query, torch.bool)
    room = key.shape[2] - selection.indices.shape[2] if wanted.indices else 0
    indices = F.pad(selection.indices, (0, room), value=-1)
    reasons = selection.reasons
    assert reasons is not None
    return output, lse, indices, selection.lengths, reasons, selection.ran_sparse


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype)


_operator = torch.library.custom_op("token_sparse_attention::prefill", _prefill, mutates_args=())


@_operator.register_fake
def _fake(query: Tensor, key: Tensor, *arguments: object) -> _Outputs:
    wants_selection, wants_indices, wants_lse, _ = (letter == "1" for letter in str(arguments[-1]))
    batch_size, num_heads, query_len = query.shape[:3]
    lse = query.new_empty(batch_size, num_heads, query_len, dtype=torch.float32)
    if not wants_lse:
        lse = _empty(query, torch.float32)
    if not wants_selection:
        indices, lengths = (_empty(query, torch.int64) for _ in range(2))
        reasons, ran_sparse = _empty(query, torch.int32), _empty(query, torch.bool)
    else:
        room = key.shape[2] if wants_indices else 0
        indices = query.new_empty(batch_size, num_heads, room, dtype=torch.int64)
        lengths = query.new_empty(batch_size, num_heads, dtype=torch.int64)
        reasons = query.new_empty(batch_size, dtype=torch.int32)
        ran_sparse = query.new_empty(batch_size, dtype=torch.bool)
    return torch.empty_like(unit_stride(query)), lse, indices, lengths, reasons, ran_sparse


def call_operator(
    tensors: tuple[Tensor, Tensor, Tensor],
    padding_mask: Tensor | None,
    config: str,
    execution: str,
    scale: float,
    aux: AuxRequest,
    chunk: Chunk,
) -> SparseOutput:
    """Make the call as one operator, which a compiler does not look into."""
    key = tensors[1]
    output, lse, indices, lengths, reasons, ran_sparse = torch.ops.token_sparse_attention.prefill(
        *tensors,
        padding_mask,
        [] if chunk.past_probes is None else [*chunk.past_probes],
        settings_text(execution, config),
        scale,
        aux_text(aux, chunk),
    )
    selection = TokenSelection(indices, lengths, ran_sparse, key.shape[2], reasons)
    return SparseOutput(output, selection if aux.selection else None, lse if aux.lse else None)
