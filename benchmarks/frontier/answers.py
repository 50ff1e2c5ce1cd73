"""How likely the right answer is after a sparse prefill: less noisy than replies."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from token_sparse_attention.evaluation.generate import Reply, kept_of
from token_sparse_attention.evaluation.samples import Sample
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.settings import Settings


class Likelihood:
    """Scores replies of `likelihood` by the probability of the whole answer."""

    def score(self, sample: Sample, reply: str) -> float:  # noqa: ARG002
        """Return the probability, given the reply of a sample."""
        return math.exp(-float(reply))


@torch.no_grad()
def likelihood(
    model: Any, tokenizer: Any, ids: Tensor, sample: Sample, config: Settings | None
) -> Reply:
    """Return the answer's negative log-likelihood, in nats, as the text of a reply.

    The answer's tokens are given one after the other, whatever the model finds likely, and
    see the prefill's keys and values densely, as in decoding.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids: ``[1, S]`` token ids of the prompt.
        sample: whose document names the answers.
        config: settings or a profile of the prefill, None for dense.
    """
    text = " " + " ".join(sample.doc["outputs"])
    answer = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids, answer = ids.to(model.device), answer.to(model.device)
    cache, kept = DynamicCache(), None

    def run(tokens: Tensor, logits: int) -> Tensor:
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=logits)
        rows: Tensor = output.logits[0].float()
        return rows

    start = time.perf_counter()
    if config is None:
        first = run(ids, 1)
    else:
        with apply(model, config) as report:
            first = run(ids, 1)
        kept = kept_of(report, model)
    logits = torch.cat((first, run(answer, 0)[:-1]))
    loss = torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
    return Reply(
        f"{loss:.5f}", answer[0].tolist(), ids.shape[1], kept, time.perf_counter() - start
    )
