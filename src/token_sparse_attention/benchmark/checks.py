"""Is what was timed right? Sampled rows against a float64 computation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.attention.far_tokens import far_tokens
from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.inputs import real_tokens
from token_sparse_attention.selection import TokenSelection, resolve_impl, score_rows

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
    positions = _sample(slots)
    return max(
        row_error(out[0, head, positions], exact_rows(inputs, head, positions, slots))
        for head in _sampled_heads(inputs)
    )


def check_sparse(
    inputs: Inputs,
    out: Tensor,
    selection: TokenSelection,
    config: TokenSparseConfig,
    *,
    reference_error: float,
    kept: float | None = None,
) -> Verdict:
    """Check sparse attention for the selection that was made, and with `kept` the selection.

    Args:
        inputs: what was attended over.
        out: ``[1, H, S, D]``.
        selection: what was selected.
        config: the settings.
        reference_error: `dense_error` of the dense kernel; twice this, and rounding, is allowed.
        kept: the share that was to be kept.
    """
    bound = 2 * reference_error + inputs.eps / 2
    if not bool(selection.ran_sparse[0]):
        problems = [] if kept is None else ["ran dense, kept was given"]
        return judge(dense_error(inputs, out), bound, problems)
    problems, errors = [], []
    num_slots = inputs.key.shape[2]
    slots = torch.arange(num_slots, device=out.device)
    for head in sorted({*_sampled_heads(inputs), *config.dense_heads[:1]}):
        chosen = selection.indices[0, head, : int(selection.lengths[0, head])].long()
        if not bool((chosen.diff() > 0).all()):
            problems.append(f"head {head}: slots do not ascend")
        if head in config.dense_heads:
            positions = _sample(slots)
            exact = exact_rows(inputs, head, positions, slots)
            errors.append(row_error(out[0, head, positions], exact))
            continue
        dropped = torch.ones(num_slots, dtype=torch.bool, device=out.device)
        if config.dense_queries:
            positions = _sample(slots[-config.dense_queries :])
            exact = exact_rows(inputs, head, positions, slots)
            errors.append(row_error(out[0, head, positions], exact))
            dropped[-config.dense_queries :] = False
        rows = chosen[chosen < num_slots - config.dense_queries]
        if config.select_queries and len(rows):
            positions = _sample(rows)
            exact = exact_rows(inputs, head, positions, chosen)
            errors.append(row_error(out[0, head, positions], exact))
            dropped[chosen] = False
        rest = dropped.nonzero()[:, 0]
        if len(rest) and config.fallback == "window":
            positions = _sample(rest)
            exact = exact_rows(inputs, head, positions, slots, _near(inputs, head, config))
            errors.append(row_error(out[0, head, positions], exact))
        elif len(rest) and bool(out[0, head, rest].any()):
            problems.append(f"head {head}: dropped rows are not zero")
        if kept is not None:
            problems += _selection_problems(inputs, head, chosen, config, kept)
    return judge(max(errors), bound, problems)


def _selection_problems(
    inputs: Inputs, head: int, chosen: Tensor, config: TokenSparseConfig, kept: float
) -> list[str]:
    num_slots, window_size = inputs.key.shape[2], config.window_size
    num_scored = num_slots - window_size
    count = min(max(round(kept * num_slots) - window_size, 0), num_scored)
    if len(chosen) != count + window_size:
        return [f"head {head}: keeps {len(chosen)} tokens, not {count + window_size}"]
    smoothed = _exact_scores(inputs, head, config)
    got = float(smoothed[chosen[chosen < num_scored]].sum())
    best = float(smoothed.topk(count).values.sum())
    if got < (1 - _MASS_TOLERANCE) * best:
        return [f"head {head}: keeps mass {got:.4f} where {best:.4f} is possible"]
    return []


def _exact_scores(inputs: Inputs, head: int, config: TokenSparseConfig) -> Tensor:
    """Smoothed scores ``[N]`` of one head in float64."""
    window_size = config.window_size
    query = inputs.query[0, head, -window_size:].double()
    logits = query @ inputs.key[0, _kv_head(inputs, head)].double().T * inputs.scale
    future = torch.ones(window_size, window_size, dtype=torch.bool, device=query.device).triu(1)
    logits[:, -window_size:].masked_fill_(future, -torch.inf)
    scores = logits.softmax(-1)[:, :-window_size].mean(0)
    return F.avg_pool1d(scores[None, None], config.pool_size, 1, config.pool_size // 2)[0, 0]


class _Near(NamedTuple):
    """The fallback's window, and how many tokens each token before it counts for, 0 if unseen."""

    window: int
    counts: Tensor


def _near(inputs: Inputs, head: int, config: TokenSparseConfig) -> _Near:
    """What the fallback's queries see, by the operator's own scores."""
    query, key, _ = inputs
    impl = resolve_impl("auto", query, query.shape[-1])
    tokens = real_tokens(None, 1, key.shape[2], query.device, on_device=impl == "triton")
    scores = score_rows(query, key, config, tokens, inputs.scale, impl)
    far = far_tokens(scores, config, tokens, impl)
    counts = torch.zeros(key.shape[2] + 1, dtype=torch.float64, device=key.device)
    if far is not None:
        own = 1.0 if far.counts is None else far.counts[0, head].double()
        counts[far.slots[0, head]] = own
    return _Near(config.fallback_window, counts[:-1])


def exact_rows(
    inputs: Inputs,
    head: int,
    positions: Tensor,
    slots: Tensor,
    near: _Near | None = None,
) -> Tensor:
    """Rows ``[R, D]`` of one head in float64: queries at `positions`, keys at `slots`.

    With `near`, the slots are all, and each query sees its window and what counts before it.
    """
    kv_head = _kv_head(inputs, head)
    key, value = (tensor[0, kv_head, slots].double() for tensor in (inputs.key, inputs.value))
    logits = inputs.query[0, head, positions].double() @ key.T * inputs.scale
    if near is not None:
        before = slots <= positions[:, None] - near.window
        logits += torch.where(before, near.counts.log(), 0.0)
    return logits.masked_fill(slots > positions[:, None], -torch.inf).softmax(-1) @ value


def _kv_head(inputs: Inputs, head: int) -> int:
    return head // (inputs.query.shape[1] // inputs.key.shape[1])


def _sampled_heads(inputs: Inputs) -> list[int]:
    num_heads = inputs.query.shape[1]
    return sorted({0, num_heads // 2, num_heads - 1})


def _sample(slots: Tensor) -> Tensor:
    """Return some of the slots, the first and the last among them."""
    count = min(_ROWS, len(slots))
    return slots[torch.linspace(0, len(slots) - 1, count, device=slots.device).round().long()]


def row_error(out: Tensor, exact: Tensor) -> float:
    """Return the worst row's relative error."""
    return float(((out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
