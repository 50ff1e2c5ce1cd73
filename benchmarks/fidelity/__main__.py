"""How far block-wise samples of keys take a released model's answers from dense ones.

    python -m benchmarks.fidelity prepare --model hf --prose vim/*.txt --out prompts.json.gz
    python -m benchmarks.fidelity run --model hf --prompts prompts.json.gz --out part-0.jsonl
    python -m benchmarks.fidelity table part-*.jsonl --out fidelity.json

`run` writes a line as each document of a variant is done; several may share a GPU, each with
documents of its own (``--which 0,4,8``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.command import list_of, make_parser, positive, run_command
from benchmarks.fidelity import prompts as prompts_of
from benchmarks.fidelity.measure import measure
from benchmarks.fidelity.model import Model
from benchmarks.fidelity.table import show, summarise
from benchmarks.fidelity.variants import VARIANTS

from token_sparse_attention.errors import UsageError
from token_sparse_attention.info import provenance

_ROOM = 640
"""Tokens of answers that follow a prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare prompts, measure, or show what was measured."""
    parser = make_parser("benchmarks.fidelity", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="write the prompts")
    one.add_argument("--model", required=True, type=Path, help="folder with a tokenizer")
    one.add_argument("--prose", required=True, nargs="+", type=Path, help="text files")
    one.add_argument("--documents", type=positive, default=24, help="how many (default: 24)")
    one.add_argument("--length", type=positive, default=prompts_of.LENGTH, help="tokens")
    one.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    one.add_argument("--out", required=True, type=Path, help="where to write")
    two = commands.add_parser("run", help="measure variants")
    two.add_argument("--model", required=True, type=Path, help="folder with the weights")
    two.add_argument("--prompts", required=True, type=Path, help="what prepare wrote")
    two.add_argument("--which", type=list_of(int), default=(), help="documents (default: all)")
    two.add_argument("--variants", default="", help="names between semicolons (default: all)")
    two.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    two.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model"
    )
    two.add_argument("--out", required=True, type=Path, help="where to write")
    three = commands.add_parser("table", help="join and show what was measured")
    three.add_argument("parts", nargs="+", type=Path, help="what run wrote")
    three.add_argument("--out", type=Path, help="where to write the results as JSON")
    handlers = {"prepare": _prepare, "run": _run, "table": _table}
    return run_command(parser, lambda args: handlers[args.command](args), argv)


def _prepare(args: argparse.Namespace) -> bool:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made = prompts_of.prepare(tokenizer, args.prose, args.documents, args.length, args.seed)
    prompts_of.save(made, args.out)
    return True


def _run(args: argparse.Namespace) -> bool:
    torch.set_float32_matmul_precision("high")
    given = prompts_of.load(args.prompts)
    names = [n.strip() for n in args.variants.split(";") if n.strip()] or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(f"no such variant: {unknown[0]}; there are {', '.join(VARIANTS)}")
    length = max(len(one["document"]) for one in given)
    model = Model(args.model, args.device, getattr(torch, args.dtype), length + _ROOM)
    about = provenance(args.device) | {
        "shape": [model.layers, model.heads, model.kv_heads, model.size],
        "prompt_tokens": length - prompts_of.CONTINUED,
        "dtype": args.dtype,
    }
    which = args.which or range(len(given))
    with args.out.open("w", encoding="utf-8") as file:
        print(json.dumps({"provenance": about}), file=file, flush=True)
        for record in measure(model, given, which, [VARIANTS[name] for name in names]):
            print(json.dumps(record), file=file, flush=True)
    return True


def _table(args: argparse.Namespace) -> bool:
    lines = [json.loads(x) for p in args.parts for x in p.read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "variant" in line]
    rows = summarise(records)
    print(show(rows))
    if args.out:
        about = next(line["provenance"] for line in lines if "provenance" in line)
        settings = {name: vars(v) for name, v in VARIANTS.items()}
        content = {
            "command": "benchmarks.fidelity table",
            "provenance": about,
            "settings": {row["variant"]: settings.get(row["variant"]) for row in rows},
            "rows": rows,
            "records": records,
        }
        args.out.write_text(_compact(content) + "\n", encoding="utf-8")
    return True


def _compact(content: Mapping[str, Any]) -> str:
    """Return JSON with a line for each row, and numbers of six digits."""
    short = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.6g}"))
    parts = []
    for name, value in short.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
