"""Masks and inputs to time block-sparse attention on."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from token_sparse_attention.attention.block_mask import BlockGrid, BlockMask
from token_sparse_attention.benchmark.checks import Inputs

_COLUMN_SHARE, _TOPICS, _TOPIC_TOKENS = 0.001, 32, 1024


def random_mask(inputs: Inputs, density: float) -> tuple[BlockMask, Tensor]:
    """Return a mask with every head's own random blocks, and the map it was made of.

    The diagonal is always there; the other blocks are random, so that the expected density is as
    asked.
    """
    query = inputs.query
    grid = BlockGrid(query.shape[2], inputs.key.shape[2])
    causal = int(grid.visible(query.device).sum())
    earlier = int(grid.earlier(query.device).sum())
    share = (density * causal - (causal - earlier)) / max(earlier, 1)
    generator = torch.Generator(query.device).manual_seed(round(1000 * density))
    shape = (*query.shape[:2], grid.query_blocks, grid.kv_blocks)
    kept = torch.rand(shape, generator=generator, device=query.device) < share
    mask = BlockMask.from_block_map(kept, grid)
    return mask, kept


def structured_inputs(inputs: Inputs) -> Inputs:
    """Return inputs whose attention has what patterns look for; the value stays.

    To random queries and keys are added: a rotation with the position, as of RoPE, which gives
    nearness, stronger in later heads; a direction that all queries share with one key in a
    thousand and the first four, which gives columns; and topics that runs of a thousand tokens
    have or share, which gives blocks. White noise has no structure, and every pattern would
    choose nearly everything.
    """
    query, key, value = inputs
    generator = torch.Generator(query.device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=query.device)
    length, head_dim = query.shape[2:]
    quarter = head_dim // 4
    position = torch.arange(length, device=query.device, dtype=torch.float32)
    speed = 10000.0 ** (-torch.arange(quarter, device=query.device) / quarter)
    angle = position[:, None] * speed
    turning = torch.cat([angle.cos(), angle.sin()], -1)
    direction = normal(head_dim - 2 * quarter)
    direction = direction / direction.norm()
    topics = normal(_TOPICS, head_dim - 2 * quarter)
    topics = topics / topics.norm(dim=-1, keepdim=True) * head_dim**0.25 * 1.8
    runs = length // _TOPIC_TOKENS + 1
    made = []
    for tensor in (query, key):
        heads = tensor.shape[1]
        strength = torch.linspace(1.0, 2.0, heads, device=query.device)[:, None, None]
        which = torch.randint(_TOPICS, (heads, runs), generator=generator, device=query.device)
        topic = topics[which].repeat_interleave(_TOPIC_TOKENS, 1)[:, :length]
        if tensor is query:
            shared = torch.full((heads, length), 4.0, device=query.device)
        else:
            chosen = torch.rand(heads, length, generator=generator, device=query.device)
            shared = (chosen < _COLUMN_SHARE).float()
            shared[:, :4] = 1.0
            shared *= 8.0 * head_dim**0.5 / 4.0  # a logit of 8
        added = torch.cat([turning * strength, topic + shared[..., None] * direction], -1)
        mixed = (tensor + added).to(tensor.dtype)
        made.append(mixed.transpose(1, 2).contiguous().transpose(1, 2))
    return Inputs(made[0], made[1], value)
