"""Is what was timed right? Sampled rows against a float64 computation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.blocks import Blocks
from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
)
from token_sparse_attention.impls import resolve_impl
from token_sparse_attention.inputs import AuxRequest, Chunk, Problem, real_tokens
from token_sparse_attention.methods import method_of
from token_sparse_attention.methods.base import Plan
from token_sparse_attention.methods.local import SampledKeys
from token_sparse_attention.methods.sampling import sample_parts
from token_sparse_attention.results import TokenSelection

_ROWS = 16  # sampled queries of each sampled head
_FLOOR = 1e-5  # what adding up many float32 products may cost
_MASS_TOLERANCE = 1e-3  # share of the best possible mass that a selection may miss


class Inputs(NamedTuple):
    """Batch size 1: ``query [1, H, S, D]``, ``key`` and ``value [1, H_kv, S, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return float(self.query.shape[-1] ** -0.5)

    @property
    def eps(self) -> float:
        """Relative spacing of the numbers that the inputs can hold."""
        return torch.finfo(self.query.dtype).eps


def random_inputs(
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Inputs:
    """Random tensors that lie in memory as Hugging Face models give them: ``[B, S, H, D]``."""
    generator = torch.Generator(device).manual_seed(seq_len)
    return Inputs(
        *(
            torch.randn(
                *(1, seq_len, heads, head_dim), generator=generator, device=device, dtype=dtype
            ).transpose(1, 2)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
    )


class Verdict(NamedTuple):
    """The outcome of a check; `Record` explains the fields."""

    passed: bool
    error: float | None
    note: str = ""

    @property
    def allowance(self) -> float:
        """The error that others may be held to: none, if the check failed."""
        return self.error if self.passed and self.error else 0.0


def judge(error: float, bound: float, problems: list[str] | None = None) -> Verdict:
    """Return whether an error keeps its bound and nothing else is wrong."""
    notes = list(problems or [])
    if not error <= bound:  # also if it is NaN
        notes.append(f"relative error {error:.2e} exceeds {bound:.2e}")
    return Verdict(not notes, error if math.isfinite(error) else None, "; ".join(notes))


def check_dense(inputs: Inputs, out: Tensor) -> Verdict:
    """Check dense causal attention."""
    return judge(dense_error(inputs, out), max(4 * inputs.eps, _FLOOR))


def dense_error(inputs: Inputs, out: Tensor) -> float:
    """Return the relative error of dense causal attention, the worst of the sampled rows."""
    slots = torch.arange(inputs.key.shape[2], device=out.device)
    positions = sampled_slots(slots)
    return max(
        row_error(out[0, head, positions], exact_rows(inputs, head, positions, slots))
        for head in sampled_heads(inputs)
    )


def check_sparse(
    inputs: Inputs,
    out: Tensor,
    selection: TokenSelection,
    config: SparseConfig,
    *,
    reference_error: float,
) -> Verdict:
    """Check sparse attention for what was chosen, and with a ``keep_ratio`` the choice.

    Args:
        inputs: what was attended over.
        out: ``[1, H, S, D]``.
        selection: what was chosen.
        config: the settings, of one of the two methods.
        reference_error: `dense_error` of the dense kernel; twice this, and rounding, is allowed.
    """
    bound = 2 * reference_error + inputs.eps / 2
    ratio = config.keep_ratio if isinstance(config, TokenSelectionConfig) else None
    if not bool(selection.ran_sparse[0]):
        problems = [] if ratio is None else ["ran dense, keep_ratio was given"]
        return judge(dense_error(inputs, out), bound, problems)
    problems, errors = [], []
    slots = torch.arange(inputs.key.shape[2], device=out.device)
    for head in sorted({*sampled_heads(inputs), *config.dense_heads[:1]}):
        chosen = selection.indices[0, head, : int(selection.lengths[0, head])].long()
        if not bool((chosen.diff() > 0).all()):
            problems.append(f"head {head}: slots do not ascend")
        parts: Iterable[tuple[Tensor, Tensor | None, _Near | None]] = [(slots, slots, None)]
        if head not in config.dense_heads:
            parts = _sparse_parts(inputs, head, chosen, config)
        for queries, keys, near in parts:
            if not len(queries):
                continue
            if keys is None:
                if bool(out[0, head, queries].any()):
                    problems.append(f"head {head}: dropped queries are not zero")
                continue
            positions = sampled_slots(queries)
            exact = exact_rows(inputs, head, positions, keys, near)
            errors.append(row_error(out[0, head, positions], exact))
        if ratio is not None and isinstance(config, TokenSelectionConfig):
            problems += _selection_problems(inputs, head, chosen, config, ratio)
    return judge(max(errors), bound, problems)


def _sparse_parts(
    inputs: Inputs, head: int, chosen: Tensor, config: SparseConfig
) -> Iterator[tuple[Tensor, Tensor | None, _Near | None]]:
    """Yield queries of a head, the keys that they attend to (None: zeros), and their window."""
    num_slots = inputs.key.shape[2]
    slots = torch.arange(num_slots, device=chosen.device)
    last = max(num_slots - config.dense_queries, 0)
    yield slots[last:], slots, None
    if isinstance(config, KVSamplingConfig):
        sampled = _sampled(inputs, config)
        for begin in range(0, last, config.block_size):
            queries = slots[begin : min(begin + config.block_size, last)]
            counts = block_counts(sampled, head, begin // config.block_size, num_slots)
            near = None if counts is None else _Near(config.sliding_window, counts)
            yield queries, slots, near
    elif isinstance(config, TokenSelectionConfig):
        yield chosen[chosen < last], chosen, None
        dropped = torch.ones(num_slots, dtype=torch.bool, device=chosen.device)
        dropped[chosen] = False
        dropped[last:] = False
        rest = dropped.nonzero()[:, 0]
        unseen = torch.zeros(num_slots, dtype=torch.float64, device=chosen.device)
        windowed = config.fallback == "window"
        near = _Near(config.sliding_window, unseen) if windowed else None
        yield rest, slots if windowed else None, near


def _selection_problems(
    inputs: Inputs, head: int, chosen: Tensor, config: TokenSelectionConfig, ratio: float
) -> list[str]:
    if head in config.dense_heads:
        return []
    num_slots, window = inputs.key.shape[2], config.observation_window
    num_scored = num_slots - window
    count = min(max(round(ratio * num_slots) - window, 0), num_scored)
    if len(chosen) != count + window:
        return [f"head {head}: keeps {len(chosen)} tokens, not {count + window}"]
    smoothed = _exact_scores(inputs, head, config)
    got = float(smoothed[chosen[chosen < num_scored]].sum())
    best = float(smoothed.topk(count).values.sum())
    if got < (1 - _MASS_TOLERANCE) * best:
        return [f"head {head}: keeps mass {got:.4f} where {best:.4f} is possible"]
    return []


def _exact_scores(inputs: Inputs, head: int, config: TokenSelectionConfig) -> Tensor:
    """Smoothed scores ``[N]`` of one head in float64."""
    window = config.observation_window
    query = inputs.query[0, head, -window:].double()
    logits = query @ inputs.key[0, _kv_head(inputs, head)].double().T * inputs.scale
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    logits[:, -window:].masked_fill_(future, -torch.inf)
    scores = logits.softmax(-1)[:, :-window].mean(0)
    return F.avg_pool1d(scores[None, None], config.pool_size, 1, config.pool_size // 2)[0, 0]


class _Near(NamedTuple):
    """A sliding window, and how often each key before it counts, 0 if it is not seen."""

    window: int
    weights: Tensor


def _sampled(inputs: Inputs, config: KVSamplingConfig) -> list[tuple[Blocks, SampledKeys]]:
    """What the operator itself samples, as it scores."""
    query = inputs.query
    impl = resolve_impl("auto", query, query.shape[-1])
    tokens = real_tokens(None, 1, inputs.key.shape[2], query.device, on_device=impl == "triton")
    problem = Problem(*inputs, tokens, inputs.scale, impl, None, None, AuxRequest(), Chunk())
    method = method_of(config)
    plan = method.prepare(problem, method.gate(query.device, query.shape[1], query.shape[3]))
    assert isinstance(plan, Plan)
    blocks, probes = plan.keys
    return [*sample_parts(problem, blocks, probes, config)]


def block_counts(
    sampled: Iterable[tuple[Blocks, SampledKeys]], head: int, number: int, num_slots: int
) -> Tensor | None:
    """How often each key behind the windows of a block's queries counts, ``[S]`` float64.

    Args:
        sampled: by runs of blocks of one sequence without padding.
        head: of its query heads.
        number: the block.
        num_slots: S.

    Returns:
        The counts; None where the block runs dense.
    """
    for blocks, keys in sampled:
        index = number - blocks.first
        if 0 <= index < blocks.num_blocks:
            count = int(keys.counts[0, head, index])
            slots = keys.slots[0, head, index, :count].long()
            counts = torch.zeros(num_slots, dtype=torch.float64, device=slots.device)
            counts[slots] = keys.log_weights[0, head, index, :count].double().exp2()
            return counts
    return None


def exact_rows(
    inputs: Inputs,
    head: int,
    positions: Tensor,
    slots: Tensor,
    near: _Near | None = None,
) -> Tensor:
    """Rows ``[R, D]`` of one head in float64: queries at `positions`, keys at `slots`.

    With `near`, the slots are all, and each query sees its window and the weighted keys before it.
    """
    kv_head = _kv_head(inputs, head)
    key, value = (tensor[0, kv_head, slots].double() for tensor in (inputs.key, inputs.value))
    logits = inputs.query[0, head, positions].double() @ key.T * inputs.scale
    if near is not None:
        before = slots <= positions[:, None] - near.window
        logits += torch.where(before, near.weights.log(), 0.0)
    return logits.masked_fill(slots > positions[:, None], -torch.inf).softmax(-1) @ value


def _kv_head(inputs: Inputs, head: int) -> int:
    return head // (inputs.query.shape[1] // inputs.key.shape[1])


def sampled_heads(inputs: Inputs) -> list[int]:
    """Return the query heads that checks look at."""
    num_heads = inputs.query.shape[1]
    return sorted({0, num_heads // 2, num_heads - 1})


def sampled_slots(slots: Tensor) -> Tensor:
    """Return the slots that checks look at, the first and the last among them."""
    count = min(_ROWS, len(slots))
    return slots[torch.linspace(0, len(slots) - 1, count, device=slots.device).round().long()]


def row_error(out: Tensor, exact: Tensor) -> float:
    """Return the worst row's relative error."""
    return float(((out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
