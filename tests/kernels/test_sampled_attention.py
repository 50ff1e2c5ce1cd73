"""Merging sampled keys into sliding-window attention, against a literal masked softmax."""

from __future__ import annotations

import pytest
import torch

from support import make_problem

pytest.importorskip("triton")

from token_sparse_attention.kernels import sampled_attention
from token_sparse_attention.kernels.sampled_attention import Tiles, add_sampled_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("num_sampled", [0, 1, 70])
@pytest.mark.parametrize("window", [1, 40, 500])
@pytest.mark.parametrize(("query_len", "kv_len", "head_dim"), [(130, 130, 24), (75, 301, 64)])
@pytest.mark.parametrize("weighted", [False, True])
def test_windows_and_sampled_keys(
    monkeypatch, weighted, num_sampled, window, query_len, kv_len, head_dim
):
    """The kernel against a literal mask; padding is NaN, and absent keys are taken from it."""
    problem = make_problem(
        batch=3, heads=6, kv_heads=2, query_len=query_len, kv_len=kv_len, head_dim=head_dim,
        device=DEVICE,
    )  # fmt: skip
    runs = ((0, kv_len), (kv_len // 3, kv_len), (0, kv_len - 60))
    position = torch.arange(kv_len, device=DEVICE)
    bounds = torch.tensor(runs, dtype=torch.int32, device=DEVICE)
    real = (position >= bounds[:, :1]) & (position < bounds[:, 1:])
    first = kv_len - query_len
    problem.query.masked_fill_(~real[:, None, first:, None], torch.nan)
    for tensor in problem[1:]:
        tensor.masked_fill_(~real[:, None, :, None], torch.nan)
    generator = torch.Generator(DEVICE).manual_seed(1)
    order = torch.rand(3, 6, kv_len, generator=generator, device=DEVICE) - 2 * ~real[:, None]
    best, slots = order.topk(num_sampled)
    slots = torch.where(best >= 0, slots, kv_len).sort(-1).values
    slots[:, :, num_sampled - num_sampled // 5 :] = kv_len
    slots = slots.int()
    causal = (position <= position[first:, None]) & real[:, None, None]
    near = (causal & (position > position[first:, None] - window)).expand(-1, 6, -1, -1)
    both = near | (causal & (position == slots[..., None]).any(2)[:, :, None])
    weights = None
    extra = torch.zeros(3, 6, kv_len + 1, device=DEVICE)
    if weighted:
        weights = torch.randint(1, 40, slots.shape, generator=generator, device=DEVICE).float()
        extra.scatter_(2, slots.long(), weights.log())
    extra = extra[:, :, None, :kv_len] * ~near
    out, lse = literal_attention(problem, near)
    expected, expected_lse = literal_attention(problem, both, extra)
    unwritten = ~real[:, None, first:].expand(-1, 6, -1)
    for wrong, right in ((out, expected), (lse, expected_lse)):
        wrong[unwritten], right[unwritten] = 7.0, 7.0
    # Contiguous over the tokens of a head or over the heads of a token, as models have it.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    before, before_lse = out.clone(), lse.clone()
    sequences = torch.tensor([True, True, True], device=DEVICE)
    monkeypatch.setattr(sampled_attention, "pick_tiles", lambda *_: Tiles(32, 16, 4, 2))
    sampled, options = (slots, weights), {"window": window, "scale": 0.3}
    add_sampled_keys(*problem, sampled, (bounds, sequences), (out, lse), **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
    nothing = num_sampled == 0 or window == 500
    assert torch.equal(out, before) == nothing, "the sampled keys must matter"
    sequences = torch.tensor([False, True, False], device=DEVICE)
    add_sampled_keys(*problem, sampled, (bounds, sequences), (before, before_lse), **options)
    assert torch.equal(before[1], out[1])
    assert torch.equal(before[0], out[0]) == nothing


def literal_attention(problem, seen, extra=0.0):
    """Attention and log-sum-exp under a mask ``[B, H, S_q, S_kv]``, in float64.

    `extra` is added to the logits.
    """
    query, key, value = (tensor.double().nan_to_num() for tensor in problem)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = (query @ key.transpose(2, 3) * 0.3 + extra).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ value).float(), logits.logsumexp(-1).float()
