"""``tsa report`` and ``tsa capture``: arguments, output. Exit codes are those of `cli`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from token_sparse_attention import arguments
from token_sparse_attention.benchmark.command import MakeCommand, positive
from token_sparse_attention.errors import UsageError
from token_sparse_attention.named_settings import read_settings
from token_sparse_attention.report.load import load
from token_sparse_attention.report.page import TITLE, build_page

if TYPE_CHECKING:
    from token_sparse_attention.report.kept_text import KeptText


def add_commands(commands: Any, make: MakeCommand) -> None:
    """Add ``tsa report`` and ``tsa capture``; `make` adds one of name, summary and example."""
    report = make(
        commands,
        "report",
        "make one HTML page of results of tsa eval, tsa bench and tsa capture",
        "tsa report result.jsonl kept.json benchmarks/results/op.json --out report.html",
    )
    report.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="result files")
    report.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the page to write"
    )
    report.add_argument("--title", default=TITLE, help="the page's title")
    report.set_defaults(handler=run_report)

    capture = make(
        commands,
        "capture",
        "note which text of a prompt every layer and head keeps, for tsa report",
        'tsa capture --prompt-file report.txt --question "Who signed?" --out kept.json\n'
        "  tsa report kept.json --out report.html",
    )
    arguments.add_model_argument(capture)
    arguments.add_prompt_arguments(capture)
    capture.add_argument(
        "--config",
        metavar="VALUE",
        help="the settings, as in tsa eval: default, published, profile, a JSON file, or JSON "
        "(default: the model folder's token_sparse_profile.json, else the library's defaults)",
    )
    capture.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the capture to write"
    )
    capture.add_argument(
        "--max-new-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="most tokens of the reply (default: 32)",
    )
    arguments.add_loading_arguments(capture, attention_backend=arguments.BACKEND_OR_PATTERN)
    capture.set_defaults(handler=run_capture)


def run_report(args: argparse.Namespace) -> int:
    """Run ``tsa report`` and return its exit code.

    Raises:
        UsageError: if something that was given cannot be used.
    """
    if any(path.resolve() == args.out.resolve() for path in args.results):
        raise UsageError(f"--out {args.out} must not be one of the results")
    inputs = load(args.results)
    _write(args.out, build_page(inputs, args.title))
    facts = {
        "written": str(args.out),
        "evaluations": len(inputs.evaluations),
        "captures": len(inputs.captures),
        "benchmarks": len(inputs.runs),
    }
    print(json.dumps(facts, indent=2) if args.json else args.out)
    return 0


def run_capture(args: argparse.Namespace) -> int:
    """Run ``tsa capture`` and return its exit code.

    Raises:
        UsageError: if something that was given cannot be used.
    """
    document = arguments.read_text("--prompt-file", args.prompt_file)
    arguments.require_transformers()
    try:
        kept = _capture(args, document)
    except RuntimeError as error:
        print(f"tsa: the prompt could not be run: {error}", file=sys.stderr)
        return arguments.FAILED
    _write(args.out, kept.to_json())
    sparse = [n for n, layer in enumerate(kept.layers) if layer.dense_reason is None]
    if not sparse:
        reasons = dict.fromkeys(str(layer.dense_reason) for layer in kept.layers)
        print(f"tsa: no layer ran sparse: {'; '.join(reasons)}", file=sys.stderr)
    if args.json:
        facts = {
            "written": str(args.out),
            "prompt_tokens": len(kept.tokens),
            "sparse_layers": sparse,
            "reply": kept.reply,
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{args.out}: {len(kept.tokens):,} tokens, {len(sparse)} sparse layers")
    return 0


def _capture(args: argparse.Namespace, document: str) -> KeptText:
    from token_sparse_attention import run
    from token_sparse_attention.report.capture import capture

    name = arguments.model_name(args)
    if args.config:
        config, source = read_settings(args.config, name), args.config
    else:
        config, source = run.default_config(name)
    with Console(stderr=True).status(f"loading {name}") as status:
        model, tokenizer = arguments.load_model(args)
        ids = run.encode_prompt(tokenizer, document, args.question)
        status.update(f"reading {ids.shape[1]:,} tokens")
        asked = {
            "model": args.model or arguments.BUNDLED,
            "dtype": str(model.dtype).removeprefix("torch."),
            "question": args.question,
            "config": json.loads(config.to_json()),
            "config_source": source,
            "impl": args.impl,
            "attention_backend": args.attention_backend,
        }
        try:
            return capture(
                model,
                tokenizer,
                ids,
                config,
                arguments=asked,
                max_new_tokens=args.max_new_tokens,
                impl=args.impl,
                attention_backend=args.attention_backend,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot be run sparse: {error}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names in result files may hold halves of characters, which no encoding has.
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error}") from error
