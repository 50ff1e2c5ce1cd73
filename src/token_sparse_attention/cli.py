"""The `tsa` command. Exit codes: 0 success, 1 the job failed, 2 bad arguments or input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

import token_sparse_attention
from token_sparse_attention import arguments
from token_sparse_attention.arguments import BAD_INPUT, FAILED
from token_sparse_attention.attention.backends import BACKENDS
from token_sparse_attention.benchmark.command import add_commands as add_benchmarks
from token_sparse_attention.benchmark.command import positive
from token_sparse_attention.calibration.command import add_commands as add_calibration
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.command import add_commands as add_evaluation
from token_sparse_attention.named_settings import read_settings
from token_sparse_attention.report.command import add_commands as add_report

if TYPE_CHECKING:
    from token_sparse_attention.demo import DemoResult
    from token_sparse_attention.integrations.record import LayerRecord
    from token_sparse_attention.run import Answer


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``handler`` in what it parses runs the one asked for."""
    parser = argparse.ArgumentParser(
        prog="tsa",
        description="Token Sparse Attention: faster long-context prefill without training.",
        epilog=_epilog(
            "tsa demo\n"
            '  tsa run --prompt-file report.txt --question "Who signed the contract?" --compare'
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {token_sparse_attention.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="its --help says more"
    )

    run = _command(
        commands,
        "run",
        "answer a question about a long document, prefilling sparsely",
        'tsa run --prompt-file report.txt --question "Who signed the contract?" --compare\n'
        "  tsa run meta-llama/Llama-3.1-8B-Instruct --prompt-file book.txt --config profile.json",
    )
    arguments.add_model_argument(run)
    arguments.add_prompt_arguments(run)
    run.add_argument(
        "--config",
        metavar="VALUE",
        help=f"{arguments.CONFIG_HELP} (default: profile if there is one, else default)",
    )
    run.add_argument(
        "--compare", action="store_true", help="also answer densely, and show both times"
    )
    run.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="most tokens of the answer (default: 64)",
    )
    arguments.add_loading_arguments(run, attention_backend=arguments.BACKEND_OR_PATTERN)
    run.set_defaults(handler=_run)

    demo = _command(
        commands,
        "demo",
        "find facts hidden in a real document with the bundled model, dense and sparse",
        "tsa demo",
    )
    demo.set_defaults(handler=_demo)
    arguments.add_device_argument(demo)

    add_calibration(commands, _command)
    add_evaluation(commands, _command)
    add_report(commands, _command)

    info = _command(
        commands, "info", "show versions, devices, and the attention backends found", "tsa info"
    )
    info.set_defaults(handler=_info)

    bench = commands.add_parser(
        "bench",
        help="measure the operator, and the first token of a whole model",
        description="Measure the operator, and the first token of a whole model.",
        epilog=_epilog("tsa bench op --lengths 8192 --out results.json"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = bench.add_subparsers(
        dest="bench_command", required=True, metavar="COMMAND", help="its --help says more"
    )
    add_benchmarks(benchmarks, _command)
    bench.set_defaults(handler=_bench)
    return parser


def _epilog(example: str) -> str:
    return (
        f"example:\n  {example}\n\n"
        "exit codes: 0 success, 1 the job failed, 2 bad arguments or input, 130 interrupted\n"
        "Errors are text on stderr, with --json too."
    )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_epilog(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return command


def _working(message: str) -> Status:
    return Console(stderr=True).status(message)


def _run(args: argparse.Namespace) -> int:
    document = arguments.read_text("--prompt-file", args.prompt_file)
    arguments.require_transformers()
    from token_sparse_attention import run

    name = arguments.model_name(args)
    if args.config:
        config, source = read_settings(args.config, name), args.config
    else:
        config, source = run.default_config(name)
    with _working(f"loading {name}") as status:
        model, tokenizer = arguments.load_model(args)
        ids = run.encode_prompt(tokenizer, document, args.question)
        limit = run.context_limit(model)
        if limit is not None and ids.shape[1] + args.max_new_tokens > limit:
            print(
                f"tsa: warning: {ids.shape[1]} prompt tokens and {args.max_new_tokens} new ones "
                f"exceed the {limit} positions this model was made for",
                file=sys.stderr,
            )
        answers: dict[str, Answer] = {}
        paths = {"sparse": config} | ({"dense": None} if args.compare else {})
        for path, settings in paths.items():
            status.update(f"{path}: reading {ids.shape[1]:,} tokens")
            try:
                with arguments.within_memory(ids.shape[1], path):
                    if not answers:
                        # On a CPU there is nothing to compile, and memory is no matter.
                        on_gpu = model.device.type == "cuda"
                        run.warm_up(
                            model,
                            tokenizer,
                            ids,
                            config if on_gpu else None,
                            impl=args.impl,
                            attention_backend=args.attention_backend,
                            whole=on_gpu and args.compare,
                        )
                    answers[path] = run.answer(
                        model,
                        tokenizer,
                        ids,
                        settings,
                        max_new_tokens=args.max_new_tokens,
                        impl=args.impl,
                        attention_backend=args.attention_backend,
                    )
            except (ValueError, TypeError) as error:
                raise UsageError(f"{name} cannot be run {path}: {error}") from error
    if args.json:
        from token_sparse_attention.info import provenance

        _print_json(
            {
                "model": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "config": json.loads(config.to_json()),
                "config_source": source,
                "attention_backend": args.attention_backend,
                **provenance(str(model.device)),
                "note": _note(answers, args.attention_backend),
                **{path: answer.to_dict() for path, answer in answers.items()},
            }
        )
        return 0
    _print_run(name, source, str(model.device), answers, _note(answers, args.attention_backend))
    return 0


def _print_run(
    name: str, source: str, device: str, answers: dict[str, Answer], note: str | None
) -> None:
    console = Console()
    sparse = answers["sparse"]
    console.print(
        f"[bold]{escape(name)}[/] on {device}, {sparse.prompt_tokens:,} prompt tokens, "
        f"settings: {escape(source)}"
    )
    if sparse.report:
        console.print(_layer_table(sparse.report.last_prefill()))
    for path, answer in answers.items():
        console.print(
            f"[bold]{path}[/]: first token after {answer.time_to_first_token:.3f} s, "
            f"{answer.new_tokens} tokens after {answer.total_time:.3f} s (one run)"
        )
        console.print(answer.text, markup=False, highlight=False)
    if note is not None:
        console.print(f"[yellow]note[/]: {escape(note)}", highlight=False)
    if "dense" in answers:
        ratio = answers["dense"].time_to_first_token / sparse.time_to_first_token
        console.print(f"time to first token, dense over sparse: {ratio:.2f} (one run each)")


def _note(answers: dict[str, Answer], attention_backend: str) -> str | None:
    """Say that no layer ran sparse, by token sparsity or by a pattern; None if one did."""
    report = answers["sparse"].report
    records = report.last_prefill() if report else []
    ran_sparse = any("sparse" in record.paths for record in records)
    if not records or ran_sparse or attention_backend not in BACKENDS:
        return None
    reasons = dict.fromkeys(reason for record in records for reason in record.reasons if reason)
    compared = ": this compares dense with dense" if "dense" in answers else ""
    return f"'sparse' ran dense in every layer ({'; '.join(reasons)}){compared}"


def _layer_table(records: list[LayerRecord]) -> Table:
    from token_sparse_attention.integrations.record import describe, path_name

    table = Table("layer", "path", "kept", "tokens kept per head, or why dense")
    for record in records:
        share = f"{record.kept_share:.1%}"
        table.add_row(str(record.layer), path_name(record), share, describe(record))
    return table


def _demo(args: argparse.Namespace) -> int:
    arguments.require_transformers()
    from token_sparse_attention.demo import run_demo

    with _working("starting") as status:
        result = run_demo(device=args.device, on_progress=status.update)
    if args.json:
        _print_json(result.to_dict())
    else:
        _print_demo(result)
    return FAILED if result.failures else 0


def _print_demo(result: DemoResult) -> None:
    console = Console()
    table = Table("depth", "expected", "dense", "sparse", title="Facts hidden in the document")
    for finding in result.findings:
        needle = finding.needle
        table.add_row(
            f"{needle.depth:.0%}",
            needle.answer,
            _verdict(finding.dense_correct, finding.dense.text),
            _verdict(finding.sparse_correct, finding.sparse.text),
        )
    console.print(table)
    last = result.findings[-1]
    if last.sparse.report:
        console.print(f"Last question, {last.sparse.prompt_tokens:,} prompt tokens:")
        console.print(_layer_table(last.sparse.report.last_prefill()))
    for path in ("dense", "sparse"):
        times = result.times(path)
        console.print(
            f"{path}: first token after {median(times):.2f} s "
            f"({times[0]:.2f} to {times[-1]:.2f}, {len(times)} prompts)"
        )
    if result.note is not None:
        console.print(f"[yellow]note[/]: {result.note}", highlight=False)
    for failure in result.failures:
        console.print(f"[red]FAILED[/]: {failure}")
    if not result.failures:
        console.print(f"[green]passed[/]: {result.summary}")


def _verdict(correct: bool, text: str) -> str:
    if correct:
        return "[green]found[/]"
    return "[red]missed[/]: " + text[:40].replace("[", "\\[")


def _info(args: argparse.Namespace) -> int:
    from token_sparse_attention.info import collect

    facts = collect()
    if args.json:
        _print_json(facts)
        return 0
    console = Console()
    table = Table("package", "version")
    for name, version in facts["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    table = Table(
        "device", "dtype", "backends that ran", "auto picks", "because", "patterns run on"
    )
    for device in facts["devices"]:
        for entry in facts["backends"][device["device"]]:
            table.add_row(
                f"{device['device']} ({device['name']})",
                entry["dtype"],
                ", ".join(entry["available"]) or "none",
                entry["auto"],
                entry["reason"],
                entry["patterns_on"],
            )
    console.print(table)
    return 0


def _bench(args: argparse.Namespace) -> int:
    passed: bool = args.bench(args)
    return 0 if passed else FAILED


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.handler(args)
    except UsageError as error:
        print(f"tsa: {error}", file=sys.stderr)
        return BAD_INPUT
    except arguments.JobFailedError as error:
        print(f"tsa: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
