"""Prefill one prompt sparsely and note which of its tokens every layer and head kept."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from token_sparse_attention.attention.causal import parse_backend, pattern_config
from token_sparse_attention.attention.far_tokens import far_tokens
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import LayerProfile, TokenSparseConfig
from token_sparse_attention.info import provenance
from token_sparse_attention.inputs import real_tokens
from token_sparse_attention.integrations.record import LayerRecord, PrefillReport
from token_sparse_attention.integrations.transformers import apply, attention_of_every_layer
from token_sparse_attention.report.kept_text import KeptLayer, KeptText
from token_sparse_attention.selection import resolve_impl, score_tokens, select_tokens

_MOST_PENDING = 8  # tokens that one character can be split into, with room to spare
_INCOMPLETE = "\ufffd"  # what a tokenizer writes for part of a character


@torch.no_grad()
def capture(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    config: TokenSparseConfig | LayerProfile,
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
        ValueError: if the model cannot be served.
        RuntimeError: if the positions noted for a layer are not as many as it kept.
    """
    ids = ids.to(model.device)
    backend = parse_backend(attention_backend)
    masks: dict[int, Tensor] = {}
    with ExitStack() as stack:
        if pattern_config(backend) is not None:
            stack.enter_context(attention_of_every_layer(model, backend))
        applied = apply(model, config, impl=impl, attention_backend=backend)
        report = stack.enter_context(applied)
        AttentionInterface.register(applied.name, _noting(applied.name, report, impl, masks))
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        records = report.prefills()[0]
    return KeptText(
        provenance=provenance(str(model.device)),
        arguments=arguments,
        tokens=tuple(token_texts(tokenizer, ids[0].tolist())),
        reply=tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip(),
        layers=tuple(_layer(record, masks.get(record.layer)) for record in records),
    )


def _noting(name: str, report: PrefillReport, impl: str, masks: dict[int, Tensor]) -> Any:
    """Wrap an attention function, so that each sparse prefill's selection goes to `masks`.

    The report only says how many tokens were kept. Which ones follows from the same queries
    and keys by the same stages; that it is as many is checked.
    """
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def attend_and_note(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        before = len(report)
        result: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        if len(report) > before and report.records[-1].paths == ["sparse"]:
            record = report.records[-1]
            masks[record.layer] = _kept_mask(record, query, key, scaling, impl)
        return result

    return attend_and_note


def _kept_mask(
    record: LayerRecord, query: Tensor, key: Tensor, scale: float | None, impl: str
) -> Tensor:
    """Return which of its S keys each head kept, ``[H, S]`` bool.

    Where queries are not selected, these are what all of them see beyond their windows.
    """
    selected = record.selection
    if selected is None:
        raise RuntimeError(f"layer {record.layer} ran dense, so it selected nothing")
    key = key[:, :, : record.kv_len]
    scores = score_tokens(query, key, selected.config, scale=scale, impl=impl)
    # One slot more takes what fills up the lists: -1, or the number of keys.
    mask = torch.zeros(scores.shape[1], record.kv_len + 1, dtype=torch.bool, device=key.device)
    if selected.config.select_queries:
        indices = select_tokens(scores, selected.config, impl=impl).indices[0]
        mask.scatter_(1, indices % (record.kv_len + 1), True)
    else:
        tokens = real_tokens(None, 1, record.kv_len, key.device)
        impl = resolve_impl(impl, query, query.shape[-1])
        far = far_tokens(scores, selected.config, tokens, impl)
        if far is not None:
            mask.scatter_(1, far.slots[0], True)
    mask = mask[:, : record.kv_len]
    if mask.sum(1).tolist() != selected.lengths[0].tolist():
        raise RuntimeError(
            f"layer {record.layer} kept {selected.lengths[0].tolist()} tokens, but selecting "
            f"again gave {mask.sum(1).tolist()}"
        )
    return mask


def _layer(record: LayerRecord, mask: Tensor | None) -> KeptLayer:
    if mask is None:
        return KeptLayer((), str(record.reasons[0]))
    selected = record.selection
    beyond_window = selected is not None and not selected.config.select_queries
    return KeptLayer(tuple(_bitmap(row) for row in mask), None, beyond_window)


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
