"""Which tokens the windowed fallback's queries see beyond their window, and what each counts.

A head's tokens are more than its queries can attend to, so a few stand for all: the first ones
(sinks), the ones it attends to most (landmarks), and others drawn with a probability that
grows with their score. A token drawn with probability p counts for 1 / p tokens, so that sums
over the drawn ones are right on average over where the drawing starts: of the exponentials, and
of the exponentials times the values (importance sampling). What even the last query still has
in its window is left out: no query would see it besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention.config import TokenSparseConfig
from token_sparse_attention.crossover import BreakEven, effective_length
from token_sparse_attention.inputs import RealTokens
from token_sparse_attention.selection import TokenSelection, dense_selection
from token_sparse_attention.tensor_parallel import gather_heads, own_heads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_UNITS = 2**32  # of a probability; whole numbers add up to the same sum in any order
_ENTRIES = 2**23  # drawn from at once
_LEAST = 0.25  # of the mean budget, for every head
_MOST = 4  # times the mean budget, for any head


class FarTokens(NamedTuple):
    """Tokens that every query of a head sees where its window has left them.

    Attributes:
        slots: ``[B, H, M]`` int64, ascending, S_kv behind a head's last one.
        counts: ``[B, H, M]`` float32, how many tokens each stands for; None if each for itself.
    """

    slots: Tensor
    counts: Tensor | None


def far_tokens(
    scores: Tensor,
    config: TokenSparseConfig,
    tokens: RealTokens,
    impl: str,
    tp_group: ProcessGroup | None = None,
) -> FarTokens | None:
    """Return the far tokens of each head, None if there are none.

    Args:
        scores: ``[B, H, N]`` float32, by slot.
        config: says how many of each kind.
        tokens: where the real tokens are.
        impl: ``"triton"`` or ``"reference"``; both draw the same tokens.
        tp_group: the ranks with the layer's other heads, between which budgets are shared out.
    """
    if config.fallback != "window":
        return None
    parts = []
    if config.fallback_sinks:
        parts.append(_sinks(scores, config, tokens))
    if config.fallback_landmarks and scores.shape[2]:
        parts.append(_landmarks(scores, config, tokens))
    own = torch.cat(parts, -1) if parts else None  # ascending: landmarks lie behind the sinks
    if not config.fallback_samples:
        return None if own is None else FarTokens(own, None)
    budgets = None
    if config.budget == "per_head":
        budgets = sample_budgets(scores, config, tokens, tp_group)
    slots, counts = draw(
        scores, config.fallback_samples, tokens, config.fallback_window, own, budgets, impl
    )
    if own is None:
        return FarTokens(slots, counts)
    slots = torch.cat((own, slots), -1)
    counts = torch.cat((torch.ones_like(own, dtype=counts.dtype), counts), -1)
    if not config.fallback_landmarks:  # sinks lie before all drawn tokens
        return FarTokens(slots, counts)
    slots, order = slots.sort(-1)
    return FarTokens(slots, counts.gather(-1, order))


def _sinks(scores: Tensor, config: TokenSparseConfig, tokens: RealTokens) -> Tensor:
    start, end = tokens.limits(2)
    sinks = start + torch.arange(config.fallback_sinks, device=scores.device)
    return torch.where(sinks < end, sinks, tokens.kv_len).expand(*scores.shape[:2], -1)


def _landmarks(scores: Tensor, config: TokenSparseConfig, tokens: RealTokens) -> Tensor:
    start, end = tokens.limits(2)
    slot = torch.arange(scores.shape[2], device=scores.device)
    inside = slot >= start + config.fallback_sinks
    inside = inside & (slot < end - max(config.window_size, config.fallback_window))
    count = min(config.fallback_landmarks, scores.shape[2])
    best, slots = scores.masked_fill(~inside, -1.0).topk(count, dim=-1)
    slots = torch.where(best >= 0, slots, tokens.kv_len).sort(-1).values
    # As many for every length: kernels are compiled for the number.
    return F.pad(slots, (0, config.fallback_landmarks - count), value=tokens.kv_len)


def sample_budgets(
    scores: Tensor,
    config: TokenSparseConfig,
    tokens: RealTokens,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """Share out the heads' samples by the attention they give to what lies beyond the window.

    The error that sampling adds to a head's output grows with that attention and falls with
    the root of the number of samples, so the sum of the squared errors is least where samples
    are in proportion to it.

    Returns:
        ``[B, H]`` float64, ``fallback_samples`` on average, unless a head has the most allowed.
    """
    beyond = _left_behind(tokens, config.fallback_window)[:, None, : scores.shape[2]]
    mass = (scores.double().nan_to_num(0.0) * beyond).sum(-1)
    all_mass = mass if tp_group is None else gather_heads(mass, tp_group)
    for head in config.dense_heads:  # which need none
        all_mass[:, head] = 0.0
    sampling = max(all_mass.shape[1] - len(config.dense_heads), 1)
    shares = all_mass * sampling / all_mass.sum(-1, keepdim=True).clamp(min=1e-30)
    budgets = config.fallback_samples * (_LEAST + (1 - _LEAST) * shares).clamp(max=_MOST)
    return budgets if tp_group is None else own_heads(budgets, mass.shape[1], tp_group)


def _left_behind(tokens: RealTokens, window: int) -> Tensor:
    """Which slots ``[B, S_kv]`` the last query's window has left behind."""
    slot = torch.arange(tokens.kv_len, device=tokens.bounds.device)
    start, end = tokens.limits(1)
    return ((slot >= start) & (slot < end - window)).expand(len(tokens.bounds), -1)


def draw(
    scores: Tensor,
    count: int,
    tokens: RealTokens,
    window: int = 0,
    without: Tensor | None = None,
    budgets: Tensor | None = None,
    impl: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Draw tokens for each head, the more likely the higher they score.

    Half of the probability goes by the scores and half to all these tokens alike; a token whose
    share would exceed one draw is in. The draws are equal steps through the sums of the
    probabilities (systematic sampling), which spreads them over the sequence; nothing is
    random, so the same scores give the same tokens.

    Args:
        scores: ``[B, H, N]`` float32, by slot, N at most S_kv; further slots have none.
        count: how many tokens.
        tokens: where the real tokens are.
        window: the last tokens of each row, as many as this, are not drawn.
        without: ``[B, H, M]`` slots that are not drawn, S_kv for none.
        budgets: ``[B, H]`` float64, how many tokens for each head, at most four times `count`;
            None for `count` for all.
        impl: ``"triton"`` or ``"reference"``.

    Returns:
        Slots ``[B, H, count]``, four times as many with `budgets`, ascending, S_kv behind the
        last one; and how many tokens each stands for, float32.

    Source:
        An extension; vAttention (arXiv 2510.05688) also completes best-scored tokens by samples.
    """
    batch_size, num_heads, _ = scores.shape
    room = count if budgets is None else _MOST * count
    if impl == "triton":
        from token_sparse_attention.kernels.sampling import sample_keys

        return sample_keys(
            scores, tokens.bounds, tokens.kv_len, window, count, room, without, budgets
        )
    if budgets is None:
        budgets = scores.new_full((batch_size, num_heads), count, dtype=torch.float64)
    slots = scores.new_empty(batch_size, num_heads, room, dtype=torch.int64)
    counts = scores.new_empty(batch_size, num_heads, room)
    candidates = _left_behind(tokens, window)
    at_once = max(_ENTRIES // max(batch_size * tokens.kv_len, 1), 1)
    for first in range(0, num_heads, at_once):
        heads = slice(first, first + at_once)
        own = None if without is None else without[:, heads]
        shares = _shares(scores[:, heads], candidates, own)
        likely = _probabilities(shares, budgets[:, heads, None], room)
        slots[:, heads], counts[:, heads] = _steps(likely, room)
    return slots, counts


def _shares(scores: Tensor, candidates: Tensor, without: Tensor | None) -> Tensor:
    """What each slot's token has of the probability, ``[B, H, S_kv]`` float64; adds up to 1."""
    kv_len = candidates.shape[1]
    real = candidates[:, None]
    if without is not None:
        real = real.expand(-1, scores.shape[1], -1)
        others = torch.ones(*real.shape[:2], kv_len + 1, dtype=torch.bool, device=scores.device)
        real = real & others.scatter_(-1, without, False)[..., :kv_len]
    shares = F.pad(scores.double(), (0, kv_len - scores.shape[2]))
    shares = shares.nan_to_num(0.0).masked_fill_(~real, 0.0)
    shares /= shares.sum(-1, keepdim=True).clamp(min=1e-30)
    shares += real / real.double().sum(-1, keepdim=True).clamp(min=1)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)


def _probabilities(shares: Tensor, budgets: Tensor, room: int) -> Tensor:
    """Probabilities ``[B, H, S]`` in proportion to the shares, at most 1, that add up.

    Args:
        shares: ``[B, H, S]`` float64.
        budgets: ``[B, H, 1]`` float64, to what they add up, unless there are fewer tokens.
        room: no budget is larger.
    """
    best = shares.topk(min(room, shares.shape[-1]), dim=-1).values
    certain = torch.arange(best.shape[-1], device=shares.device)
    rest = (1 - (best.cumsum(-1) - best)).clamp(min=1e-12)  # without those before
    factor = (budgets - certain) / rest  # if that many are certain
    number = (factor * best >= 1).sum(-1, keepdim=True)
    factor = factor.gather(-1, number.clamp(max=best.shape[-1] - 1))
    return (shares * factor).clamp(max=1.0)


def _steps(likely: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The slots at which the sum of the probabilities passes a half, one and a half, and so on."""
    units = (likely * _UNITS).round().long()
    passed = (units.cumsum(-1) + _UNITS // 2) // _UNITS
    before = passed.roll(1, -1)
    before[..., 0] = 0
    place = torch.where((passed > before) & (before < count), before, count)
    slot = torch.arange(likely.shape[-1], device=likely.device).expand_as(place)
    slots = likely.new_full((*likely.shape[:-1], count + 1), likely.shape[-1], dtype=torch.int64)
    slots = slots.scatter_(-1, place, slot)[..., :count]
    drawn = units.gather(-1, slots.clamp(max=likely.shape[-1] - 1)).clamp(min=1)
    return slots, (_UNITS / drawn).float()


def rows_run_sparse(
    scores: Tensor,
    config: TokenSparseConfig,
    tokens: RealTokens,
    query_len: int,
    even: BreakEven,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Return which rows ``[B]`` run sparse, bool, where queries are not selected.

    Not all rows are so short that `forces_dense` holds, so unpadded ones are long enough.

    Args:
        scores: ``[B, H, N]`` float32; rows whose scores are not finite run dense.
        config: the settings.
        tokens: where the real tokens are.
        query_len: S_q.
        even: rows shorter than its ``min_length`` run dense.
        tp_group: the ranks with the layer's other heads, which run the same rows dense.
    """
    finite = scores.sum(-1).isfinite()  # none is below 0, so nothing cancels
    if tp_group is not None:
        finite = gather_heads(finite.to(torch.int32), tp_group).bool()
    sparse = finite.all(-1)
    if not tokens.padded:
        return sparse
    start, end = tokens.bounds.long().unbind(-1)
    keys = end - start
    queries = (end - start.clamp(min=tokens.kv_len - query_len)).clamp(min=0)
    sparse &= (queries >= config.window_size) & (keys > config.min_tokens + config.window_size)
    return sparse & (effective_length(queries, keys.clamp(min=1)) >= even.min_length)


def list_far_tokens(
    far: FarTokens | None,
    ran_sparse: Tensor,
    tokens: RealTokens,
    num_heads: int,
    dense_heads: Sequence[int],
    *,
    want_indices: bool,
) -> TokenSelection:
    """Return what every query sees beyond its window, where queries are not selected.

    Args:
        far: the tokens, None for none.
        ran_sparse: ``[B]`` bool; of the other rows all tokens are listed.
        tokens: where the real tokens are.
        num_heads: H.
        dense_heads: heads whose queries see all tokens.
        want_indices: whether to list the tokens, and not only say how many they are.
    """
    kv_len = tokens.kv_len
    dense = dense_selection(tokens, num_heads, want_indices=want_indices)
    slots = dense.indices[..., :0] if far is None else far.slots
    lengths = torch.where(ran_sparse[:, None], (slots < kv_len).sum(-1), dense.lengths)
    for head in dense_heads:
        lengths[:, head] = dense.lengths[:, head]
    selection = dense._replace(lengths=lengths, ran_sparse=ran_sparse, budget=lengths)
    if not want_indices:
        return selection
    listed = torch.where(slots < kv_len, slots, -1)
    listed = F.pad(listed, (0, max(kv_len - slots.shape[2], 0)), value=-1)
    indices = torch.where(ran_sparse[:, None, None], listed[..., :kv_len], dense.indices)
    for head in dense_heads:
        indices[:, head] = dense.indices[:, head]
    return selection._replace(indices=indices)
