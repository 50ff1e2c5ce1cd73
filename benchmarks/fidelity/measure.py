"""Divergence from dense, per answer token, of every shape of prompt of `tsa fidelity`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from benchmarks.fidelity.model import Model
from benchmarks.fidelity.variants import Variant
from torch import Tensor

from token_sparse_attention.fidelity.measure import compare
from token_sparse_attention.fidelity.prompts import Prompt

LAST = 128
"""Of a prompt, dense in every variant."""


class Asked:
    """The prompts of a piece of text, and dense log-probabilities of what follows them."""

    def __init__(self, model: Model, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, prompts
        self.dense: list[Tensor] = []

    def __call__(self, variant: Variant | None) -> dict[str, Any]:
        """Run every prompt under a variant and return what diverged; None: dense, kept."""
        found: dict[str, Any] = {}
        costs: list[tuple[float, float]] = []
        for number, prompt in enumerate(self.prompts):
            log, costs = self._predictions(prompt, variant)
            if variant is None:
                self.dense.append(log)
            for shape, begin, end in prompt.parts:
                rows = slice(begin, end)
                one = compare(self.dense[number][rows], log[rows], prompt.follow[rows])
                found[shape] = {
                    "kl": fmean(one.divergence),
                    "most": max(one.divergence),
                    "agreement": fmean(one.agreement),
                    "loss": fmean(one.loss),
                }
        if costs:
            sparse = len(costs) / self.model.layers
            for i, name in enumerate(("pairs", "scoring")):
                share = sum(c[i] for c in costs) / len(costs)
                found.setdefault("cost", {})[name] = share * sparse + (1 - sparse) * (i == 0)
        return found

    def _predictions(
        self, prompt: Prompt, variant: Variant | None
    ) -> tuple[Tensor, list[tuple[float, float]]]:
        """Return log-probabilities of what follows, and the cost of each sparse layer."""
        hidden, costs = self.model.run(self._on(prompt.ids), 0, variant, LAST)
        after, _ = self.model.run(self._on(prompt.follow[:-1]), len(prompt.ids))
        return self.model.log_probabilities(torch.cat((hidden[-1:], after))), costs

    def _on(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self.model.device)


@torch.no_grad()
def measure(
    model: Model, pieces: Mapping[int, Sequence[Prompt]], variants: Sequence[Variant]
) -> Iterator[dict[str, Any]]:
    """Yield a record of each variant and piece, a variant after the other.

    Args:
        model: whose cache holds a prompt and what follows.
        pieces: the prompts of each piece of text, by its number.
        variants: in order of importance.
    """
    documents = {number: Asked(model, prompts) for number, prompts in pieces.items()}
    for variant in (None, *variants):
        name = "dense" if variant is None else variant.name
        for number, asked in documents.items():
            start = time.perf_counter()
            try:
                kinds = asked(variant)
            except torch.OutOfMemoryError as error:
                yield {"variant": name, "document": number, "failed": str(error)}
                continue
            seconds = time.perf_counter() - start
            source = asked.prompts[0].source
            yield {"variant": name, "document": number, "source": source,
                   "seconds": seconds, "kinds": kinds}  # fmt: skip
