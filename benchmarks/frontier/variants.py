"""Variants of the method that are not in the library, for the study of what is worth having.

Plain PyTorch around the library's stages, one sequence at a time; made to be measured for
accuracy, not speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from token_sparse_attention import TokenSelection, TokenSparseConfig, compress
from token_sparse_attention.attention.dense import Attended, attend, attend_packed
from token_sparse_attention.attention.far_tokens import FarTokens, draw
from token_sparse_attention.attention.windows import attend_windows
from token_sparse_attention.inputs import Span, real_tokens
from token_sparse_attention.integrations import transformers as integration
from token_sparse_attention.selection import (
    resolve_impl,
    score_tokens,
    select_tokens,
    selection_of_rows,
)

_ROWS = 4096  # queries attended by hand at once


@dataclass(frozen=True)
class Variant:
    """What differs from the library's operator.

    Attributes:
        union: selected queries also attend to the tokens of the fallback's window that were
            not selected, so that no query loses its neighbours.
        value_norm: scores are multiplied by the norm of the value.
        neighbours: how many tokens on each side of a selected one are selected too.
        spread: how many of the scoring queries lie spread over the whole sequence.
        dense_last: how many of the last queries attend to every key.
        pooled: size of the blocks whose mean key and value stand for the keys that are out of
            a query's reach; 0 for none.
        pooled_for: which queries see them: ``"fallback"``, ``"selected"`` or ``"both"``.
        selected: what selected queries get: ``"compressed"`` attention, what the ``"others"``
            get, or ``"dense"`` attention to find what the compressed one costs.
        fallback: what the others get: the ``"window"``; the window and the selected ``"keys"``
            before it, and then selected queries get that too; or ``"dense"`` attention.
        landmarks: how many of a head's best-scored keys the fallback's queries see besides.
        landmarks_by: how many queries, spread over the sequence, choose the landmarks, by the
            attention that they give to what their windows do not show; 0 for the queries
            that score all tokens.
        own_landmarks: how many of the landmarks those that score all tokens choose still.
        samples: how many further tokens the fallback's queries see, one drawn from each of as
            many equal parts of the sequence; it counts for all of its part but the landmarks.
        drawn: how many tokens the fallback's queries see in place of landmarks and samples:
            each is drawn with a probability that grows with its score, and counts for one over
            its probability.
        segments: the queries are cut into this many, each with landmarks of its own that
            `landmarks_by` of its queries choose.
    """

    union: bool = False
    value_norm: bool = False
    neighbours: int = 0
    spread: int = 0
    dense_last: int = 0
    pooled: int = 0
    pooled_for: str = "both"
    selected: str = "compressed"
    fallback: str = "window"
    landmarks: int = 0
    landmarks_by: int = 0
    own_landmarks: int = 0
    samples: int = 0
    drawn: int = 0
    segments: int = 1


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    variant: Variant,
    *,
    scale: float,
    backend: str = "auto",
) -> tuple[Tensor, TokenSelection]:
    """`token_sparse_attention` of one unpadded sequence, under a variant.

    Args:
        query: ``[1, H, S, D]``.
        key: ``[1, H_kv, S, D]``.
        value: likewise.
        config: the settings; the fallback is `window` whatever they say, without sinks.
        variant: what differs.
        scale: factor of the logits.
        backend: which kernel attends.
    """
    run = partial(attend, scale=scale, backend=backend)
    scores = _scores(query, key, value, config, variant, scale)
    selection = select_tokens(scores, config).to_int64()
    if not bool(selection.ran_sparse.all()):
        return run(query, key, value).out, selection
    if variant.neighbours:
        selection = with_neighbours(selection, variant.neighbours)
    out = torch.empty_like(query)
    for begin, end in _segments(query.shape[2], variant.segments):
        rows = query[:, :, begin:end], key[:, :, :end], value[:, :, :end]
        seen_by_all = _seen_by_all(*rows[:2], config, variant, scores, selection, scale)
        out[:, :, begin:end] = _fallback(*rows, config, variant, *seen_by_all, scale, run)
    if variant.fallback != "keys" and variant.selected != "others":
        if variant.selected == "dense":
            rows = run(query, key, value).out
        else:
            rows = _selected(query, key, value, config, variant, selection, scale, backend)
        out = torch.where(_chosen(selection)[None, :, :, None], rows.to(out.dtype), out)
    if variant.dense_last:
        last = slice(query.shape[2] - variant.dense_last, None)
        out[:, :, last] = run(query[:, :, last], key, value).out
    return out, selection


def with_neighbours(selection: TokenSelection, count: int) -> TokenSelection:
    """Return a selection of one sequence with `count` tokens more on each side of every one."""
    chosen = _chosen(selection)
    near = F.max_pool1d(chosen[:, None].float(), 2 * count + 1, stride=1, padding=count)[:, 0] > 0
    heads, kv_len = near.shape
    return selection_of_rows([near], [Span(0, kv_len)], heads, kv_len, near.device)


def _segments(length: int, count: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each of `count` nearly equal parts."""
    ends = [length * (part + 1) // count for part in range(count)]
    return zip([0, *ends], ends, strict=False)


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    variant: Variant,
    scale: float,
) -> Tensor:
    if variant.spread:
        scores = spread_scores(query, key, config.window_size, variant.spread, scale)
    else:
        scores = score_tokens(query, key, config, scale=scale)
    if variant.value_norm:
        norms = value[:, :, : scores.shape[2]].float().norm(dim=-1)
        scores = scores * norms.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return scores


def _seen_by_all(
    query: Tensor,
    key: Tensor,
    config: TokenSparseConfig,
    variant: Variant,
    scores: Tensor,
    selection: TokenSelection,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Slots ``[H, N]`` that queries see wherever they are, and how many tokens each stands for.

    Slots ascend; they are S_kv where there is none.
    """
    length = key.shape[2]
    if variant.fallback == "keys":
        slots = selection.indices[0].long()
        return torch.where(slots < 0, length, slots), torch.ones(slots.shape, device=slots.device)
    scores = scores[:, :, :length]
    count = min(variant.landmarks, scores.shape[2])
    if variant.landmarks_by:
        own = scores
        scores = landmark_scores(query, key, variant.landmarks_by, config.fallback_window, scale)
        best = own[0].topk(min(variant.own_landmarks, own.shape[2]), dim=-1).indices
        scores[0].scatter_(1, best, torch.inf)
    if variant.drawn:
        tokens = real_tokens(None, 1, length, key.device)
        slots, counts = draw(scores, variant.drawn, tokens, config.fallback_window)
        return slots[0], counts[0]
    slots = scores[0].topk(count, dim=-1).indices
    counts = torch.ones(slots.shape, device=slots.device)
    if variant.samples:
        more, sizes = samples(length, variant.samples, slots)
        slots, counts = torch.cat((slots, more), 1), torch.cat((counts, sizes), 1)
    slots, order = slots.sort(-1)
    return slots, counts.gather(1, order)


def landmark_scores(query: Tensor, key: Tensor, count: int, window: int, scale: float) -> Tensor:
    """Attention ``[1, H, S_kv]`` of spread queries, and the last, to keys before windows."""
    length, group = key.shape[2], query.shape[1] // key.shape[1]
    step = query.shape[2] / count
    chosen = ((torch.arange(count, device=query.device) + 1) * step).long() - 1
    positions = chosen + length - query.shape[2]
    slots = torch.arange(length, device=query.device)
    scores = query.new_empty(1, query.shape[1], length, dtype=torch.float32)
    for head in range(query.shape[1]):
        logits = (query[0, head, chosen] @ key[0, head // group].T).float() * scale
        logits.masked_fill_(slots > positions[:, None], -torch.inf)
        probs = logits.softmax(-1)
        scores[0, head] = probs.masked_fill_(slots > positions[:, None] - window, 0.0).mean(0)
    return scores


def samples(length: int, count: int, without: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of each of `count` equal parts, none of some slots ``[H, N]``.

    Returns:
        Slots ``[H, count]``, `length` for none, and how many tokens each stands for: all of its
        part but those.
    """
    size = -(-length // count)
    parts = -(-length // size)
    there = torch.zeros(len(without), parts * size + 1, device=without.device)
    there[:, :length] = 1.0
    there.scatter_(1, without, 0.0)
    there = there[:, : parts * size].reshape(-1, parts, size)
    generator = torch.Generator(without.device).manual_seed(0)
    draw = torch.rand(there.shape, device=without.device, generator=generator) + 1e-6
    slots = (draw * there).argmax(2) + torch.arange(parts, device=without.device) * size
    counts = there.sum(2)
    return torch.where(counts > 0, slots, length), counts


def _fallback(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    variant: Variant,
    seen_by_all: Tensor,
    counts: Tensor,
    scale: float,
    run: Any,
) -> Tensor:
    """What every query would get if it were not selected, ``[1, H, S, D]``."""
    if variant.fallback == "dense":
        out: Tensor = run(query, key, value).out.clone()
        return out
    window, group = config.fallback_window, query.shape[1] // key.shape[1]
    with_pooled = bool(variant.pooled) and variant.pooled_for in ("fallback", "both")
    if not with_pooled:
        into = Attended(torch.empty_like(query), None)
        tokens = real_tokens(None, 1, key.shape[2], query.device)
        rows = torch.ones(1, dtype=torch.bool, device=query.device)
        impl = resolve_impl("auto", query, query.shape[-1])
        attend_windows(
            query, key, value, FarTokens(seen_by_all[None], counts[None]), rows, tokens, into,
            window=window, impl=impl, **run.keywords,
        )  # fmt: skip
        return into.out
    near = run(query, key, value, window=window, want_lse=True)
    out = near.out.clone()
    keys, values = (rows[0].repeat_interleave(group, 0) for rows in (key, value))
    far = [Summary.of_tokens(keys, values, seen_by_all, counts)]
    if with_pooled:
        far.append(Summary.of_blocks(keys, values, variant.pooled, seen_by_all))
    summary = Summary.together(far)
    positions = torch.arange(query.shape[2], device=query.device)
    for begin in range(0, len(positions), _ROWS):
        part = slice(begin, begin + _ROWS)
        old = near.out[0, :, part], near.lse[0, :, part]
        out[0, :, part] = summary.add(query[0, :, part], positions[part] - window, *old, scale)
    return out


def _selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: TokenSparseConfig,
    variant: Variant,
    selection: TokenSelection,
    scale: float,
    backend: str,
) -> Tensor:
    """What the selected queries get, at their slots in ``[1, H, S, D]``; else nothing useful."""
    window, group = config.fallback_window, query.shape[1] // key.shape[1]
    with_pooled = variant.pooled and variant.pooled_for in ("selected", "both")
    packed = compress(query, key, value, selection)
    chosen = attend_packed(*packed, scale=scale, backend=backend, want_lse=True)
    rows, lses = chosen.out, chosen.lse
    if variant.union:
        near = attend(
            query, key, value, scale=scale, backend=backend, window=window, want_lse=True
        )
        rows, lses = _union(packed, chosen, near, selection, window, scale)
    out = torch.empty_like(query)
    begin = 0
    for head, slots in enumerate(_slots(selection)):
        own = slice(begin, begin + len(slots))
        begin += len(slots)
        result = rows[own].to(out.dtype)
        if with_pooled:
            keys, values = key[:1, head // group], value[:1, head // group]
            summary = Summary.of_blocks(keys, values, variant.pooled, slots[None])
            for first in range(0, len(slots), _ROWS):
                part = slice(first, first + _ROWS)
                reach = slots[part] - (window if variant.union else 1)
                old = rows[own][None, part], lses[own][None, part]
                result[part] = summary.add(packed.query[own][None, part], reach, *old, scale)[0]
        out[0, head, slots] = result
    return out


@dataclass(frozen=True)
class Summary:
    """Keys and values that each stand for some tokens of a head.

    Attributes:
        keys: ``[H, N, D]``.
        values: ``[H, N, D]``.
        counts: ``[H, N]``, how many tokens each stands for, maybe not a whole number.
        ends: ``[H, N]``, the last slot each stands for.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    ends: Tensor

    @classmethod
    def of_tokens(cls, keys: Tensor, values: Tensor, slots: Tensor, counts: Tensor) -> Summary:
        """Some tokens ``[H, N]``, none where the slot is S_kv, and what each stands for."""
        at = slots.clamp(max=keys.shape[1] - 1)[..., None].expand(-1, -1, keys.shape[2])
        counts = counts.masked_fill(slots >= keys.shape[1], 0.0)
        return cls(keys.gather(1, at), values.gather(1, at), counts, slots)

    @classmethod
    def of_blocks(cls, keys: Tensor, values: Tensor, size: int, without: Tensor) -> Summary:
        """The mean of each whole block's tokens, without the slots ``[H, N]``."""
        heads, length, _ = keys.shape
        blocks = length // size
        there = torch.ones(heads, length + 1, device=keys.device)
        there.scatter_(1, without, 0)
        there = there[:, : blocks * size].reshape(heads, blocks, size)
        counts = there.sum(2)
        weights = (there / counts.clamp(min=1)[..., None]).to(keys.dtype)

        def mean(rows: Tensor) -> Tensor:
            of_block = rows[:, : blocks * size].reshape(heads, blocks, size, -1)
            return torch.einsum("hbs,hbsd->hbd", weights, of_block)

        ends = torch.arange(1, blocks + 1, device=keys.device) * size - 1
        return cls(mean(keys), mean(values), counts, ends.expand(heads, -1))

    @classmethod
    def together(cls, parts: list[Summary]) -> Summary:
        """Several as one."""
        names = cls.__annotations__
        return cls(*(torch.cat([getattr(part, name) for part in parts], 1) for name in names))

    def add(self, query: Tensor, reach: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
        """Return attention's output ``[H, R, D]`` with these keys besides.

        Args:
            query: ``[H, R, D]``.
            reach: ``[R]``, the last slot that each query may see here.
            out: ``[H, R, D]``, attention without these keys.
            lse: ``[H, R]``, its log-sum-exp.
            scale: factor of the logits.
        """
        logits = (query @ self.keys.transpose(1, 2)).float() * scale + self.counts.log()[:, None]
        logits.masked_fill_(self.ends[:, None] > reach[:, None], -torch.inf)
        both = torch.logaddexp(lse, logits.logsumexp(-1))
        weights = logits.sub_(both[..., None]).exp_().to(query.dtype)
        mixed = out * (lse - both).exp()[..., None] + (weights @ self.values).float()
        return mixed.to(query.dtype)


def _slots(selection: TokenSelection) -> Iterator[Tensor]:
    """The selected slots of each head."""
    for head, size in enumerate(selection.lengths[0].tolist()):
        yield selection.indices[0, head, :size]


def _chosen(selection: TokenSelection) -> Tensor:
    """Which slots each head selected, ``[H, S]`` bool."""
    shape = selection.lengths.shape[1], selection.kv_len
    chosen = torch.zeros(shape, dtype=torch.bool, device=selection.lengths.device)
    for head, slots in enumerate(_slots(selection)):
        chosen[head, slots] = True
    return chosen


def _sequences(selection: TokenSelection) -> Iterator[tuple[int, int]]:
    begin = 0
    for size in selection.lengths[0].tolist():
        yield begin, size
        begin += size


def _union(
    packed: Any, chosen: Any, near: Any, selection: TokenSelection, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over selected and near keys, and its log-sum-exp: both, less what both counted."""
    rows = torch.empty(len(chosen.out), chosen.out.shape[1], device=chosen.out.device)
    sums = torch.empty_like(chosen.lse)
    for head, (begin, size) in enumerate(_sequences(selection)):
        part = slice(begin, begin + size)
        slots = selection.indices[0, head, :size]
        both, both_lse = _band(
            packed.query[part], packed.key[part], packed.value[part], slots, window, scale
        )
        lses = torch.stack((chosen.lse[part], near.lse[0, head, slots], both_lse))
        weights = (lses - lses.amax(0)).exp()
        weights[2].neg_()
        outs = torch.stack((chosen.out[part].float(), near.out[0, head, slots].float(), both))
        rows[part] = (weights[..., None] * outs).sum(0) / weights.sum(0)[:, None]
        sums[part] = lses.amax(0) + weights.sum(0).log()
    return rows, sums


def _band(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of selected queries over the selected keys in their window."""
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(len(query), dtype=torch.float32, device=query.device)
    firsts = torch.searchsorted(slots, slots[::_ROWS] - window + 1).tolist()
    for block, first in enumerate(firsts):
        begin, end = block * _ROWS, min((block + 1) * _ROWS, len(query))
        near = slots[begin:end, None] - slots[first:end]
        logits = query[begin:end].float() @ key[first:end].float().T * scale
        logits = logits.masked_fill((near < 0) | (near >= window), -torch.inf)
        lse[begin:end] = logits.logsumexp(-1)
        out[begin:end] = logits.softmax(-1) @ value[first:end].float()
    return out, lse


def spread_scores(
    query: Tensor, key: Tensor, window_size: int, spread: int, scale: float
) -> Tensor:
    """Scores by the last ``window_size - spread`` queries and `spread` over the sequence.

    Every query counts alike; a key is scored by those after it.
    """
    length, group = key.shape[2], query.shape[1] // key.shape[1]
    last = torch.arange(length - (window_size - spread), length, device=query.device)
    others = torch.linspace(window_size, length - window_size, spread, device=query.device)
    positions = torch.cat((others.long(), last))
    seen = torch.arange(length, device=query.device) <= positions[:, None]
    scores = query.new_empty(1, query.shape[1], length - window_size, dtype=torch.float32)
    for head in range(query.shape[1]):
        chosen = query[0, head, positions].float()
        logits = chosen @ key[0, head // group].float().T * scale
        probs = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        scores[0, head] = probs.mean(0)[: length - window_size]
    return scores


@contextmanager
def varied(variant: Variant) -> Iterator[None]:
    """Let `apply` run the variant in place of the library's operator."""
    original = integration.token_sparse_attention

    def operator(
        query: Tensor, key: Tensor, value: Tensor, config: TokenSparseConfig, **given: Any
    ) -> tuple[Tensor, TokenSelection]:
        scale = given["scale"] or query.shape[-1] ** -0.5
        return attention(
            query,
            key,
            value,
            config,
            variant,
            scale=scale,
            backend=given["attention_backend"],
        )

    integration.token_sparse_attention = operator  # type: ignore[assignment]
    try:
        yield
    finally:
        integration.token_sparse_attention = original
