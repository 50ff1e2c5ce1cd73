"""Scores by earlier queries, and the keys that each block draws by them."""

from __future__ import annotations

import torch
from benchmarks.fidelity.kernel import Entries
from benchmarks.fidelity.variants import Variant
from torch import Tensor

SINKS = 4
GOLDEN = 0.6180339887498949
_MOST = 4
"""A head's budget is at most this many times the mean."""


def draw(variant: Variant, query: Tensor, key: Tensor, value: Tensor) -> Entries:
    """Return the entries of every block, the sinks first.

    Args:
        variant: how to draw.
        query: ``[H, S, D]`` of a whole prefill.
        key: ``[H_kv, S, D]``.
        value: of the shape of `key`.
    """
    heads, length, _ = query.shape
    block = variant.block or length
    blocks = -(-length // block)
    ends = [min((i + 1) * block, length) - variant.window for i in range(blocks)]
    if variant.block:
        ends = [(i + 1) * block - variant.window if i else 0 for i in range(blocks)]
    if not variant.samples:
        ends = [0] * blocks
    ends = [min(end, length) if end > SINKS else 0 for end in ends]
    drawing = [i for i, end in enumerate(ends) if end]
    scores = query.new_zeros((len(drawing), heads, length), dtype=torch.float32)
    wide = key.float()
    for row, i in enumerate(drawing):
        at = _probes(variant, i, block, length, query.device)
        seen = i * block if variant.block else length
        _score(variant, query, wide, at, seen, ends[i], scores[row])
    end = torch.tensor([ends[i] for i in drawing], device=query.device)[:, None, None]
    place = torch.arange(length, device=query.device)
    candidate = (place >= SINKS) & (place < end)
    scores *= candidate
    budget = _budgets(variant, scores, end - SINKS)
    if variant.per_group:
        group = heads // key.shape[0]
        scores = scores.view(len(drawing), -1, group, length).mean(2).repeat_interleave(group, 1)
        budget = (
            budget.reshape(len(drawing), -1, group, 1).mean(2).round().repeat_interleave(group, 1)
        )
    if variant.value_norm:
        norm = value.float().norm(dim=-1)
        scores = scores * norm.repeat_interleave(heads // key.shape[0], 0)
    if variant.estimator in ("samples", "control"):
        weight = _sample(variant, scores, candidate, end, budget)
    else:
        weight = _best(variant, scores, candidate, budget)
    if variant.estimator in ("means", "top-means", "control"):
        found = _with_means(variant, weight, candidate, budget, key, value)
    else:
        found = _compact(weight, variant)
    return _with_sinks(found, drawing, blocks, length, key, value)


def _probes(variant: Variant, i: int, block: int, length: int, device: torch.device) -> Tensor:
    """Return the positions of the queries that score for block `i`."""
    if not variant.block:
        return torch.arange(length - variant.probes, length, device=device)
    step = torch.arange(1, variant.probes + 1, device=device) * block // variant.probes
    return (i - 1) * block + step - 1


def _score(
    variant: Variant, query: Tensor, key: Tensor, at: Tensor, seen: int, end: int, into: Tensor
) -> None:
    """Write the mean over the probes of what each gives to the keys before `end`, of `seen`."""
    heads, _, size = query.shape
    probes = query[:, at].float().reshape(key.shape[0], -1, size)
    logit = (probes @ key[:, :seen].mT) * size**-0.5
    logit = logit.view(heads, len(at), seen)
    place = torch.arange(seen, device=query.device)
    logit.masked_fill_(place > at[:, None], float("-inf"))
    if variant.normaliser == "all":
        share = logit.softmax(-1)
    else:
        near = (place > at[:, None] - variant.window) | (place < SINKS)
        total = logit.masked_fill(~near, float("-inf")).logsumexp(-1, keepdim=True)
        logit -= total
        if variant.normaliser == "near-capped":
            logit.clamp_(max=0)
        share = logit.exp_()
    stop = min(end, seen)
    into[:, :stop] = share.mean(1)[:, :stop]


def _budgets(variant: Variant, scores: Tensor, candidates: Tensor) -> Tensor:
    """Return how many keys each block and head draws, ``[blocks, H, 1]``."""
    budget = torch.full_like(candidates, variant.samples, dtype=torch.float32)
    if variant.share:
        low, high = variant.bounds
        budget = (candidates * variant.share).round().clamp(low, high).float()
    budget = budget.expand(-1, scores.shape[1], -1)
    if variant.budget == "mass":
        mass = scores.sum(-1, keepdim=True)
        part = mass / mass.mean(1, keepdim=True).clamp(min=1e-20)
        budget = (budget * (0.25 + 0.75 * part)).clamp(max=_MOST * budget).round()
    return torch.minimum(budget, candidates.float())


def _sample(
    variant: Variant, scores: Tensor, candidate: Tensor, end: Tensor, budget: Tensor
) -> Tensor:
    """Return each key's weight, 0 where it is not drawn, ``[blocks, H, S]``."""
    if variant.estimator == "control":
        budget = (budget / 2).round()
    place = torch.arange(scores.shape[-1], device=scores.device)
    spread = candidate.float()
    if variant.uniform == "log-distance":
        spread = candidate / (end - place).clamp(min=1)
    elif variant.uniform == "log-position":
        spread = candidate / (place + 1)
    by_score = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    share = variant.by_score * by_score
    share = share + (1 - variant.by_score) * spread / spread.sum(-1, keepdim=True)
    factor = budget / share.sum(-1, keepdim=True)
    for _ in range(10):
        certain = share * factor >= 1
        left = (budget - certain.sum(-1, keepdim=True)).clamp(min=0)
        rest = share.masked_fill(certain, 0).sum(-1, keepdim=True)
        factor = torch.maximum(factor, left / rest.clamp(min=1e-30))
    every = budget >= candidate.sum(-1, keepdim=True)
    certain = (share * factor >= 1) | (every & candidate)
    chance = (share * factor).masked_fill(certain, 0).masked_fill(~candidate, 0)
    upto = chance.double().cumsum(-1)
    below = _points_below(variant, upto)
    hits = torch.diff(below, dim=-1, prepend=torch.zeros_like(below[..., :1]))
    weight = hits * chance.clamp(min=1e-30) ** -variant.exponent
    return torch.where(certain, 1.0, weight.float())


def _points_below(variant: Variant, x: Tensor) -> Tensor:
    """Return how many points, one per unit cell, lie below `x`."""
    cell = x.floor()
    if variant.points == "golden":
        point = ((cell + 1) * GOLDEN).frac()
    elif variant.points == "half":
        point = torch.full_like(x, 0.5)
    else:
        maker = torch.Generator(x.device).manual_seed(int(x.shape[-1]))
        point = torch.rand(x.shape[:-1], generator=maker, device=x.device)[..., None].double()
    return cell + (x - cell > point)


def _best(variant: Variant, scores: Tensor, candidate: Tensor, budget: Tensor) -> Tensor:
    """Return 1 at the best-scored keys: all of the budget, half of it or none."""
    part = {"top": 1.0, "top-means": 0.5, "means": 0.0}[variant.estimator]
    most = int(budget.max() * part)
    if not most:
        return torch.zeros_like(scores)
    order = scores.masked_fill(~candidate, -1).topk(min(most, scores.shape[-1])).indices
    keep = torch.arange(order.shape[-1], device=order.device) < budget * part
    return torch.zeros_like(scores).scatter(-1, order, keep.float())


def _compact(weight: Tensor, variant: Variant) -> Entries:
    """Return the keys whose weight is not 0, in order."""
    chosen = weight > 0
    most = _MOST * max(variant.samples, variant.bounds[1]) if variant.budget == "mass" else 0
    most = min(weight.shape[-1], max(most, variant.samples, variant.bounds[1]) + 64)
    upto = chosen.cumsum(-1, dtype=torch.int32)
    rank = torch.arange(1, most + 1, device=weight.device, dtype=torch.int32)
    rank = rank.expand(*weight.shape[:-1], most).contiguous()
    place = torch.searchsorted(upto, rank).clamp(max=weight.shape[-1] - 1)
    bias = weight.gather(-1, place).clamp(min=1e-30).log()
    count = upto[..., -1].clamp(max=most)
    index = place.int()
    return Entries(index, index.clone(), bias, count)


def _with_means(
    variant: Variant, weight: Tensor, candidate: Tensor, budget: Tensor, key: Tensor, value: Tensor
) -> Entries:
    """Return the chosen keys, and means over runs of the keys that stand for others."""
    part = 1.0 if variant.estimator == "means" else 0.5
    control = variant.estimator == "control"
    group = weight.shape[1] // key.shape[0]
    found = _compact(weight, variant)
    most = int(budget.max() * part)
    blocks, heads, length = weight.shape
    wide = found.index.shape[-1] + most
    new = key.new_zeros
    keys, values = (
        new((blocks, heads, wide, key.shape[-1])),
        new((blocks, heads, wide, key.shape[-1])),
    )
    index = found.index.new_zeros((blocks, heads, wide))
    position, bias = torch.zeros_like(index), torch.zeros_like(index, dtype=torch.float32)
    sign = torch.ones_like(bias)
    count = torch.zeros_like(found.count)
    sources = [t.float().repeat_interleave(group, 0) for t in (key, value)]
    place = torch.arange(length, device=key.device, dtype=torch.int32)
    head = torch.arange(heads, device=key.device)[:, None]
    for b in range(blocks):
        # A control variate covers the drawn keys too, not those that are certain.
        out = (weight[b] == 1.0) if control else (weight[b] > 0)
        rest = candidate[b] & ~out
        number = (budget[b] * part).round()
        left = rest.sum(-1, keepdim=True)
        number = torch.minimum(number, left)
        run = ((rest.cumsum(-1) - 1) * number / left.clamp(min=1)).long().clamp(0, most)
        run = run.masked_fill(~rest, most)
        size = torch.zeros((heads, most + 1), device=key.device)
        size.scatter_add_(1, run, torch.ones_like(run, dtype=torch.float32))
        last = torch.zeros((heads, most + 1), dtype=torch.int32, device=key.device)
        last.scatter_reduce_(1, run, place.expand_as(run), "amax")
        flat = (head * (most + 1) + run).flatten()
        means = []
        for source in sources:
            total = source.new_zeros((heads * (most + 1), source.shape[-1]))
            total.index_add_(0, flat, source.flatten(0, 1))
            means.append(total.view(heads, most + 1, -1) / size.clamp(min=1)[..., None])
        stands = size
        if control:
            drawn = weight[b].masked_fill(out, 0)
            stands = size - torch.zeros_like(size).scatter_add_(1, run, drawn)
        # Means first, then the keys themselves, so that both parts are dense from the left.
        at = torch.arange(wide, device=key.device)
        full = (size[:, :most] > 0).sum(-1, keepdim=True)
        order = torch.where(at < full, at, (at - full + most).clamp(max=wide - 1))
        row = found.index[b].long()
        kv = head // group
        own_position = torch.where(
            run.gather(1, row) < most, last.gather(1, run.gather(1, row)), found.position[b]
        ) if control else found.position[b]  # fmt: skip
        join = (
            (keys, torch.cat((means[0][:, :most].to(key.dtype), key[kv, row]), 1)),
            (values, torch.cat((means[1][:, :most].to(key.dtype), value[kv, row]), 1)),
            (position, torch.cat((last[:, :most], own_position), 1)),
            (bias, torch.cat((stands[:, :most].abs().clamp(min=1e-30).log(), found.bias[b]), 1)),
            (sign, torch.cat((stands[:, :most].sign(), torch.ones_like(found.bias[b])), 1)),
        )
        for into, source in join:
            into[b] = source[head, order]
        count[b] = full[:, 0] + found.count[b]
    return Entries(index, position, bias, count, sign if control else None, keys, values)


def _with_sinks(
    found: Entries, drawing: list[int], blocks: int, length: int, key: Tensor, value: Tensor
) -> Entries:
    """Return entries of all blocks, with the first keys before those that were found."""
    device, heads = key.device, found.index.shape[1]
    wide = found.position.shape[-1] + SINKS
    rows = torch.tensor(drawing, device=device, dtype=torch.long)
    first = torch.arange(SINKS, device=device, dtype=torch.int32)

    def put(source: Tensor, sinks: Tensor | float) -> Tensor:
        into = source.new_zeros((blocks, heads, wide, *source.shape[3:]))
        into[:, :, :SINKS] = sinks
        into[rows, :, SINKS:] = source
        return into

    count = torch.full((blocks, heads), min(SINKS, length), dtype=torch.int32, device=device)
    count[rows] += found.count
    own = {}
    if found.keys is not None and found.values is not None:
        group = heads // key.shape[0]
        for name, source, rest in (("keys", key, found.keys), ("values", value, found.values)):
            own[name] = put(rest, source[:, :SINKS].repeat_interleave(group, 0))
    return Entries(
        put(found.index, first), put(found.position, first), put(found.bias, 0.0), count,
        put(found.sign, 1.0) if found.sign is not None else None, **own,
    )  # fmt: skip


def pairs(variant: Variant, entries: Entries, length: int) -> tuple[float, float]:
    """Return pairs attended and products of scoring, each as a share of dense causal pairs."""
    dense = length * (length + 1) / 2
    window = min(variant.window, length)
    near = length * window - window * (window - 1) / 2
    block = variant.block or length
    blocks = entries.count.shape[0]
    rows = entries.count.float().mean(1).tolist()
    far, scoring = 0.0, 0.0
    for i in range(blocks):
        start, stop = i * block, min((i + 1) * block, length)
        # A prompt's early queries have most of one whole draw still ahead of them.
        if variant.block:
            far += rows[i] * (stop - max(start, min(window, stop)))
            scoring += variant.probes * start if rows[i] > SINKS else 0
        else:
            far += rows[i] * (length - window) / 2
            scoring += variant.probes * length
    extra = dense / variant.delta if variant.delta else 0.0
    return (near + far + extra) / dense, scoring / dense
