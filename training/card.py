"""Write the model card from the measured results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import sparsity
from .evaluate import show

RESULTS = Path(__file__).parent / "results"

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

<!-- Written by `python -m training.card` from training/results/*.json. -->

# The bundled retrieval model

A small stock `LlamaForCausalLM`, made from scratch for this library: it finds facts in a long
text and says them. It exists so that the demo and the accuracy tests run anywhere, with no
download. It is no general language model: it was trained for the question forms below.

| | |
|---|---|
| parameters | {parameters:,} (input and output embeddings tied, counted once) |
| shape | {num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} query heads and \
{num_key_value_heads} KV heads of {head_dim}, MLP {intermediate_size} |
| vocabulary | {vocab_size}, byte-level BPE, one token per digit |
| positions | RoPE, theta {rope_theta:,.0f}; \
`max_position_embeddings` {max_position_embeddings:,} |
| weights | bfloat16, {megabytes:.1f} MB |
| trained on | {tokens:,.0f} million tokens, {steps:,} steps, {minutes:.1f} minutes \
on one {device} |

## Prompts

The tokenizer adds no BOS token (there is none), the model was trained without one, and there is
no chat template. `<|endoftext|>` ends an answer. Two forms were trained:

- `document + "\\n\\n" + question + "\\n"`; the model writes the whole sentence, such as
  `The special magic number for amber-falcon mentioned in the provided text is 4839201.`
- RULER's form as lm-evaluation-harness joins it: introduction, text, question, a space, and the
  start of the answer; the model writes the rest.

Needles have RULER's form, `One of the special magic numbers for amber-falcon is: 4839201.`, on
lines of their own, with or without a mark such as `[needle 3]`, or inside a paragraph.

## Measured

Share of {samples} held-out questions per cell whose answer greedy decoding writes exactly (for
several values: all of them, in the order of the text), by context length in tokens;
{dtype}, dense attention. The haystacks are pages that were kept out of training; keys, values and
seeds are new. `marked` is the first prompt form with six marked lines, and there the whole
sentence and its end have to be right. The other rows have RULER's forms.

{table}

## Sparse prefill

`{profile_file}` holds the settings that `tsa run` and `tsa demo` use for
this model: windowed fallback in all layers. The table counts right answers to the same
{sparse_samples} questions per task and length ({sparse_tasks}),
generated one at a time on one {sparse_device} in {sparse_dtype}, by context
length in tokens, with 95% intervals. `published` is the paper's rule with its own settings, in all
layers. Small samples, meant to show that the settings work on this model; they say nothing about
others.

{sparse_table}

## Limits

- Contexts above {longest:,} tokens were not measured here.
- Only RULER's wordings of needles and questions were trained.
- With several values for one key, the order or one of the values is sometimes wrong.

## Recipe

`python -m training --out DIR` trains such a model; `training/README.md` describes how. AdamW, peak
learning rate 2e-3, bfloat16 compute with float32 weights, 262,144 tokens a step, row length
growing from 256 to {longest_row:,} tokens, positions of most rows spread over up to 140,000.

## Data and licences

The text is the prose of documentation packages of Debian 12; the words of the keys are
WordNet's adjectives and nouns that also stand in the American word list. Nothing else was used:
numbers, UUIDs, needles and questions are generated. The demo document's page
(`howtocorrupt.html` of `sqlite3-doc`) and about one page in thirty were held out.

| package | version | licence |
|---|---|---|
{sources}
"""


def make_card(scores: Path, training: Path, sparse: Path, model: Path) -> str:
    """The card's text, from result files and the model folder."""
    paired = json.loads(sparse.read_text("utf-8"))
    measured = json.loads(scores.read_text("utf-8"))
    trained = json.loads(training.read_text("utf-8"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    lengths = [int(length) for length in next(iter(measured["right"].values()))]
    sources = [f"| {s['package']} | {s['version']} | {s['licence']} |" for s in trained["sources"]]
    return _CARD.format(
        **{**config, **measured},
        megabytes=(model / "model.safetensors").stat().st_size / 1e6,
        tokens=sum(run["tokens"] for run in trained["runs"]) / 1e6,
        steps=sum(run["steps"] for run in trained["runs"]),
        minutes=sum(run["seconds"] for run in trained["runs"]) / 60,
        device=trained["runs"][-1]["device"],
        longest_row=max(run["longest_row"] for run in trained["runs"]),
        table=show(measured),
        profile_file=sparsity.PROFILE_FILE,
        sparse_samples=paired["samples"],
        sparse_tasks=", ".join(paired["results"]["dense"]["right"]),
        sparse_dtype=paired["dtype"],
        sparse_device=paired["device"],
        sparse_table=sparsity.show(paired),
        longest=max(lengths),
        sources="\n".join(sources),
    )


def main() -> None:
    """Write README.md into a model folder."""
    parser = argparse.ArgumentParser(
        prog="python -m training.card",
        description="Write a model folder's README.md from result files.",
        epilog="example: python -m training.card --model src/token_sparse_attention/bundled/model",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--scores", type=Path, default=RESULTS / "scores.json")
    parser.add_argument("--training", type=Path, default=RESULTS / "training.json")
    parser.add_argument("--sparsity", type=Path, default=RESULTS / "sparsity.json")
    args = parser.parse_args()
    card = make_card(args.scores, args.training, args.sparsity, args.model)
    (args.model / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
