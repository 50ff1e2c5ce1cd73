"""Patterns on each head's tokens, one head after the other, by a literal masked softmax."""

from __future__ import annotations

import dataclasses

import torch

from token_sparse_attention.attention.patterns import (
    FlexPrefillConfig,
    MInferenceConfig,
    StreamingConfig,
    XAttentionConfig,
)
from token_sparse_attention.attention.patterns.flexprefill import flexprefill_mask
from token_sparse_attention.attention.patterns.minference import (
    HeadBudget,
    slash_blocks,
    vertical_slash,
)
from token_sparse_attention.attention.patterns.streaming import streaming_mask
from token_sparse_attention.attention.patterns.xattention import xattention_mask
from token_sparse_attention.reference import masked_attention

MASKS = {
    FlexPrefillConfig: flexprefill_mask,
    XAttentionConfig: xattention_mask,
    StreamingConfig: streaming_mask,
}
LITTLE = {
    "flexprefill": FlexPrefillConfig(gamma=0.2, min_budget=0),
    "minference": MInferenceConfig(
        vertical_size=20, slash_size=10, last_queries=16, sink_size=4, local_size=4
    ),
    "xattention": XAttentionConfig(threshold=0.5),
    "streaming": StreamingConfig(sink_size=16, local_size=100),
}
HEADS = MInferenceConfig(
    last_queries=16,
    local_size=2,
    heads=(HeadBudget("vertical_and_slash", 5, 3), HeadBudget("stream_llm", 9, 40)),
)


def allowed_pairs(query, key, config, scale):
    """``[S_q, S_kv]``: which keys the pattern leaves to each query of one head."""
    query, key = query[None, None].float(), key[None, None].float()
    if not isinstance(config, MInferenceConfig):
        return MASKS[type(config)](query, key, config, scale).dense_view()[0, 0]
    chosen = vertical_slash(query, key, config, scale)
    slot = torch.arange(key.shape[2])
    columns = (slot[:, None] == chosen.columns[0, 0]).any(-1)
    causal = slot <= slot[key.shape[2] - query.shape[2] :, None]
    return slash_blocks(chosen, query.shape[2]).dense_view()[0, 0] | (columns & causal)


def by_hand(problem, kept, config, rest, scale):
    """One row: every head gathered by `kept [H, S_kv]`, attended literally, and scattered."""
    query, key, value = (tensor[0].double() for tensor in problem)
    first_query = key.shape[1] - query.shape[1]
    out = rest[0].double().clone()
    for head in range(len(query)):
        kv_head = head // (len(query) // len(key))
        slots = kept[head].nonzero().flatten()
        places = slots[slots >= first_query] - first_query
        q, k, v = query[head, places], key[kv_head, slots], value[kv_head, slots]
        mine = config
        if isinstance(config, MInferenceConfig) and config.heads:
            mine = dataclasses.replace(config, heads=config.heads[head : head + 1])
        allowed = allowed_pairs(q, k, mine, scale)
        out[head, places] = masked_attention(q[None], k[None], v[None], allowed[None], scale)[0]
    return out
