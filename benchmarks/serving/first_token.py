"""Time to the first token in vLLM, dense and sparse, on a model with random weights.

    python -m benchmarks.serving.first_token --out benchmarks/results/serving/first-token.json

Prompts are random tokens, each processed in one step or, with ``--chunk``, in several, without a
prefix cache. Every engine has a process of its own. Random weights attend almost evenly, so a
drop_mass drops about that share of the tokens, whatever the length; what was kept is in the
result. How good answers are can't be seen here. Prompts too short to run sparse must get the dense
engine's answer, to the bit. ``--graphs`` is what vLLM does unless told otherwise: it compiles the
model and records CUDA graphs; ``--decode`` measures the tokens after the first.

Without a GPU: ``--model tiny --device cpu --lengths 1024 2048 --repetitions 2``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, run_command
from benchmarks.serving.engines import (
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

WARM_UPS = 1  # of each length; the first compiles kernels
SHORT = (97, 300)  # prompt lengths that are never sparse


@dataclass(frozen=True)
class Plan:
    """What every engine is asked.

    Attributes:
        model: a key of `MODELS`.
        device: ``"cuda"`` or ``"cpu"``.
        lengths: of the timed prompts, in tokens.
        repetitions: timed prompts of each length.
        impl: which code scores and selects.
        attention_backend: which kernel attends in sparse layers.
        graphs: whether vLLM compiles the model and records CUDA graphs.
        chunk: most tokens of a step; 0 for whole prompts.
        decode: tokens after the first to time at the longest length, and to compare on short
            prompts.
    """

    model: str
    device: str
    lengths: tuple[int, ...]
    repetitions: int
    impl: str
    attention_backend: str
    graphs: bool
    chunk: int
    decode: int


@dataclass(frozen=True)
class Row:
    """One engine at one prompt length.

    Attributes:
        setting: ``"dense"``, or ``"drop_mass=N"`` or ``"num_samples=N"``.
        prompt_tokens: length of the prompts.
        seconds: from a request to its first token, of each repetition.
        median: of these.
        kept: share of tokens that sparse layers kept, of those their heads could see.
        layer_calls_sparse: calls of layers, of all repetitions, that dropped tokens.
        layer_calls_dense: calls of layers that were to run sparse, but found nothing to drop.
        dense_reasons: why prompts of a sparse engine ran dense, if they did.
    """

    setting: str
    prompt_tokens: int
    seconds: list[float]
    median: float
    kept: float
    layer_calls_sparse: int
    layer_calls_dense: int
    dense_reasons: dict[str, int]


@dataclass(frozen=True)
class Engine:
    """What one engine did.

    Attributes:
        start_seconds: until it was ready, imports included.
        attention: the class of its attention layers, and vLLM's version of FlashAttention.
        rows: one for each length.
        answers: the likeliest tokens at each place of the reply to each prompt of `SHORT`, and
            their logarithms.
        decode_ms: milliseconds from each token to the next, after a prompt of the longest
            length; empty if they were not timed.
    """

    start_seconds: float
    attention: str
    rows: list[Row]
    answers: list[list[list[tuple[int, float]]]]
    decode_ms: list[float]


def start(plan: Plan, setting: str) -> Any:
    """Return an engine of one setting."""
    longest = max(plan.lengths) + plan.decode + 16
    config = None if setting == DENSE else config_of(setting)
    return start_engine(
        plan.model,
        Setting(config, plan.impl, plan.attention_backend),
        longest,
        2 * longest,
        enforce_eager=not plan.graphs,
        max_num_batched_tokens=plan.chunk or longest,
        max_num_seqs=4,
        enable_chunked_prefill=bool(plan.chunk),
        enable_prefix_caching=False,
    )


def ask(engine: Any, ids: list[int], tokens: int = 1, **changes: Any) -> Any:
    """Return what an engine says to one prompt, of so many tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True, **changes
    )
    (output,) = engine.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    return output.outputs[0]


def time_prompts(engine: Any, plan: Plan, setting: str, tokens: int) -> Row:
    """Time all prompts of one length."""
    for seed in range(WARM_UPS):
        ask(engine, random_prompt(plan.model, tokens, 1000 + seed))
    _, before = counts_since()
    seconds = []
    for seed in range(plan.repetitions):
        ids = random_prompt(plan.model, tokens, seed)
        began = time.perf_counter()
        ask(engine, ids)
        seconds.append(time.perf_counter() - began)
    counts, _ = counts_since(before)
    return Row(
        setting,
        tokens,
        [round(one, 4) for one in seconds],
        round(statistics.median(seconds), 4),
        *counts,
    )


def time_decoding(engine: Any, plan: Plan) -> list[float]:
    """Return the milliseconds from each token of a reply to the next."""
    ids = random_prompt(plan.model, max(plan.lengths), 0)
    (served,) = serve(engine, [ids], 1 + plan.decode)
    pairs = itertools.pairwise(served.times)
    return [round((later - earlier) * 1e3, 3) for earlier, later in pairs]


def measure(plan: Plan, setting: str) -> Engine:
    """Start one engine and ask it everything; in a process of its own."""
    began = time.perf_counter()
    engine = start(plan, setting)
    ready = time.perf_counter() - began
    (attention,) = engine.apply_model(attention_of)
    answers = []
    for tokens in SHORT:
        said = ask(engine, random_prompt(plan.model, tokens, 0), 1 + plan.decode, logprobs=5)
        answers.append(
            [[(token, one.logprob) for token, one in place.items()] for place in said.logprobs]
        )
    rows = [time_prompts(engine, plan, setting, tokens) for tokens in plan.lengths]
    decode_ms = time_decoding(engine, plan) if plan.decode else []
    return Engine(round(ready, 1), attention, rows, answers, decode_ms)


def difference(ours: list[list[list[tuple[int, float]]]], dense: Any) -> float:
    """Return the largest difference, in nats, of a token that both name at the same place.

    Replies are compared up to the first place where they name another token first.
    """
    largest = 0.0
    for reply, other in zip(ours, dense):
        for place, same in zip(reply, other):
            known = dict(same)
            largest = max([largest, *(abs(p - known[t]) for t, p in place if t in known)])
            if place[0][0] != same[0][0]:
                break
    return round(largest, 5)


def content_of(plan: Plan, engines: dict[str, Engine]) -> dict[str, Any]:
    """Return the result file of the engines so far."""
    source = provenance(plan.device)
    source["versions"]["vllm"] = vllm_version()
    return {
        "kind": "vllm-first-token",
        **source,
        **dataclasses.asdict(plan),
        "shape": MODELS[plan.model],
        "dtype": DTYPE,
        "warm_ups": WARM_UPS,
        "settings": {
            setting: config_of(setting).to_dict() for setting in engines if setting != DENSE
        },
        "engines": {
            setting: {
                "start_seconds": engine.start_seconds,
                "attention": engine.attention,
                "short_prompts_as_dense": engine.answers == engines[DENSE].answers,
                "short_prompts_difference": difference(engine.answers, engines[DENSE].answers),
                "decode_ms": engine.decode_ms,
            }
            for setting, engine in engines.items()
        },
        "rows": [dataclasses.asdict(row) for engine in engines.values() for row in engine.rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    parser = make_parser("benchmarks.serving.first_token", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--settings", nargs="+", default=["drop_mass=0.5", "drop_mass=0.75"], metavar="NAME=VALUE"
    )
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--graphs", action="store_true", help="compile, and record CUDA graphs")
    parser.add_argument("--chunk", type=int, default=0, help="most tokens of a step")
    parser.add_argument("--decode", type=int, default=0, help="tokens after the first to time")
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    asked = {field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)}
    plan = Plan(**asked | {"lengths": tuple(args.lengths)})
    prepare_process()
    engines: dict[str, Engine] = {}
    for setting in (DENSE, *args.settings):
        # A process of its own: an engine gives its memory back only when that ends.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            engines[setting] = process.submit(measure, plan, setting).result()
        for row in engines[setting].rows:
            print(row, flush=True)
        content = content_of(plan, engines)
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(setting, content["engines"][setting], flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
