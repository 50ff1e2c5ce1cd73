"""Where in a long prompt, and in which heads, a layer's error costs the right answer.

    python -m benchmarks.frontier.positions --samples samples.jsonl.gz --layer 6 --out result.jsonl

One layer attends sparsely in some places only, and exactly in all others; every other layer is
dense. The places are the sentences that hold the answer, everything else, the parts of such a
sentence, and one head at a time. For each the answer's negative log-likelihood is measured, in
nats. Beside it, where all layers' heads look from those sentences in a dense prefill, as shares
of their attention:

- ``own``: within the sentence, ``near``: otherwise within the window, ``far``: before it.
- ``same``: on tokens before the sentence that are the same as the query's.
- ``after``: on tokens that follow such a one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.command import run_command
from benchmarks.frontier.answers import likelihood
from benchmarks.frontier.observed import attending, examination_parser, header, probabilities
from rich.console import Console
from rich.progress import track
from torch import Tensor

from token_sparse_attention import KVSamplingConfig, run, token_sparse_attention
from token_sparse_attention.attention.resolve import causal_attention
from token_sparse_attention.evaluation import generate
from token_sparse_attention.evaluation.samples import Sample, SampleSet

# Sentences that may hold an answer, which is one of their groups.
_SENTENCES = {
    "niah_multikey_3": re.compile(r"special magic \w+ for (?P<name>\S+) is: (?P<answer>\S+)\."),
    "ruler_vt": re.compile(r"VAR (?P<answer>\w+) = (?P<name>(VAR )?\w+)"),
}

Places = Mapping[str, Tensor]


def find_places(text: str, offsets: Tensor, task: str, answers: list[str]) -> Places:
    """Return the tokens ``[S]``, bool, of the answers' sentences, and of their parts.

    Args:
        text: the prompt.
        offsets: ``[S, 2]`` where each token begins and ends in it.
        task: one of those whose sentences are known.
        answers: the right answers.

    Raises:
        ValueError: if an answer is in no sentence, or the task is not known.
    """
    if task not in _SENTENCES:
        raise ValueError(f"task must be one of {', '.join(_SENTENCES)}; got {task!r}")
    places = {
        name: torch.zeros(len(offsets), dtype=torch.bool)
        for name in ("sentence", "name", "answer")
    }
    found = set()
    for match in _SENTENCES[task].finditer(text):
        if match["answer"] not in answers:
            continue
        found.add(match["answer"])
        for name, tokens in places.items():
            begin, end = match.span() if name == "sentence" else match.span(name)
            tokens |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
    if found != set(answers):
        raise ValueError(f"answers must stand in sentences, but {set(answers) - found} do not")
    return places


def choose_variants(places: Places, num_heads: int, every_head: bool) -> dict[str, Tensor]:
    """Return in which heads and at which tokens the layer is sparse, ``[H, S]`` bool, by name."""
    heads = torch.ones(num_heads, 1, dtype=torch.bool)
    sentence = places["sentence"]
    variants = {
        "everywhere": heads & torch.ones_like(sentence),
        "elsewhere": heads & ~sentence,
        **{name: heads & tokens for name, tokens in places.items()},
    }
    if every_head:
        for head in range(num_heads):
            alone = torch.zeros_like(heads)
            alone[head] = True
            variants[f"head {head}"] = alone & torch.ones_like(sentence)
    return variants


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  nothing is padded
    scaling: float,
    *,
    layer: int,
    sparse: Tensor,
    config: KVSamplingConfig,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend exactly, but in one layer's prefill sparsely where ``sparse[H, S]`` says so."""
    out = causal_attention(query, key, value, scale=scaling)
    if module.layer_idx == layer and query.shape[2] == sparse.shape[1] and sparse.any():
        sampled = token_sparse_attention(query, key, value, config, scale=scaling)
        out = torch.where(sparse.to(out.device)[None, :, :, None], sampled, out)
    return out.transpose(1, 2).contiguous(), None


def look(
    query: Tensor, key: Tensor, ids: Tensor, places: Places, scale: float, window: int
) -> dict[str, list[float]]:
    """Return where each head's queries in the sentences look, as shares of their attention.

    Args:
        query: ``[H, S, D]``.
        key: ``[H_kv, S, D]``.
        ids: ``[S]`` the tokens.
        places: of the sentences.
        scale: of the logits.
        window: how many keys, the query's own included, are near.
    """
    sentence = places["sentence"].to(ids.device)
    queries = sentence.nonzero()[:, 0]
    place = torch.arange(len(ids), device=ids.device)
    # The sentence of a query: the run of marked tokens that it is in.
    number = (sentence.int().diff(prepend=ids.new_zeros(1)) > 0).cumsum(0)
    own = sentence & (number == number[queries][:, None])
    same = (ids == ids[queries][:, None]) & ~own
    after = same.roll(1, -1) & ~own
    after[:, 0] = False
    near = (place > queries[:, None] - window) & ~own
    kinds = {"own": own, "near": near, "far": ~near & ~own, "same": same, "after": after}
    shares: dict[str, list[float]] = {name: [] for name in kinds}
    for p in probabilities(query[:, queries], key, queries, scale):
        for name, tokens in kinds.items():
            shares[name].append(float((p * tokens).sum(-1).mean()))
    return shares


def examine(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    layers: list[int],
    config: KVSamplingConfig,
    *,
    every_head: bool,
) -> dict[str, Any]:
    """Return the nats of each layer's variants, and where the heads of all layers look."""
    ids = generate.encode(model, tokenizer, sample.prompt, sample.max_new_tokens)
    encoded = tokenizer(sample.prompt, return_offsets_mapping=True)
    if encoded["input_ids"] != ids[0].tolist():
        raise ValueError("prompts must fit the model's context whole")
    ids = ids.to(model.device)
    offsets = torch.tensor(encoded["offset_mapping"])
    places = find_places(sample.prompt, offsets, sample.task, sample.doc["outputs"])
    looks: list[dict[str, list[float]]] = []

    def watched(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] == ids.shape[1]:
            looks.append(look(query[0], key[0], ids[0], places, scaling, config.sliding_window))
        nothing = places["sentence"][:0]
        return attention(
            module, query, key, value, mask, scaling, layer=-1, sparse=nothing, config=config
        )

    def nats(function: Callable[..., tuple[Tensor, None]]) -> float:
        with attending(function, model):
            return float(likelihood(model, tokenizer, ids, sample, None).text)

    dense = nats(watched)
    variants = choose_variants(places, model.config.num_attention_heads, every_head=every_head)
    of_layer = {
        layer: {
            name: nats(partial(attention, layer=layer, sparse=sparse, config=config))
            for name, sparse in variants.items()
        }
        for layer in layers
    }
    facts = {"task": sample.task, "length": sample.length, "index": sample.index}
    return {**facts, "dense": dense, "layers": of_layer, "looks": looks}


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the samples that the command line names."""
    parser = examination_parser("benchmarks.frontier.positions", __doc__, num_samples=4096)
    parser.add_argument("--task", choices=_SENTENCES, default="niah_multikey_3")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--layer", type=int, action="append", required=True, help="one or more")
    parser.add_argument("--every-head", action="store_true", help="also one head at a time")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th sample, from the I-th on")
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    samples = SampleSet.load(args.samples)
    model, tokenizer = run.load_model(args.model, device=args.device)
    config = KVSamplingConfig(num_samples=args.num_samples, crossover="off")
    about = header("frontier-positions", model, args.model, samples, config)
    first, step = map(int, args.part.split("/"))
    chosen = [one for one in samples.samples if (one.task, one.length) == (args.task, args.length)]
    with args.out.open("w", encoding="utf-8") as file:
        print(json.dumps(about), file=file, flush=True)
        for sample in track(chosen[first::step], console=Console(stderr=True)):
            row = examine(model, tokenizer, sample, args.layer, config, every_head=args.every_head)
            print(json.dumps(row), file=file, flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
