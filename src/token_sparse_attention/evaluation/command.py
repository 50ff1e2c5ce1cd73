"""``tsa eval``: arguments, progress, tables. Exit codes are those of `cli`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from token_sparse_attention import arguments
from token_sparse_attention.attention.backends import BACKENDS
from token_sparse_attention.attention.causal import parse_backend
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.benchmark.command import MakeCommand, list_of, positive
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation import harness
from token_sparse_attention.evaluation.record import (
    EvalResults,
    begin_with_dense,
    load_results,
    save_results,
)
from token_sparse_attention.evaluation.samples import SampleSet
from token_sparse_attention.evaluation.show import show

if TYPE_CHECKING:
    from token_sparse_attention.evaluation.evaluate import Runner

_LENGTHS, _LIMIT = (4096,), 50


def add_commands(commands: Any, make: MakeCommand) -> None:
    """Add ``tsa eval``; `make` adds a command of name, summary and example."""
    command = make(
        commands,
        "eval",
        "compare the accuracy of sparse and dense prefill on lm-evaluation-harness's tasks",
        "tsa eval --lengths 2048,4096 --limit 10 --config published --config profile "
        "--out result.jsonl\n"
        "  tsa eval --config flexprefill --config both=flexprefill+published --out result.jsonl\n"
        "  tsa eval --prepare-only --samples samples.jsonl.gz     (where lm-eval is)\n"
        "  tsa eval --samples samples.jsonl.gz --out result.jsonl (where the GPU is)\n"
        "  tsa eval --samples samples.jsonl.gz --score result.jsonl",
    )
    arguments.add_model_argument(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="results; a run goes on there")
    command.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a sparse configuration; VALUE: default, published, profile (the model folder's "
        "token_sparse_profile.json), a profile that ships here (llama-3.1-8b-instruct, "
        "mistral-nemo-instruct-2407), a JSON file, or JSON; or a block-sparse pattern alone "
        f"({', '.join(PATTERNS)}; settings as JSON after a colon); or PATTERN+VALUE for both; "
        "dense for no sparse one; may be given several times (default: the model's profile, else "
        "default)",
    )
    _add_sample_arguments(command)
    backend_help = f"dense kernel: {', '.join(BACKENDS)} (default: auto)"
    arguments.add_loading_arguments(
        command, attention_backend={"metavar": "NAME", "help": backend_help}
    )
    command.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="load the model into N processes, which take turns with all visible GPUs; prefill "
        "times are then not those of an idle one (default: 1)",
    )
    command.add_argument(
        "--dense-from",
        type=Path,
        metavar="RESULT",
        help="take the dense replies from these results, of the same model, dtype, kernel and "
        "samples, instead of making them again",
    )
    command.set_defaults(handler=run_eval)


def _add_sample_arguments(command: argparse.ArgumentParser) -> None:
    asked = command.add_argument_group("samples")
    asked.add_argument(
        "--tasks",
        type=_names,
        metavar="NAMES",
        help="lm-eval's tasks or groups (default: ruler, which here means the tasks of RULER "
        f"that need no download: {', '.join(harness.LOCAL_RULER)})",
    )
    asked.add_argument(
        "--lengths",
        type=list_of(positive),
        metavar="LIST",
        help="prompt lengths in tokens, for tasks made to a length (default: "
        f"{','.join(map(str, _LENGTHS))})",
    )
    asked.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help=f"samples per task and length (default: {_LIMIT})",
    )
    asked.add_argument(
        "--seed", type=int, help="another one draws other samples of RULER (default: 0)"
    )
    asked.add_argument(
        "--apply-chat-template", action="store_true", help="make prompts chats, for chat models"
    )
    asked.add_argument(
        "--samples", type=Path, metavar="FILE", help="take the samples from this file (.jsonl.gz)"
    )
    asked.add_argument(
        "--only-tasks", type=_names, metavar="NAMES", help="of those in --samples, only these"
    )
    asked.add_argument(
        "--only-lengths",
        type=list_of(positive),
        metavar="LIST",
        help="of those in --samples, only these; others may be added to --out later",
    )
    asked.add_argument(
        "--prepare-only", action="store_true", help="only write the samples, to --samples"
    )
    asked.add_argument(
        "--score",
        type=Path,
        metavar="RESULT",
        help="only score the results in this file that have no score yet; needs --samples",
    )


def run_eval(args: argparse.Namespace) -> int:
    """Run ``tsa eval`` and return its exit code.

    Raises:
        UsageError: if something that was given cannot be used.
    """
    _check_arguments(args)
    if args.score:
        return _score(args)
    arguments.require_transformers()
    return _prepare_only(args) if args.prepare_only else _evaluate(args)


def _check_arguments(args: argparse.Namespace) -> None:
    try:
        backend = parse_backend(args.attention_backend)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--attention-backend: {error}") from error
    if backend not in BACKENDS:
        raise UsageError(
            "--attention-backend must name a dense kernel, which the dense replies run on too; "
            f"patterns are configurations: --config {backend} or --config NAME={backend}+VALUE"
        )
    if (args.prepare_only or args.score) and not args.samples:
        raise UsageError("--prepare-only and --score need --samples FILE")
    if args.samples and not args.prepare_only:
        asked = {
            "--tasks": args.tasks,
            "--lengths": args.lengths,
            "--limit": args.limit,
            "--seed": args.seed,
            "--apply-chat-template": args.apply_chat_template or None,
        }
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise UsageError(
                f"{given[0]} only matters where samples are prepared, but --samples gives them; "
                "leave one of the two out"
            )
    only = args.only_tasks is not None or args.only_lengths is not None
    if only and (args.prepare_only or args.score or not args.samples):
        raise UsageError("--only-tasks and --only-lengths choose from --samples what to run")
    if args.dense_from and (args.prepare_only or args.score or not args.samples):
        raise UsageError("--dense-from needs --samples, the file that those results are about")
    if not (args.out or args.prepare_only or args.score):
        raise UsageError("--out FILE is needed, for the results")


def _score(args: argparse.Namespace) -> int:
    from token_sparse_attention.evaluation.evaluate import score

    results, samples = load_results(args.score), SampleSet.load(args.samples)
    with Console(stderr=True).status("scoring"):
        results = score(results, samples, harness.Scorer(samples))
    save_results(args.score, results)
    show(results, args.score, as_json=args.json)
    return 0


def _prepare_only(args: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    name = arguments.model_name(args)
    with _loading(name), arguments.loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    samples = _prepare(args, tokenizer)
    samples.save(args.samples)
    if args.json:
        print(json.dumps({"samples": str(args.samples), "count": len(samples.samples)}))
    else:
        print(f"{args.samples}: {len(samples.samples)} samples")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from token_sparse_attention.evaluation.evaluate import Runner
    from token_sparse_attention.evaluation.settings import read_runs

    if args.device_map and args.processes > 1:
        raise UsageError(
            f"--processes must be 1 with --device-map, which has one process use all GPUs; "
            f"got {args.processes}"
        )
    name = arguments.model_name(args)
    configurations = read_runs(args.config, name)
    samples = SampleSet.load(args.samples) if args.samples else None
    with _loading(name):
        model, tokenizer = arguments.load_model(args)
    if samples is None:
        samples = _prepare(args, tokenizer)
    runner = Runner(model, tokenizer, configurations, args.impl, args.attention_backend)
    results = _run(args, runner, samples)
    if results is None:
        return arguments.FAILED
    show(results, args.out, as_json=args.json)
    return 0


def _run(args: argparse.Namespace, runner: Runner, samples: SampleSet) -> EvalResults | None:
    """Evaluate with a progress bar; None if the job failed, which standard error then says."""
    from token_sparse_attention.evaluation import processes
    from token_sparse_attention.evaluation.evaluate import evaluate, make_header

    scorer = harness.Scorer(samples) if harness.installed_version() else None
    header = make_header(runner, samples, args.model, args.processes)
    if args.dense_from:
        header = begin_with_dense(args.out, header, load_results(args.dense_from))
    samples = _only(args, samples)
    source = None
    if args.processes > 1:
        name, options = arguments.model_name(args), arguments.load_options(args)
        source = processes.several(runner, args.processes, name, options)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=len(samples.samples) * len(runner.names))
        try:
            return evaluate(
                runner,
                samples,
                header,
                args.out,
                scorer=scorer,
                source=source,
                report=lambda what, done: progress.update(bar, description=what, completed=done),
            )
        except (RuntimeError, OSError) as error:
            print(
                f"tsa: the evaluation failed: {error}\n"
                f"tsa: {args.out} keeps what was finished; the same command goes on from there",
                file=sys.stderr,
            )
            return None


def _only(args: argparse.Namespace, samples: SampleSet) -> SampleSet:
    """Return the samples to run; a result names the file they are from, not the choice."""
    for option, asked, there in (
        ("--only-tasks", args.only_tasks, {sample.task for sample in samples.samples}),
        ("--only-lengths", args.only_lengths, {sample.length for sample in samples.samples}),
    ):
        unknown = [entry for entry in asked or () if entry not in there]
        if unknown:
            raise UsageError(
                f"{option} must be among {', '.join(map(str, sorted(there)))} for these "
                f"--samples, got {unknown[0]}"
            )
    chosen = [
        sample
        for sample in samples.samples
        if sample.task in (args.only_tasks or (sample.task,))
        and sample.length in (args.only_lengths or (sample.length,))
    ]
    return replace(samples, samples=chosen)


def _loading(name: str) -> Status:
    return Console(stderr=True).status(f"loading {name}")


def _prepare(args: argparse.Namespace, tokenizer: Any) -> SampleSet:
    if args.apply_chat_template and tokenizer.chat_template is None:
        raise UsageError("--apply-chat-template needs a tokenizer with a chat template")
    with Console(file=sys.stderr).status("preparing samples") as status:
        return harness.prepare(
            args.tasks or ("ruler",),
            args.lengths or _LENGTHS,
            args.limit or _LIMIT,
            tokenizer=tokenizer,
            tokenizer_name=args.model or arguments.BUNDLED,
            seed=args.seed or 0,
            chat_template=args.apply_chat_template,
            report=status.update,
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
