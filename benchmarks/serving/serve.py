"""An OpenAI-compatible server as a user starts it, stormed by clients, dense and sparse.

    PYTHONPATH=src:tests python -m benchmarks.serving.serve --out result.json

Chunked prefill and CUDA graphs are as vLLM leaves them. Each prompt hides two numbers and asks
for one, so that a lost, wrong or mixed-up reply shows in the number that it names. Without a GPU:
``--requests 8 --lengths 1200 2000``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.command import make_parser, run_command
from benchmarks.serving.chunks import SAMPLES, make_questions
from benchmarks.serving.engines import vllm_version
from transformers import AutoTokenizer

from token_sparse_attention import TokenSelectionConfig, bundled
from token_sparse_attention.info import provenance

ROUNDS = 4
SETTINGS = {
    "dense": TokenSelectionConfig(min_tokens=2**20),  # no prompt is that long
    "samples": SAMPLES,
}


def measure(name: str, prompts: list[list[int]], answers: list[str], concurrency: int) -> Any:
    """Start a server under one setting, send everything in rounds, and say what came of it."""
    from vllm_plugin.server import serve, storm  # among the tests

    given = {"config": SETTINGS[name].to_dict()}
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics"
        metrics.mkdir()
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        additional = {"token_sparse_attention": given}
        longest = max(map(len, prompts)) + 64
        arguments = ["--max-model-len", str(longest), "--gpu-memory-utilization", "0.5"]
        with serve(Path(folder), additional, environment, *arguments) as server:
            storm(server.url, prompts[:8], concurrency)  # kernels and caches
            storms, memory = [], []
            for number in range(ROUNDS):
                part = prompts[number::ROUNDS]
                storms.append(storm(server.url, part, concurrency, aborts=0.1))
                memory.append({"mib": server.memory_mib(), "device_mib": device_memory()})
            log, published = server.log.read_text(), server.get("/metrics")
    replies = [
        (reply, answer)
        for number, one in enumerate(storms)
        for reply, answer in zip(one.replies, answers[number::ROUNDS])
    ]
    pieces = [count for one in storms for count in one.pieces]
    return {
        "requests": len(replies),
        "lost": sum(not reply for reply, _ in replies),
        "right": sum(answer in reply for reply, answer in replies),
        "aborted": sum(one.aborted for one in storms),
        "fewest_pieces": min(pieces),
        "seconds": round(sum(one.seconds for one in storms), 2),
        "memory_per_round": memory,
        "compiled_late": len(re.findall(r"JIT compilation during inference", log)),
        "warm_up": re.findall(r"kernels warmed up in .*", log),
        "last_log_line": (re.findall(r"Token sparse attention: \d.*", log) or [""])[-1],
        "metrics": re.findall(r"^token_sparse_attention_\w+(?:\{.*\})? \S+$", published, re.M),
    }


def device_memory() -> int | None:
    """Return the device memory in use, by all processes, in MiB."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    parser = make_parser("benchmarks.serving.serve", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=[900, 2048, 4096, 8192, 16384])
    parser.add_argument("--concurrency", type=int, default=16)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    asked = [
        question
        for seed in range(-(-args.requests // 2))
        for question in make_questions(tokenizer, args.lengths[seed % len(args.lengths)], seed)
    ][: args.requests]
    random.Random(0).shuffle(asked)
    content: dict[str, Any] = {
        "kind": "vllm-serve",
        **provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "vllm": vllm_version(),
        "lengths": args.lengths,
        "concurrency": args.concurrency,
        "settings": {name: config.to_dict() for name, config in SETTINGS.items()},
        "servers": {},
    }
    prompts, answers = [one.ids for one in asked], [one.answer for one in asked]
    for name in SETTINGS:
        content["servers"][name] = measure(name, prompts, answers, args.concurrency)
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(name, content["servers"][name], flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
