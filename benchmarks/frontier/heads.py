"""Where a model's heads look in long prompts, and what sampling costs them.

    python -m benchmarks.frontier.heads --samples samples.jsonl.gz --per-task 2 --out heads.json

The model reads each prompt densely. At every layer, queries spread over the prompt's second half
are looked at, each head's by itself:

- ``far``: the share of their attention that goes to keys out of the window.
- ``among``: how many far keys share that attention, 1 / sum(p^2) with p the shares: 1 if all of it
  goes to one key. The mean over queries, weighted by their far attention.
- ``error``: the length of the difference between dense attention's output and the output with
  samples, over the length of the dense one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.command import run_command
from benchmarks.frontier.observed import examination_parser, header, prefill_with, probabilities
from rich.console import Console
from rich.progress import track
from torch import Tensor

from token_sparse_attention import KVSamplingConfig, run, token_sparse_attention
from token_sparse_attention.attention.resolve import causal_attention
from token_sparse_attention.evaluation import generate
from token_sparse_attention.evaluation.samples import SampleSet

_QUERIES = 128


def far_attention(
    query: Tensor, key: Tensor, positions: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return each head's far share and the number of far keys that share it.

    Args:
        query: ``[H, N, D]`` some queries.
        key: ``[H_kv, S, D]`` all keys.
        positions: ``[N]`` where the queries stand.
        window: how many keys, the query's own included, are near.
        scale: of the logits.

    Returns:
        Two ``[H]`` tensors, float32.
    """
    near = torch.arange(key.shape[1], device=key.device) > positions[:, None] - window
    shares, numbers = [], []
    for shown in probabilities(query, key, positions, scale):
        p = shown.masked_fill(near, 0.0)
        far = p.sum(-1)
        number = far.square() / p.square().sum(-1).clamp_min(1e-30)
        shares.append(far.mean())
        numbers.append((far * number).sum() / far.sum().clamp_min(1e-30))
    return torch.stack(shares), torch.stack(numbers)


def observe(model: Any, ids: Tensor, config: KVSamplingConfig) -> list[dict[str, list[float]]]:
    """Return what the heads of each layer do in one dense prefill.

    Args:
        model: a causal language model on transformers' attention interface.
        ids: ``[1, S]`` token ids.
        config: the settings whose error is measured; its window is the near part.
    """
    layers: list[dict[str, list[float]]] = []
    begin, end = ids.shape[1] // 2, ids.shape[1] - config.num_probes - config.dense_queries
    positions = torch.linspace(begin, end - 1, _QUERIES).long().to(model.device)

    def observed(
        module: Any,  # noqa: ARG001
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG001
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        dense = causal_attention(query, key, value, scale=scaling)
        far, among = far_attention(
            query[0, :, positions], key[0], positions, config.sliding_window, scaling
        )
        sampled = token_sparse_attention(query, key, value, config, scale=scaling)
        exact = dense[0, :, begin:end].float()
        error = (sampled[0, :, begin:end].float() - exact).norm(dim=-1).mean(-1)
        size = exact.norm(dim=-1).mean(-1)
        found = {"far": far, "among": among, "error": error / size}
        layers.append({name: values.tolist() for name, values in found.items()})
        return dense.transpose(1, 2).contiguous(), None

    prefill_with(observed, model, ids)
    return layers


def main(argv: Sequence[str] | None = None) -> int:
    """Observe the samples that the command line names."""
    parser = examination_parser("benchmarks.frontier.heads", __doc__, num_samples=2048)
    parser.add_argument("--per-task", type=int, default=2, help="samples of each task and length")
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    samples = SampleSet.load(args.samples)
    model, tokenizer = run.load_model(args.model, device=args.device)
    config = KVSamplingConfig(
        dense_queries=0,
        sliding_window=512,
        sink_size=0,
        num_samples=args.num_samples,
        crossover="off",
    )
    content = header("frontier-heads", model, args.model, samples, config) | {"rows": []}
    taken: Counter[tuple[str, int]] = Counter()
    for sample in track(samples.samples, console=Console(stderr=True)):
        kind = (sample.task, sample.length)
        taken[kind] += 1
        if taken[kind] > args.per_task:
            continue
        ids = generate.encode(model, tokenizer, sample.prompt, sample.max_new_tokens)
        layers = observe(model, ids, config)
        facts = {"task": sample.task, "length": sample.length, "index": sample.index}
        content["rows"].append({**facts, "layers": layers})
        args.out.write_text(json.dumps(content) + "\n", encoding="utf-8")
        sharpest = [min(layer["among"]) for layer in layers]
        worst = [max(layer["error"]) for layer in layers]
        print(facts, [round(x, 1) for x in sharpest], [round(x, 2) for x in worst], flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
