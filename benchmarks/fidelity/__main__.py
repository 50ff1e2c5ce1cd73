"""How far block-wise samples of keys take a released model's answers from dense ones.

    python -m benchmarks.fidelity run --model hf --length 31744 --pieces 16 --out part-0.jsonl
    python -m benchmarks.fidelity table part-*.jsonl --out fidelity.json

The prompts are those of `tsa fidelity`. `run` writes a line as each piece of text of a variant
is done; several may share a GPU, each with pieces of its own (``--which 0,4,8``).
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
from benchmarks.fidelity.measure import measure
from benchmarks.fidelity.model import Model
from benchmarks.fidelity.table import show, summarise
from benchmarks.fidelity.variants import VARIANTS

from token_sparse_attention import bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.fidelity.prompts import CONTINUED, SHAPES, Prompt, PromptMaker
from token_sparse_attention.info import provenance
from token_sparse_attention.records import read_text


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured."""
    parser = make_parser("benchmarks.fidelity", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure variants")
    one.add_argument("--model", required=True, type=Path, help="folder with weights, tokenizer")
    one.add_argument(
        "--text",
        nargs="+",
        type=Path,
        default=bundled.SAMPLE,
        help="text files (default: those of tsa fidelity)",
    )
    one.add_argument("--length", type=positive, default=31744, help="tokens (default: 31744)")
    one.add_argument("--pieces", type=positive, default=16, help="of text (default: 16)")
    one.add_argument("--which", type=list_of(int), default=(), help="pieces (default: all)")
    one.add_argument("--variants", default="", help="names between semicolons (default: all)")
    one.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    one.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model"
    )
    one.add_argument("--out", required=True, type=Path, help="where to write")
    two = commands.add_parser("table", help="join and show what was measured")
    two.add_argument("parts", nargs="+", type=Path, help="what run wrote")
    two.add_argument("--out", type=Path, help="where to write the results as JSON")
    handlers = {"run": _run, "table": _table}
    return run_command(parser, lambda args: handlers[args.command](args), argv)


def _pieces(args: argparse.Namespace) -> dict[int, list[Prompt]]:
    """Return the prompts of the pieces that are asked for."""
    from transformers import AutoTokenizer

    texts = {path.name: read_text(path) for path in args.text}
    made = PromptMaker(AutoTokenizer.from_pretrained(args.model), texts).make(
        args.length, args.pieces, tuple(SHAPES)
    )
    which = args.which or range(args.pieces)
    return {number: [one for one in made if one.index == number] for number in which}


def _run(args: argparse.Namespace) -> bool:
    torch.set_float32_matmul_precision("high")
    names = [n.strip() for n in args.variants.split(";") if n.strip()] or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(f"no such variant: {unknown[0]}; there are {', '.join(VARIANTS)}")
    pieces = _pieces(args)
    room = args.length + CONTINUED
    model = Model(args.model, args.device, getattr(torch, args.dtype), room)
    about = provenance(args.device) | {
        "shape": [model.layers, model.heads, model.kv_heads, model.size],
        "prompt_tokens": args.length,
        "dtype": args.dtype,
    }
    with args.out.open("w", encoding="utf-8") as file:
        print(json.dumps({"provenance": about}), file=file, flush=True)
        for record in measure(model, pieces, [VARIANTS[name] for name in names]):
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
