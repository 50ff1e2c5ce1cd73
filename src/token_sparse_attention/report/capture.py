"""Prefill one prompt sparsely and note which of its tokens every layer and head kept."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.info import provenance
from token_sparse_attention.integrations.record import LayerRecord
from token_sparse_attention.profile import LayerProfile
from token_sparse_attention.report.kept_text import KeptLayer, KeptText
from token_sparse_attention.run import answer

_MOST_PENDING = 8  # tokens that one character can be split into, with room to spare
_INCOMPLETE = "\ufffd"  # what a tokenizer writes for part of a character


def capture(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    config: SparseConfig | LayerProfile,
    *,
    arguments: Mapping[str, Any],
    max_new_tokens: int = 32,
    impl: str = "auto",
    attention_backend: str | PatternConfig = "auto",
) -> KeptText:
    """Answer a prompt sparsely and return which of its tokens were kept.

    Args:
        model: see `apply`.
        tokenizer: the model's tokenizer.
        ids: ``[1, S]`` token ids of the prompt.
        config: the settings.
        arguments: what to note about the run.
        max_new_tokens: at most this many tokens are generated.
        impl: see `token_sparse_attention`.
        attention_backend: see `token_sparse_attention`; a pattern runs in every layer.

    Raises:
        UsageError: if the prompt has one token.
        ValueError: if the model cannot be served.
    """
    reply = answer(
        model, tokenizer, ids, config,
        max_new_tokens=max_new_tokens, impl=impl, attention_backend=attention_backend,
        record_tokens=True,
    )  # fmt: skip
    assert reply.report is not None
    prefills = reply.report.prefills()
    if not prefills:
        raise UsageError("a prompt of one token has no prefill, in which keys could be left out")
    return KeptText(
        provenance=provenance(str(model.device)),
        arguments=arguments,
        tokens=tuple(token_texts(tokenizer, ids[0].tolist())),
        reply=reply.text,
        layers=tuple(_layer(record) for record in prefills[0]),
    )


def _layer(record: LayerRecord) -> KeptLayer:
    """Return which of its S keys each head kept, as bitmaps."""
    selection = record.selection
    if selection is None or record.paths != ["sparse"]:
        return KeptLayer((), str(record.reasons[0]))
    indices = selection.indices[0].long() % (record.kv_len + 1)  # -1 goes behind the last key
    mask = torch.zeros(len(indices), record.kv_len + 1, dtype=torch.bool, device=indices.device)
    mask = mask.scatter_(1, indices, True)[:, : record.kv_len]
    beyond_window = isinstance(record.config, KVSamplingConfig)
    return KeptLayer(tuple(_bitmap(head) for head in mask), None, beyond_window)


def _bitmap(row: Tensor) -> str:
    bits = torch.zeros(-(-len(row) // 8), 8, dtype=torch.uint8)
    bits.view(-1)[: len(row)] = row.cpu()
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return base64.b64encode(bytes((bits * weights).sum(1).tolist())).decode()


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return each token's part of the decoded prompt.

    A character that is split over several tokens belongs to the last of them. Tokens are
    decoded together with the one before, because some tokenizers drop a first token's space.

    Args:
        tokenizer: a transformers tokenizer.
        ids: the prompt's token ids.
    """

    def decode(part: list[int]) -> str:
        text: str = tokenizer.decode(
            part, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    texts = []
    context, done = 0, 0  # ids before `done` are written; those from `context` on are decoded
    for end in range(1, len(ids) + 1):
        text = decode(ids[context:end])
        if text.endswith(_INCOMPLETE) and end - done < _MOST_PENDING and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decode(ids[context:done])) :])
        context, done = done, end
    return texts
