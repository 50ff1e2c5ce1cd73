"""Greedy replies after a prefill that may be sparse; needs transformers only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.errors import UsageError, tokenizing
from token_sparse_attention.evaluation.drafts import propose
from token_sparse_attention.evaluation.record import LayerKept
from token_sparse_attention.integrations.record import PrefillReport
from token_sparse_attention.integrations.transformers import apply, attention_of_every_layer
from token_sparse_attention.profile import LayerProfile
from token_sparse_attention.run import check_prompt, context_limit


@dataclass(frozen=True)
class Reply:
    """What a model said to a prompt.

    Attributes:
        text: decoded, without special tokens, up to the first stop text.
        tokens: all that were generated, an end token included.
        prompt_tokens: S.
        kept: see `SampleResult`.
        seconds: from the start of the prefill to the first token.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    kept: list[LayerKept] | None
    seconds: float


@dataclass(frozen=True)
class Ending:
    """When a reply is over.

    Attributes:
        tokenizer: decodes the reply.
        until: texts that end it.
        end_tokens: tokens that end it.
        max_new_tokens: the most tokens.
    """

    tokenizer: Any
    until: Sequence[str]
    end_tokens: frozenset[int]
    max_new_tokens: int

    def reached(self, tokens: Sequence[int]) -> bool:
        """Return whether a reply of these tokens is over."""
        if len(tokens) >= self.max_new_tokens or tokens[-1] in self.end_tokens:
            return True
        return bool(self.until) and any(stop in self._decode(tokens) for stop in self.until)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the reply as text, up to the first stop text."""
        text = self._decode(tokens)
        for stop in self.until:
            text = text.split(stop)[0] if stop else text
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Prefill:
    """What a prefill left.

    Attributes:
        logits: ``[V]``, of the first token.
        cache: keys and values of all layers.
        croppable: whether tokens can be taken out of the cache.
        kept: see `SampleResult`.
        seconds: from the start of the prefill to the first token.
    """

    logits: Tensor
    cache: DynamicCache
    croppable: bool
    kept: list[LayerKept] | None
    seconds: float


def encode(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Tensor:
    """Return a prompt's token ids ``[1, S]`` as lm-eval would give them to a model.

    The start token is added as the tokenizer does it, unless the prompt begins with it; and
    what does not fit the model's context together with the reply is cut off at the start.

    Raises:
        UsageError: if the reply alone does not fit, or see `run.check_prompt`.
    """
    start = tokenizer.bos_token
    with tokenizing():
        encoded = tokenizer(
            prompt,
            return_tensors="pt",
            add_special_tokens=not (start and prompt.startswith(start)),
        )
    ids: Tensor = encoded["input_ids"]
    limit = context_limit(model)
    if limit is not None:
        if max_new_tokens >= limit:
            raise UsageError(
                f"replies of {max_new_tokens} tokens do not fit the {limit} positions of the model"
            )
        ids = ids[:, -(limit - max_new_tokens) :]
    check_prompt(model, ids, max_new_tokens)
    return ids


def ending(model: Any, tokenizer: Any, until: Sequence[str], max_new_tokens: int) -> Ending:
    """Return when replies of a model end: as its generation config and the task say."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    ends = [ends] if isinstance(ends, int) else (ends or [])
    return Ending(tokenizer, [stop for stop in until if stop], frozenset(ends), max_new_tokens)


@torch.no_grad()
def reply(
    model: Any,
    ids: Tensor,
    config: SparseConfig | LayerProfile | None,
    end: Ending,
    *,
    drafts: Sequence[Sequence[int]] = (),
    pattern: str | None = None,
    impl: str = "auto",
    attention_backend: str = "auto",
) -> Reply:
    """Reply greedily: the likeliest token each time, whatever the generation config says.

    Sparsity, of tokens and of blocks, is applied to the prefill alone and removed before the
    first decode step. Drafts are replies that may be right, such as the dense one: one forward
    pass over a draft tells how far it is what greedy decoding would give. So the result is
    that of decoding token by token, up to what several tokens in one pass round differently
    from one at a time.

    Args:
        model: a causal language model.
        ids: ``[1, S]`` token ids of the prompt.
        config: settings of the prefill, None for no token sparsity.
        end: when the reply is over.
        drafts: replies to try; where none fits, tokens of the prompt are tried.
        pattern: the block-sparse pattern by which all layers attend in the prefill, the
            selected tokens of sparse ones too.
        impl: see `token_sparse_attention`.
        attention_backend: what attends in sparse layers without a pattern.
    """
    read = prefill(
        model, ids, config, pattern=pattern, impl=impl, attention_backend=attention_backend
    )
    given = drafts if read.croppable else None
    tokens = _decode(model, read.cache, int(read.logits.argmax()), given, ids[0].cpu(), end)
    return Reply(end.text(tokens), tokens, ids.shape[1], read.kept, read.seconds)


@torch.no_grad()
def prefill(
    model: Any,
    ids: Tensor,
    config: SparseConfig | LayerProfile | None,
    *,
    pattern: str | None = None,
    impl: str = "auto",
    attention_backend: str = "auto",
) -> Prefill:
    """Read a prompt sparsely, and take all sparsity off the model again; see `reply`."""
    ids = ids.to(model.device)
    cache, croppable = _cache(model)
    report: PrefillReport | None = None
    with ExitStack() as stack:
        if pattern is not None:
            stack.enter_context(attention_of_every_layer(model, pattern))
        if config is not None:
            backend = attention_backend if pattern is None else pattern
            applied = apply(model, config, impl=impl, attention_backend=backend)
            report = stack.enter_context(applied)
        _wait(ids)
        start = time.perf_counter()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        logits.argmax().item()  # waits for the device
        seconds = time.perf_counter() - start
    return Prefill(
        logits, cache, croppable, None if report is None else kept_of(report, model), seconds
    )


def kept_of(report: PrefillReport, model: Any) -> list[LayerKept]:
    """Return how many tokens each layer's heads kept in the last prefill, None where dense."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    kept: list[LayerKept] = [None] * layers
    for record in report.last_prefill():
        if record.kept is not None and record.paths == ["sparse"]:
            heads = record.kept[0]
            kept[record.layer] = heads[0] if len(set(heads)) == 1 else heads
    return kept


def _decode(
    model: Any,
    cache: DynamicCache,
    first: int,
    drafts: Sequence[Sequence[int]] | None,
    prompt: Tensor,
    end: Ending,
) -> list[int]:
    """Return the reply that begins with `first`; the cache holds all tokens but the last.

    Without `drafts`, not even empty ones, each pass decodes one token.
    """
    tokens = [first]
    while not end.reached(tokens):
        room = end.max_new_tokens - len(tokens) - 1
        draft = [] if drafts is None else propose(tokens, drafts, prompt)[:room]
        given = torch.tensor([[tokens[-1], *draft]], device=model.device)
        following = _next_tokens(model, given, cache)
        right = 0
        while right < len(draft) and following[right] == draft[right]:
            right += 1
        if right < len(draft):
            cache.crop(right - len(draft))
        for token in following[: right + 1]:
            tokens.append(token)
            if end.reached(tokens):
                break
    return tokens


def _cache(model: Any) -> tuple[DynamicCache, bool]:
    """Return an empty cache, and whether tokens can be taken out of it again.

    It keeps all keys of all layers, since a cache that forgets could not be cropped; unless
    some layers have a state in place of keys, which only the model's own cache has.
    """
    own = DynamicCache(config=model.config)
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in own.layers):
        return own, False
    return DynamicCache(), True


def _next_tokens(model: Any, ids: Tensor, cache: DynamicCache) -> list[int]:
    """Return the likeliest token after each of `ids`; waits for the device."""
    output = model(ids, past_key_values=cache, use_cache=True)
    likeliest: list[int] = output.logits[0].argmax(-1).tolist()
    return likeliest


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
