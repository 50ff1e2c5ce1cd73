"""vLLM under several loads, dense and sparse, on a model with random weights.

    python -m benchmarks.serving.loads --out benchmarks/results/serving/loads-h200.json

One prompt at a time, at several sizes of a step; several at once; and prompts that share a cached
prefix. Each request's first token and all tokens after it are timed. Prompts are random tokens.
Prefix caching is on, as vLLM has it. An engine is started once and its scheduler is told how many
tokens a step may have. ``--mode decode-graphs`` records CUDA graphs for decoding and compiles no
layers, which starts sooner than vLLM's default. Results are written after each measurement.

Without a GPU: ``--model tiny --device cpu --lengths 1024 2048 --chunks 512 256 --mode eager
--together 2 --prefix 1024 --question 64``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, run_command
from benchmarks.serving.engines import (
    DEFAULT,
    DENSE,
    DTYPE,
    MODELS,
    Setting,
    attention_of,
    config_of,
    counts_since,
    prepare_process,
    random_prompt,
    serve,
    start_engine,
    vllm_version,
)

from token_sparse_attention.info import provenance

MODES = ("eager", "decode-graphs", "default")
_WARM_UP = 9000  # seeds: of prompts that are not timed, of several at once, of a shared prefix
_TOGETHER = 5000
_PREFIX = 7000


@dataclass(frozen=True)
class Plan:
    """What every engine is asked.

    Attributes:
        model: a key of `MODELS`.
        device: ``"cuda"`` or ``"cpu"``.
        cache: type of the numbers in the cache, ``"auto"`` for the model's.
        mode: one of `MODES`; ``"default"`` is vLLM's.
        block_size: tokens of a block of the cache.
        lengths: of prompts that are alone, in tokens, in the order they are timed.
        chunks: most tokens of a step; the first is timed with everything, others with prompts
            that are alone.
        repetitions: timed prompts of each length and chunk.
        decode: tokens after the first, with the first chunk.
        together: requests at once, each as long as the shortest of `lengths`; 0 for none.
        prefix: tokens of a shared prefix; 0 for none.
        question: tokens after it, of each prompt.
        questions: prompts that find the prefix in the cache.
    """

    model: str
    device: str
    cache: str
    mode: str
    block_size: int
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    repetitions: int
    decode: int
    together: int
    prefix: int
    question: int
    questions: int


@dataclass(frozen=True)
class Row:
    """One load of one engine.

    Attributes:
        setting: ``"dense"`` or a sparse one.
        load: ``"alone"``, ``"together"``, ``"prefix cold"`` or ``"prefix warm"``.
        chunk: most tokens of a step.
        prompt_tokens: length of each prompt.
        cached_tokens: of each prompt, found in the cache.
        first: seconds from a request to its first token, of each request.
        seconds: until the last token of all; requests that are alone follow each other.
        token_ms: milliseconds from each token to the next of its request.
        kept: see `engines.Counts`, as the ones after it.
        layer_calls_sparse: calls that dropped tokens.
        layer_calls_dense: calls that found nothing to drop.
        dense_reasons: why prompts or chunks ran dense.
    """

    setting: str
    load: str
    chunk: int
    prompt_tokens: int
    cached_tokens: list[int]
    first: list[float]
    seconds: float
    token_ms: list[float]
    kept: float
    layer_calls_sparse: int
    layer_calls_dense: int
    dense_reasons: dict[str, int]


def start(plan: Plan, name: str) -> Any:
    """Return an engine of one setting."""
    room = plan.decode + 16
    longest = max([*plan.lengths, plan.prefix + plan.question]) + room
    modes: dict[str, dict[str, Any]] = {
        "eager": {"enforce_eager": True},
        "decode-graphs": {
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 2, 4, 8],
            }
        },
        "default": {},
    }
    return start_engine(
        plan.model,
        Setting(None if name == DENSE else config_of(name)),
        longest,
        max(longest, plan.together * (min(plan.lengths) + room)) + 16 * plan.block_size,
        max_num_batched_tokens=max(plan.chunks),
        max_num_seqs=max(plan.together, 4),
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=plan.block_size,
        kv_cache_dtype=plan.cache,
        **modes[plan.mode],
    )


class Bench:
    """One engine that is timed.

    Args:
        plan: what it is asked.
        name: its setting.
        send: takes each row.
    """

    def __init__(self, plan: Plan, name: str, send: Callable[[Any], None]) -> None:
        began = time.perf_counter()
        self.plan, self.name, self.send = plan, name, send
        self.engine = start(plan, name)
        self.chunk = max(plan.chunks)
        (attention,) = self.engine.apply_model(attention_of)
        ready = round(time.perf_counter() - began, 1)
        send({"start_seconds": ready, "attention": attention})

    def run(self) -> None:
        """Time everything, in the order of importance."""
        plan = self.plan
        for chunk in plan.chunks:
            first = chunk == plan.chunks[0]
            self.limit(chunk)
            serve(self.engine, [self.prompt(min(plan.lengths), _WARM_UP + chunk)], 4)
            for tokens in plan.lengths:
                self.alone(tokens, 1 + plan.decode * first)
            if first and plan.together:
                self.together()
            if first and plan.prefix:
                self.prefix()

    def limit(self, chunk: int) -> None:
        """Let a step have at most so many tokens."""
        self.chunk = chunk
        core = self.engine.llm_engine.engine_core.engine_core
        core.scheduler.max_num_scheduled_tokens = chunk

    def prompt(self, tokens: int, seed: int) -> list[int]:
        """Return random tokens; no two calls with different arguments begin alike."""
        return random_prompt(self.plan.model, tokens, seed * 1_000_003 + tokens)

    def alone(self, tokens: int, reply: int) -> None:
        """Time prompts of one length, one after the other."""
        prompts = [self.prompt(tokens, self.chunk + seed) for seed in range(self.plan.repetitions)]
        self.timed("alone", tokens, [[one] for one in prompts], reply)

    def together(self) -> None:
        """Time several prompts at once."""
        tokens = min(self.plan.lengths)
        prompts = [self.prompt(tokens, _TOGETHER + seed) for seed in range(self.plan.together)]
        self.timed("together", tokens, [prompts], 1 + self.plan.decode)

    def prefix(self) -> None:
        """Time a prompt, and others that share its beginning, which is then in the cache."""
        plan = self.plan
        prefix = self.prompt(plan.prefix, _PREFIX)
        cold, *warm = (
            [[*prefix, *self.prompt(plan.question, _PREFIX + 1 + seed)]]
            for seed in range(1 + plan.questions)
        )
        tokens = plan.prefix + plan.question
        self.timed("prefix cold", tokens, [cold], 1 + plan.decode)
        self.timed("prefix warm", tokens, warm, 1 + plan.decode)

    def timed(self, load: str, tokens: int, groups: list[list[list[int]]], reply: int) -> None:
        """Time groups of prompts that are sent at once, one group after the other."""
        _, before = counts_since()
        served = [serve(self.engine, group, reply) for group in groups]
        counts, _ = counts_since(before)
        every = [one for group in served for one in group]
        gaps = [b - a for one in every for a, b in itertools.pairwise(one.times)]
        self.send(
            Row(
                self.name,
                load,
                self.chunk,
                tokens,
                [one.cached for one in every],
                [round(one.times[0], 4) for one in every],
                round(sum(max(one.times[-1] for one in group) for group in served), 4),
                [round(1e3 * gap, 3) for gap in gaps],
                *counts,
            )
        )


def _measure(plan: Plan, name: str, pipe: Connection) -> None:
    """Time one engine, in a process of its own: it gives its memory back when that ends."""
    try:
        Bench(plan, name, pipe.send).run()
    except Exception:
        pipe.send({"error": traceback.format_exc()})
        raise
    finally:
        pipe.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    parser = make_parser("benchmarks.serving.loads", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--settings", nargs="+", default=[DENSE, DEFAULT], metavar="NAME")
    parser.add_argument("--cache", default="auto", help="vLLM's kv_cache_dtype")
    parser.add_argument("--mode", choices=MODES, default="decode-graphs")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a cache's block")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 65536])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16384, 2048, 8192])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--decode", type=int, default=32, help="tokens after the first")
    parser.add_argument("--together", type=int, default=8, help="requests at once")
    parser.add_argument("--prefix", type=int, default=102400, help="tokens that prompts share")
    parser.add_argument("--question", type=int, default=512, help="tokens after these")
    parser.add_argument("--questions", type=int, default=3, help="prompts with a cached prefix")
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    asked = {field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)}
    plan = Plan(**asked | {"lengths": tuple(args.lengths), "chunks": tuple(args.chunks)})
    prepare_process()
    context = multiprocessing.get_context("spawn")
    source = provenance(plan.device)
    source["versions"]["vllm"] = vllm_version()
    settings = [name for name in args.settings if name != DENSE]
    content: dict[str, Any] = {
        "kind": "vllm-loads",
        **dataclasses.asdict(plan),
        **source,
        "shape": MODELS[plan.model],
        "dtype": DTYPE,
        "settings": {name: config_of(name).to_dict() for name in settings},
        "engines": {},
        "rows": [],
    }
    for name in args.settings:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(plan, name, theirs))
        process.start()
        theirs.close()
        engine = content["engines"][name] = {}
        while True:
            try:
                said = ours.recv()
            except EOFError:
                break
            if isinstance(said, Row):
                content["rows"].append(dataclasses.asdict(said))
            else:
                engine.update(said)
            args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            print(said, flush=True)
        process.join()
    return not any("error" in engine for engine in content["engines"].values())


if __name__ == "__main__":
    sys.exit(main())
