"""The ``tsa calibrate`` command: arguments, progress, output. Exit codes are those of `cli`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from token_sparse_attention import arguments, bundled
from token_sparse_attention.benchmark.command import MakeCommand, list_of, not_negative, positive
from token_sparse_attention.calibration.record import (
    DROP_MASSES,
    METHODS,
    SAMPLES,
    CalibrationResult,
)
from token_sparse_attention.calibration.show import (
    check_plot,
    draw,
    layer_table,
    sentences,
)
from token_sparse_attention.config import LayerProfile, TokenSparseConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.named_settings import read_settings

if TYPE_CHECKING:
    from token_sparse_attention.calibration.job import CalibrationOptions
    from token_sparse_attention.calibration.prompts import Prompt

DEFAULT_LENGTH, DEFAULT_PROMPTS = 4096, 4


def add_commands(commands: Any, make: MakeCommand) -> None:
    """Add ``tsa calibrate``; `make` adds a command of that name, summary and example."""
    command = make(
        commands,
        "calibrate",
        "measure which layers of a model tolerate sparsity, and write a profile of them",
        "tsa calibrate --method drift --out profile.json\n"
        "  tsa calibrate meta-llama/Llama-3.1-8B-Instruct --method sensitivity \\\n"
        "    --prompts prompts.jsonl --target-speedup 4 --out profile.json --plot plot.svg\n"
        "  tsa calibrate --method sensitivity --samples 256,1024 \\\n"
        "    --text book.txt --length 32768 --target-speedup 2 --out profile.json\n"
        "  tsa calibrate --method sensitivity --samples 1024,4096 --heads-of 2 \\\n"
        "    --prompts prompts.jsonl --target-speedup 4 --out profile.json\n"
        "  tsa calibrate --method sensitivity --measured profile.measured.json \\\n"
        "    --target-speedup 3 --out faster.json    (measures nothing)",
    )
    arguments.add_model_argument(command)
    command.add_argument(
        "--method",
        choices=METHODS,
        required=True,
        help="how far layers move tokens (the paper's), or what each one's sparsity does to the "
        "model's predictions",
    )
    _add_prompt_arguments(command)
    _add_choice_arguments(command)
    command.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="choose again, for another goal, from an earlier FILE.measured.json; runs no model",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="where to write the profile; what was measured goes to FILE.measured.json beside it",
    )
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw what was measured; .svg or .png"
    )
    arguments.add_loading_arguments(command)
    command.set_defaults(handler=_calibrate)


def _add_prompt_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="text to cut prompts from; may be repeated (default: the demo's document)",
    )
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='prompts instead: one {"prompt": ..., "continuation": ...} a line, continuation '
        "optional",
    )
    command.add_argument(
        "--length",
        type=positive,
        metavar="N",
        help=f"tokens of each prompt cut from text (default: {DEFAULT_LENGTH})",
    )
    command.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help=f"how many prompts (default: {DEFAULT_PROMPTS} from text, all of a prompt file)",
    )
    command.add_argument(
        "--reply-tokens",
        type=not_negative,
        default=32,
        metavar="N",
        help="measure along this many tokens of the model's own reply, where the prompt brings "
        "no continuation; 0: after the prompt only (default: 32)",
    )


def _add_choice_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        metavar="VALUE",
        help=f"{arguments.CONFIG_HELP}; of a profile, its base, which layers start from (default: "
        "published for drift, else the model folder's profile or the library's defaults)",
    )
    command.add_argument(
        "--drift-quantile",
        type=float,
        default=0.5,
        metavar="Q",
        help="layers at or below this quantile of the drift become sparse (default: 0.5)",
    )
    command.add_argument(
        "--drop-mass",
        type=list_of(float),
        metavar="LIST",
        help="sensitivity: values of drop_mass to try in each layer, where the settings select "
        f"queries (default: {','.join(map(str, DROP_MASSES))})",
    )
    command.add_argument(
        "--samples",
        type=list_of(int),
        metavar="LIST",
        help="sensitivity: values of fallback_samples to try in each layer, where the settings "
        f"have select_queries=false (default: {','.join(map(str, SAMPLES))})",
    )
    command.add_argument(
        "--heads-of",
        type=not_negative,
        metavar="N",
        help="sensitivity: measure the N costliest layers head by head too, and leave single "
        "heads of theirs dense where that is worth it, where the settings have "
        "select_queries=false (default: 0)",
    )
    goal = command.add_mutually_exclusive_group()
    goal.add_argument(
        "--divergence-budget",
        type=float,
        metavar="X",
        help="sensitivity: KL in nats that all chosen layers may cost together",
    )
    goal.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="sensitivity: how many times less attention work to aim at",
    )


def measured_path(profile: Path) -> Path:
    """Return where what was measured is written, beside the profile."""
    return profile.with_name(f"{profile.stem}.measured.json")


def _calibrate(args: argparse.Namespace) -> int:
    if args.prompts and (args.text or args.length):
        raise UsageError("--prompts are used whole; --text and --length do not go with it")
    for name, path in (("--out", args.out), ("--plot", args.plot)):
        if path is not None:
            _check_writable(name, path)
    if args.plot:
        check_plot(args.plot)
    if args.measured:
        return _choose_again(args)
    arguments.require_transformers()
    from token_sparse_attention import run
    from token_sparse_attention.calibration import job

    name = arguments.model_name(args)
    chosen = _read_base(args.config, name) if args.config else None
    base = chosen or _default_base(args, run.default_config(name)[0])
    try:
        options = job.CalibrationOptions(
            method=args.method,
            base=base,
            drift_quantile=args.drift_quantile,
            drop_masses=args.drop_mass,
            samples=args.samples,
            heads_of=args.heads_of or 0,
            divergence_budget=args.divergence_budget,
            target_speedup=args.target_speedup,
            max_reply=args.reply_tokens,
            impl=args.impl,
            attention_backend=args.attention_backend,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    with Console(stderr=True).status(f"loading {name}") as status:
        model, prompts = _load(args)
        _warn_of_covering(options, min(prompt.ids.shape[1] for prompt in prompts))
        longest = max(prompt.ids.shape[1] for prompt in prompts)
        try:
            with arguments.within_memory(longest, "calibrating"):
                result = job.calibrate(
                    model,
                    prompts,
                    options,
                    name=args.model or arguments.BUNDLED,
                    arguments=_asked(args),
                    on_progress=status.update,
                )
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot be calibrated: {error}") from error
    written = _write(result, args.out, args.plot)
    _print(result, written, as_json=args.json)
    return arguments.FAILED if result.failure else 0


def _choose_again(args: argparse.Namespace) -> int:
    """Choose from what was measured before; return the exit code."""
    fixed = {
        "model", "text", "prompts", "length", "num_prompts", "config", "drop_mass", "samples",
        "heads_of",
    }  # fmt: skip
    given = [name for name in vars(args) if name in fixed and getattr(args, name) is not None]
    if given:
        raise UsageError(
            f"--measured says what was measured; {given[0].replace('_', '-')} does not go with it"
        )
    if args.out and measured_path(args.out).resolve() == args.measured.resolve():
        raise UsageError("--out would replace what --measured reads; give another name")
    arguments.require_transformers()
    from token_sparse_attention.calibration import job

    before = CalibrationResult.load(args.measured)
    goal = {name: getattr(args, name) for name in ("divergence_budget", "target_speedup")}
    try:
        options = job.CalibrationOptions(args.method, before.base, **goal)
        result = job.choose_again(before, options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--measured {args.measured}: {error}") from error
    result = dataclasses.replace(result, arguments={**before.arguments, **goal})
    _print(result, _write(result, args.out, args.plot), as_json=args.json)
    return arguments.FAILED if result.failure else 0


def _load(args: argparse.Namespace) -> tuple[Any, list[Prompt]]:
    """Load the model, and cut or read its prompts."""
    from token_sparse_attention import run
    from token_sparse_attention.calibration import prompts

    paths = [] if args.prompts else args.text or [bundled.DEMO_DOCUMENT]
    texts = [arguments.read_text("--text", path) for path in paths]
    model, tokenizer = arguments.load_model(args)
    if args.prompts:
        cut = prompts.file_prompts(tokenizer, args.prompts, args.num_prompts)
    else:
        length, count = args.length or DEFAULT_LENGTH, args.num_prompts or DEFAULT_PROMPTS
        for path, text in zip(paths, texts):
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if tokens < length:
                print(
                    f"tsa: warning: {path} has {tokens} tokens, which are repeated to fill "
                    f"{length}",
                    file=sys.stderr,
                )
        cut = prompts.text_prompts(tokenizer, texts, length, count)
    longest, limit = max(prompt.ids.shape[1] for prompt in cut), run.context_limit(model)
    if limit is not None and longest > limit:
        print(
            f"tsa: warning: {longest} prompt tokens exceed the {limit} positions this model was "
            "made for",
            file=sys.stderr,
        )
    return model, cut


def _warn_of_covering(options: CalibrationOptions, shortest: int) -> None:
    """Say which numbers of samples leave nothing out of the prompts."""
    for setting in options.settings if options.method != "drift" else ():
        if setting.name != "fallback_samples":
            continue
        if setting.value + options.base.fallback_window >= shortest:
            print(
                f"tsa: warning: {setting.value} samples and the window of "
                f"{options.base.fallback_window} cover a prompt of {shortest} tokens, which then "
                "counts as dense; take longer prompts",
                file=sys.stderr,
            )


def _check_writable(name: str, path: Path) -> None:
    """Raise before hours of measuring if the result could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{name} {path} cannot be written")


def _read_base(value: str, model: str) -> TokenSparseConfig:
    config = read_settings(value, model)
    return config.base if isinstance(config, LayerProfile) else config


def _default_base(
    args: argparse.Namespace, of_model: TokenSparseConfig | LayerProfile
) -> TokenSparseConfig:
    if args.method == "drift":
        return TokenSparseConfig.published()
    base = of_model.base if isinstance(of_model, LayerProfile) else of_model
    if args.drop_mass and not base.select_queries:
        base = dataclasses.replace(base, select_queries=True, drop_mass=args.drop_mass[0])
    if args.samples and base.select_queries:
        base = TokenSparseConfig()
    return dataclasses.replace(base, sparse_layers=None)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    left_out = ("command", "handler", "json", "model", "out", "plot")
    asked = {name: value for name, value in vars(args).items() if name not in left_out}
    return {name: _plain(value) for name, value in asked.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _write(result: CalibrationResult, out: Path | None, plot: Path | None) -> list[Path]:
    contents: dict[Path, bytes] = {}
    if out is not None:
        contents[measured_path(out)] = result.to_json().encode()
        if result.profile is not None:
            contents[out] = (result.profile.to_json() + "\n").encode()
    if plot is not None:
        contents[plot] = draw(result, plot.suffix)
    for path, content in contents.items():
        try:
            path.write_bytes(content)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error}") from error
    return list(contents)


def _print(result: CalibrationResult, written: list[Path], *, as_json: bool) -> None:
    if as_json:
        print(result.to_json(), end="")
        return
    console = Console()
    console.print(f"[bold]{result.model}[/], {result.dtype}, on {result.provenance['device']}")
    console.print(layer_table(result))
    for sentence in sentences(result):
        console.print(sentence, markup=False, highlight=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False)
