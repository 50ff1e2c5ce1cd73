"""``tsa report`` and ``tsa capture``: arguments, output. Exit codes are those of `cli`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from token_sparse_attention import bundled
from token_sparse_attention.attention.backends import BACKENDS
from token_sparse_attention.benchmark.command import positive
from token_sparse_attention.benchmark.record import UsageError
from token_sparse_attention.report.load import load
from token_sparse_attention.report.page import TITLE, build_page
from token_sparse_attention.selection import IMPLS

if TYPE_CHECKING:
    from token_sparse_attention.report.kept_text import KeptText

MakeCommand = Callable[[Any, str, str, str], argparse.ArgumentParser]
_FAILED = 1
_BUNDLED = "bundled"  # what results call the bundled model, wherever it lies


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
    capture.add_argument(
        "model", nargs="?", help="hub id or folder (default: the small model that ships here)"
    )
    capture.add_argument(
        "--prompt-file", required=True, metavar="FILE", help="text to read; - for standard input"
    )
    capture.add_argument("--question", metavar="TEXT", help="asked after the text")
    capture.add_argument(
        "--config",
        metavar="VALUE",
        help="the settings, as in tsa eval: default, published, profile, a JSON file, or JSON "
        "(default: the model folder's token_sparse_profile.json, else the library's defaults)",
    )
    capture.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the capture to write"
    )
    capture.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    capture.add_argument("--device", default="auto", help="torch device (default: auto)")
    capture.add_argument("--dtype", default="auto", help="torch dtype (default: the checkpoint's)")
    capture.add_argument("--impl", default="auto", choices=IMPLS)
    capture.add_argument("--attention-backend", default="auto", choices=BACKENDS)
    capture.add_argument(
        "--trust-remote-code", action="store_true", help="let the checkpoint's own code run"
    )
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
    document = _read_prompt(args.prompt_file)
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "this command needs transformers: pip install 'token-sparse-attention[transformers]'"
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        kept = _capture(args, document)
    except RuntimeError as error:
        print(f"tsa: the prompt could not be run: {error}", file=sys.stderr)
        return _FAILED
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
    from token_sparse_attention.evaluation.settings import read_configurations
    from token_sparse_attention.report.capture import capture

    name = args.model or str(bundled.MODEL)
    if args.config:
        source = args.config
        named = f"given={source}" if source.startswith("{") else source
        config = read_configurations([named], name).popitem()[1]
    else:
        config, source = run.default_config(name)
    options = {key: getattr(args, key) for key in ("device", "dtype", "trust_remote_code")}
    with Console(stderr=True).status(f"loading {name}") as status:
        try:
            model, tokenizer = run.load_model(name, **options)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            raise UsageError(f"{name} cannot be loaded: {error}") from error
        ids = run.encode_prompt(tokenizer, document, args.question)
        status.update(f"reading {ids.shape[1]:,} tokens")
        arguments = {
            "model": args.model or _BUNDLED,
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
                arguments=arguments,
                max_new_tokens=args.max_new_tokens,
                impl=args.impl,
                attention_backend=args.attention_backend,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot be run sparse: {error}") from error


def _read_prompt(path: str) -> str:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-file {path} cannot be read: {error}") from error
    if not text.strip():
        raise UsageError(f"--prompt-file {path} must hold text, but is empty")
    return text


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names in result files may hold halves of characters, which no encoding has.
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error}") from error
