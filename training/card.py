"""Write the model card from the measured results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open

from token_sparse_attention.evaluation.record import DENSE, EvalResults, load_results
from token_sparse_attention.evaluation.summary import Row, summarise
from token_sparse_attention.methods import method_of
from token_sparse_attention.profile import PROFILE_FILE, LayerProfile

RESULTS = Path(__file__).parent / "results"
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results"
PROFILE = "profile"  # what results call the shipped profile

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

<!-- Written by `python -m training.card` from training/results. -->

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

RULER as lm-evaluation-harness {lm_eval} makes and scores it; greedy replies, {dtype}, dense
attention. Mean score, and the number of samples in brackets, by context length in tokens: all
dense replies in the results of training, token selection and patterns, each sample once.
Their seeds are {seeds}, the device was one {devices}.
Training used neither these seeds nor this code. The numbers of samples differ because most runs
lasted for a fixed time.

{table}

## Sparse prefill

The difference to dense has a 95% interval; work is the share of dense attention's
pairs of a query and a key, those of the window included.

`{profile_file}` holds the settings that `tsa run` uses for this model: no queries
dropped, a window of {window:,} tokens and up to {most_samples:,} keys sampled by score, and of all
heads only {dense_heads} dense. Such sizes are for long prompts. Short ones
run dense, as sparse would not be faster; on a GPU, prompts of up to {crossover} tokens do. `tsa
demo`, whose document is short, takes a sixteenth of all sizes.

The paper's rule in all layers, `published`, on other samples of five of these tasks, those on
which dense reaches 0.5:

{profile_table}

Other settings of all layers, on samples of seed {seed}: the numbers are their
`drop_mass`, queries are dropped, and what they receive instead is a window of 512 tokens. These
settings were not chosen for this model, and no layer was left out: at long contexts all of them
lose answers.

{sparse_table}

## Limits

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


def make_card(
    ruler: Path, training: Path, model: Path, confirmed: Sequence[Path], others: Sequence[Path]
) -> str:
    """The card's text, from result files and the model folder.

    Args:
        ruler: results of several settings.
        training: what `python -m training` wrote.
        model: the folder.
        confirmed: results with the published rule, or with the shipped profile.
        others: results whose dense replies count too.
    """
    measured = load_results(ruler)
    header, rows = measured.header, summarise(measured)
    with_profile = [load_results(path) for path in confirmed]
    rounds = [measured, *with_profile, *(load_results(path) for path in others)]
    trained = json.loads(training.read_text("utf-8"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    profile = LayerProfile.from_json((model / PROFILE_FILE).read_text("utf-8"))
    samples = [changes.get("num_samples", 0) for changes in profile.layers.values()]
    return _CARD.format(
        **{**config, **header.arguments},
        parameters=_count_parameters(model / "model.safetensors"),
        megabytes=(model / "model.safetensors").stat().st_size / 1e6,
        tokens=sum(run["tokens"] for run in trained["runs"]) / 1e6,
        steps=sum(run["steps"] for run in trained["runs"]),
        minutes=sum(run["seconds"] for run in trained["runs"]) / 60,
        device=trained["runs"][-1]["device"],
        longest_row=max(run["longest_row"] for run in trained["runs"]),
        lm_eval=header.provenance["versions"]["lm-eval"],
        seeds=_listed(str(one.header.arguments["seed"]) for one in rounds),
        devices=_listed((one.header.provenance["device"] for one in rounds), "or"),
        table=_dense_table(rounds),
        profile_file=PROFILE_FILE,
        window=profile.base.sliding_window,
        most_samples=max(samples),
        dense_heads=_dense_heads(profile),
        crossover=_crossover(profile, config),
        profile_table=_profile_table(with_profile, profile),
        sparse_table=_sparse_table(rows),
        sources=_source_table(trained["runs"]),
    )


def _dense_heads(profile: LayerProfile) -> str:
    return " and ".join(
        f"head {head} of layer {layer}"
        for layer, changes in sorted(profile.layers.items())
        for head in changes.get("dense_heads", ())
    )


def _crossover(profile: LayerProfile, config: dict[str, Any]) -> str:
    """Up to how many tokens a prompt runs dense in some of the model's layers on a GPU."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    shortest = [
        method_of(one).gate(torch.device("cuda"), heads, head_dim).shortest_prompt or 0
        for one in profile.layer_configs(config["num_hidden_layers"]).values()
    ]
    return f"{max(shortest) - 1:,}"


def _count_parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


def _source_table(runs: Sequence[dict[str, Any]]) -> str:
    """One line per package, with the versions that the runs read."""
    versions: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        for source in run["sources"]:
            package = versions.setdefault((source["package"], source["licence"]), {})
            package[source["version"]] = None
    return "\n".join(
        f"| {package} | {', '.join(found)} | {licence} |"
        for (package, licence), found in versions.items()
    )


def _listed(words: Iterable[str], last: str = "and") -> str:
    """Each once, as in "11, 23 and 37"."""
    *before, end = sorted(set(words))
    return f"{', '.join(before)} {last} {end}" if before else end


def _dense_table(rounds: Sequence[EvalResults]) -> str:
    """Mean dense score by task and length; a sample is told apart by its seed and number."""
    scores: dict[tuple[str, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for results in rounds:
        seed = results.header.arguments["seed"]
        for one in results.samples:
            if one.configuration == DENSE and one.score is not None:
                scores[one.task, one.length][seed, one.index] = one.score
    lengths = sorted({length for _, length in scores})
    lines = ["| task | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for task in sorted({task for task, _ in scores}):
        found = [scores.get((task, length), {}).values() for length in lengths]
        cells = [f"{fmean(one):.2f} ({len(one)})" if one else "-" for one in found]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sparse_table(rows: Sequence[Row]) -> str:
    lines = ["| length | settings | samples | score | difference | tokens kept | work |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        if row.task is None and row.length and row.score is not None:
            difference = "-"
            if row.difference is not None:
                interval = f"{row.difference_low:+.3f} to {row.difference_high:+.3f}"
                difference = f"{row.difference:+.3f} ({interval})"
            lines.append(
                f"| {row.length} | {row.configuration} | {row.pairs} | {row.score:.3f} | "
                f"{difference} | {row.kept_share:.0%} | {row.work:.3f} |"
            )
    return "\n".join(lines)


def _profile_table(rounds: Sequence[EvalResults], profile: LayerProfile) -> str:
    """The shipped profile and the published rule, each beside its dense replies."""
    rows: list[Row] = []
    for results in rounds:
        names = {"published": "published"}
        settings = results.header.configurations.get(PROFILE)
        if settings is not None:
            measured = LayerProfile.from_json(json.dumps(settings))
            base = dataclasses.replace(measured.base, crossover=profile.base.crossover)
            if LayerProfile(base, measured.layers) != profile:
                raise ValueError(f"{PROFILE} must be the shipped profile, got {settings}")
            names[PROFILE] = "profile"
        rows += [
            dataclasses.replace(row, configuration=names[row.configuration])
            for row in summarise(results)
            if row.configuration in names
        ]
    return _sparse_table(sorted(rows, key=lambda row: (row.length or 0, row.configuration)))


def main() -> None:
    """Write README.md into a model folder."""
    parser = argparse.ArgumentParser(
        prog="python -m training.card",
        description="Write a model folder's README.md from result files.",
        epilog="example: python -m training.card --model src/token_sparse_attention/bundled/model",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--ruler", type=Path, default=RESULTS / "ruler.jsonl.gz")
    parser.add_argument(
        "--confirmed",
        type=Path,
        nargs="*",
        help=f"results with the published rule, or the shipped profile as {PROFILE}",
    )
    parser.add_argument(
        "--others", type=Path, nargs="*", help="results whose dense replies count too"
    )
    parser.add_argument("--training", type=Path, default=RESULTS / "training.json")
    args = parser.parse_args()
    confirmed = args.confirmed or sorted((MEASURED / "selection" / "bundled").glob("*.jsonl.gz"))
    others = args.others or [
        *sorted((MEASURED / "patterns").glob("*.jsonl.gz")),
        *sorted(RESULTS.glob("cwe-*.jsonl.gz")),
    ]
    card = make_card(args.ruler, args.training, args.model, confirmed, others)
    (args.model / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
