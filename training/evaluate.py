"""Held-out accuracy by task and length: does greedy decoding write exactly the right answer?

The prompt and the right answer are read in one pass. Greedy decoding reproduces the answer if
and only if every token of it is the most likely one after what comes before it.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from token_sparse_attention.info import provenance

from .probes import TASKS, Maker, Material, Probe
from .tokenizer import END_ID, PAD_ID, load

_SEED = 910_000
_TOKENS_AT_ONCE = {"cuda": 131072, "cpu": 8192}


def material_of(coder: Tokenizer, data: Path) -> Material:
    """What probes are made from: the held-out text and the words in a folder of prepared data."""
    held_out = (data / "held_out.txt").read_text("utf-8")
    words = json.loads((data / "words.json").read_text("utf-8"))
    count = functools.lru_cache(maxsize=None)(lambda text: len(coder.encode(text).ids))
    return Material(held_out.split("\n\n"), words["adjectives"], words["nouns"], count)


@torch.no_grad()
def _right(model: PreTrainedModel, rows: list[tuple[list[int], int]]) -> list[bool]:
    """For rows of (tokens, length of the answer at their end): is every answer token first?"""
    longest = max(len(tokens) for tokens, _ in rows)
    padded = [tokens + [PAD_ID] * (longest - len(tokens)) for tokens, _ in rows]
    inputs = torch.tensor(padded, device=model.device)
    hidden = model.model(inputs, use_cache=False).last_hidden_state
    results = []
    for row, (tokens, size) in enumerate(rows):
        first = len(tokens) - size
        best = model.lm_head(hidden[row, first - 1 : len(tokens) - 1]).argmax(-1)
        results.append(best.tolist() == tokens[first:])
    return results


def _encode(coder: Tokenizer, probes: list[Probe]) -> list[tuple[list[int], int]]:
    texts = coder.encode_batch([probe.prompt + probe.answer for probe in probes])
    rows = []
    for probe, text in zip(probes, texts, strict=True):
        end = [END_ID] if probe.ends else []
        rows.append((text.ids + end, len(coder.encode(probe.answer).ids) + len(end)))
    return rows


def evaluate(
    folder: Path,
    data: Path,
    lengths: list[int],
    samples: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Right answers per task and length of the model in ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    coder = load(folder)
    material = material_of(coder, data)
    scores: dict[str, dict[str, int]] = {task: {} for task in TASKS}
    seconds = time.monotonic()
    for length in lengths:
        at_once = max(1, _TOKENS_AT_ONCE[device] // length)
        for number, task in enumerate(TASKS):
            maker = Maker(material, length, _SEED + 100 * length + number)
            rows = _encode(coder, [getattr(maker, task)() for _ in range(samples)])
            good = 0
            for start in range(0, samples, at_once):
                good += sum(_right(model, rows[start : start + at_once]))
            scores[task][str(length)] = good
    return {
        "samples": samples,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - seconds, 1),
        "seed": _SEED,
        **provenance(device),
        "right": scores,
    }


def show(scores: dict[str, Any]) -> str:
    """The scores as a Markdown table of accuracies."""
    right, samples = scores["right"], scores["samples"]
    lengths = list(next(iter(right.values())))
    lines = ["| task | " + " | ".join(lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for task, row in right.items():
        cells = " | ".join(f"{row[length] / samples:.2f}" for length in lengths)
        lines.append(f"| {task} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Evaluate a model folder from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Measure a model's held-out accuracy by task and length.",
        epilog="example: python -m training.evaluate --model runs/first/model"
        " --data runs/first/data --samples 20 --lengths 1024,4096",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared data")
    parser.add_argument("--samples", type=int, default=20, help="samples per task and length")
    parser.add_argument("--lengths", default="1024,4096", help="context lengths in tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [int(length) for length in args.lengths.split(",")]
    dtype = getattr(torch, args.dtype)
    scores = evaluate(args.model, args.data, lengths, args.samples, device, dtype)
    if args.out:
        args.out.write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
    print(show(scores))


if __name__ == "__main__":
    main()
