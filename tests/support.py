"""Problems and comparisons shared by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from token_sparse_attention import (
    AuxRequest,
    DenseReason,
    KVSamplingConfig,
    SparseConfig,
    TokenSelection,
    TokenSelectionConfig,
    reference,
    token_sparse_attention,
)
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.benchmark.checks import block_counts
from token_sparse_attention.inputs import Chunk, real_tokens, unit_stride
from token_sparse_attention.inputs import Problem as Checked
from token_sparse_attention.methods import method_of
from token_sparse_attention.methods.sampling import sample_parts

SMALL = TokenSelectionConfig(drop_mass=0.2, observation_window=16, pool_size=5, min_tokens=24)
SAMPLING = KVSamplingConfig(
    block_size=16,
    num_probes=8,
    sliding_window=16,
    sink_size=0,
    num_samples=15,
    dense_queries=0,
    crossover="off",
)
WITH_SELECTION = AuxRequest(selection=True)
WITH_LSE = AuxRequest(lse=True)
WITH_BOTH = AuxRequest(selection=True, lse=True)

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = [f"case{number}" for number in range(6)]


def golden_case(name: str) -> tuple[dict[str, Tensor], TokenSelectionConfig, int | None]:
    """A case of the published code: its tensors, its settings, and how many tokens it kept."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        tensors = {entry: torch.from_numpy(arrays[entry]) for entry in arrays if entry != "meta"}
        meta = json.loads(str(arrays["meta"]))
    config = TokenSelectionConfig(
        drop_mass=meta["tau"],
        observation_window=meta["window_size"],
        pool_size=meta["pool_size"],
        min_tokens=meta["min_tokens"],
    )
    return tensors, config, meta["selected"]


class Problem(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def make_problem(
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    query_len: int = 111,
    kv_len: int | None = None,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sharpness: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Random inputs; `sharpness` scales the queries, so that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    kv_len = query_len if kv_len is None else kv_len
    query = torch.randn(batch, heads, query_len, head_dim, generator=generator) * sharpness
    key = torch.randn(batch, kv_heads, kv_len, head_dim, generator=generator)
    value = torch.randn(batch, kv_heads, kv_len, head_dim, generator=generator)
    return Problem(*(tensor.to(device, dtype) for tensor in (query, key, value)))


def checked(problem: Problem, mask: Tensor | None = None, impl: str = "reference") -> Checked:
    """The problem as methods get it, of a call that continues nothing."""
    key = problem.key
    tokens = real_tokens(mask, len(key), key.shape[2], key.device, on_device=impl == "triton")
    rest = (tokens, key.shape[3] ** -0.5, impl, None, None, AuxRequest(), Chunk())
    return Checked(*(unit_stride(tensor) for tensor in problem), *rest)


def counts_behind(problem: Problem, config: KVSamplingConfig, impl: str = "reference") -> Tensor:
    """How often keys count for the queries of one call behind whose windows they are.

    Returns:
        ``[H, S_q, S_kv]`` float64, by what the operator samples; 1 where all keys are seen.
    """
    _, heads, query_len, head_dim = problem.query.shape
    kv_len, device = problem.key.shape[2], problem.query.device
    counts = torch.ones(heads, query_len, kv_len, dtype=torch.float64, device=device)
    method = method_of(config)
    gate = method.gate(device, heads, head_dim)
    if gate.reason(query_len, kv_len) is not None:
        return counts
    given = checked(problem, impl=impl)
    plan = method.prepare(given, gate)
    if isinstance(plan, DenseReason):
        return counts
    sampled = [*sample_parts(given, *plan.keys, config)]
    begin = plan.begin if plan.begins is None else int(plan.begins[0])
    size, first = config.block_size, kv_len - query_len
    for block in range(begin // size, -(-kv_len // size)):
        queries = slice(max(block * size, begin) - first, (block + 1) * size - first)
        for head in range(heads):
            own = block_counts(sampled, head, block, kv_len)
            if own is not None:
                counts[head, queries] = own
    return counts


def oracle(
    problem: Problem,
    config: SparseConfig,
    sequence: int = 0,
    *,
    past_query: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The reference on one unpadded sequence: output ``[H, S_q, D]`` and chosen tokens.

    It runs in float64, but with samples in the problem's own precision: scores that round
    otherwise may sample a key's neighbour. `past_query` are all queries of earlier calls.
    """
    samples = isinstance(config, KVSamplingConfig) and config.num_samples
    query, key, value = (
        tensor[sequence] if samples else tensor[sequence].double() for tensor in problem
    )
    scale = query.shape[-1] ** -0.5
    return reference.token_sparse_attention(
        query, key, value, config, scale, past_query=past_query
    )


def with_selection(
    problem: Problem, config: SparseConfig, **options: Any
) -> tuple[Tensor, TokenSelection]:
    """The operator's output, and what it attended to."""
    result = token_sparse_attention(*problem, config, return_aux=WITH_SELECTION, **options)
    assert result.selection is not None
    return result.output, result.selection


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    backend: str = "auto",
    window: int | None = None,
) -> Tensor:
    """Dense causal attention by a backend."""
    resolved = resolve_backend(backend, query, key)
    return resolved.attend(query, key, value, scale=scale, window=window).out


def relative_error(out: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm())


def kept_mask(indices: Tensor, kv_len: int) -> Tensor:
    """``[B, H, K]`` indices as a ``[B, H, kv_len]`` mask."""
    mask = torch.zeros(*indices.shape[:2], kv_len + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(2, indices.where(indices >= 0, kv_len), True)[..., :kv_len]
