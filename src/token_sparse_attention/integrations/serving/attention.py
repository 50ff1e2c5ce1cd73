"""One request's attention in a layer of a serving engine: the operator, probes and counts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.inputs import AuxRequest, Chunk
from token_sparse_attention.integrations.serving.counters import COUNTERS
from token_sparse_attention.integrations.serving.probes import RequestProbes

_LENGTHS = AuxRequest(selection=True, indices=False)


class LayerAttention(NamedTuple):
    """How a sparse layer attends.

    Attributes:
        config: its settings.
        scale: factor of the logits.
        execution: how the operator runs, on the ranks that hold the layer's other heads.
        counts: whether this process counts.
    """

    config: SparseConfig
    scale: float
    execution: Execution
    counts: bool

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        probes: RequestProbes | None,
        ends_prompt: bool = True,
    ) -> None:
        """Attend one request's queries.

        Args:
            query: ``[T, H, D]``, the last of the request's tokens so far.
            keys: ``[1, H_kv, S_kv, D]``, of all of them.
            values: ``[1, H_kv, S_kv, D]``.
            output: ``[T, H, D]``, is written.
            probes: where the request's probes are kept, None if its method has none.
            ends_prompt: whether the last queries may be those of the prompt.
        """
        query = as_batch(query)
        attended, selection, _ = token_sparse_attention(
            query,
            keys,
            values,
            self.config,
            scale=self.scale,
            execution=self.execution,
            chunk=Chunk(None if probes is None else probes.recall(query, keys), ends_prompt),
            return_aux=_LENGTHS,
        )
        output.copy_(attended[0].transpose(0, 1))
        if self.counts and selection is not None:
            COUNTERS.add_layer(selection)


def as_batch(tokens: Tensor) -> Tensor:
    """View ``[T, H, D]`` as ``[1, H, T, D]``."""
    return tokens.transpose(0, 1)[None]
