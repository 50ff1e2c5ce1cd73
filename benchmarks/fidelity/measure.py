"""Divergence from dense, per answer token, of every kind of question."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from benchmarks.fidelity.model import Model
from benchmarks.fidelity.prompts import CONTINUED
from benchmarks.fidelity.variants import Variant
from torch import Tensor

KINDS = ("continue", "recall", "recall, asked first", "lookup", "second turn")
LAST = 128
"""Of a prompt, dense in every variant."""


class Asked:
    """A document's prompts, all of the same length, and dense log-probabilities of the answers."""

    def __init__(self, model: Model, prompt: dict[str, Any]) -> None:
        self.model, self.dense = model, dict[str, Tensor]()
        text = prompt["document"]
        length = len(text) - CONTINUED
        end = prompt["close"]

        def asked(question: list[int]) -> list[int]:
            whole: list[int] = text[: length - len(question)] + question
            return whole

        first = prompt["opened"][: length - len(end)] + end
        look = asked(prompt["lookup"])
        # By the name of a kind: what the cache holds, what is given, where answers begin.
        self.runs: dict[tuple[str, ...], tuple[list[int], list[int], list[tuple[int, int]]]] = {}
        key, again = prompt["key"], prompt["again"]
        after = len(key) + len(again)
        for names, whole, given, parts in (
            (("continue",), text[:length], text[length:], [(0, CONTINUED)]),
            (
                ("recall",),
                asked(prompt["question"]),
                prompt["answer"],
                [(0, len(prompt["answer"]))],
            ),
            (
                ("lookup", "second turn"),
                look,
                key + again + prompt["second"],
                [(0, len(key)), (after, after + len(prompt["second"]))],
            ),
            (("recall, asked first",), first, prompt["answer"], [(0, len(prompt["answer"]))]),
        ):
            self.runs[names] = (whole, given, parts)

    def __call__(self, variant: Variant | None) -> dict[str, Any]:
        """Run every kind under a variant and return what diverged; None: dense, kept."""
        found: dict[str, Any] = {}
        costs: list[tuple[float, float]] = []
        model = self.model
        shared: list[int] = []
        for names, (whole, given, parts) in self.runs.items():
            start = len(whole) - LAST
            if variant is not None and not variant.block:
                _, costs = model.run(self._on(whole), 0, variant, LAST)
            elif shared[:start] != whole[:start]:
                _, costs = model.run(self._on(whole[:start]), 0, variant)
                shared = whole
            hidden, _ = model.run(self._on(whole[start:] + given[:-1]), start)
            for name, (low, high) in zip(names, parts):
                log = model.log_probabilities(hidden[LAST - 1 + low : LAST - 1 + high])
                answer = self._on(given[low:high])
                loss = -log.gather(1, answer[:, None]).mean()
                if variant is None:
                    self.dense[name] = log
                    found[name] = {"loss": loss}
                    continue
                dense = self.dense[name]
                apart = (dense.exp() * (dense - log)).sum(-1)
                same = (dense.argmax(-1) == log.argmax(-1)).float().mean()
                found[name] = {
                    "kl": apart.mean(), "most": apart.max(), "agreement": same, "loss": loss
                }  # fmt: skip
        done = {k: {n: float(x) for n, x in v.items()} for k, v in found.items()}
        if costs:
            sparse = len(costs) / model.layers
            for i, name in enumerate(("pairs", "scoring")):
                share = sum(c[i] for c in costs) / len(costs)
                done.setdefault("cost", {})[name] = share * sparse + (1 - sparse) * (i == 0)
        return done

    def _on(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self.model.device)


@torch.no_grad()
def measure(
    model: Model,
    prompts: Sequence[dict[str, Any]],
    which: Sequence[int],
    variants: Sequence[Variant],
) -> Iterator[dict[str, Any]]:
    """Yield a record of each variant and document, a variant after the other.

    Args:
        model: whose cache holds a prompt and its answers.
        prompts: all documents.
        which: the ones to measure.
        variants: in order of importance.
    """
    documents = {i: Asked(model, prompts[i]) for i in which}
    for variant in (None, *variants):
        for i, asked in documents.items():
            start = time.perf_counter()
            try:
                kinds = asked(variant)
            except torch.OutOfMemoryError as error:
                yield {"variant": variant and variant.name, "document": i, "failed": str(error)}
                continue
            yield {
                "variant": "dense" if variant is None else variant.name,
                "document": i,
                "code": prompts[i]["code"],
                "seconds": time.perf_counter() - start,
                "kinds": kinds,
            }
