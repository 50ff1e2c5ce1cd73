"""The output that attention is written into, sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from token_sparse_attention.inputs import Problem, RealTokens
from token_sparse_attention.results import Attended


def new_output(problem: Problem) -> Attended:
    """Return unset output in query's memory layout, which kernels and models go on with.

    Padding's queries are set: attention to no keys gives zeros.
    """
    query = problem.query
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if problem.aux.lse else None
    into = Attended(torch.empty_like(query), lse)
    if problem.tokens.padded:
        zero_sequences(into, slice(None))
    return into


def zero_sequences(into: Attended, sequences: Tensor | slice) -> None:
    """Set sequences of the batch to what attention to no keys gives."""
    into.out[sequences] = 0
    if into.lse is not None:
        into.lse[sequences] = -torch.inf


def mark_invalid_sequences(into: Attended, tokens: RealTokens) -> None:
    """Set sequences to NaN whose mask was not one run, where no error could say so."""
    if tokens.valid is not None:
        invalid = ~tokens.valid[:, None, None]
        into.out.masked_fill_(invalid[..., None], torch.nan)
        if into.lse is not None:
            into.lse.masked_fill_(invalid, torch.nan)
