"""The ``tsa calibrate`` command: arguments, progress, output. Exit codes are those of `cli`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from token_sparse_attention import bundled
from token_sparse_attention.attention.backends import BACKENDS
from token_sparse_attention.benchmark.command import positive
from token_sparse_attention.calibration.record import (
    METHODS,
    CalibrationError,
    CalibrationResult,
)
from token_sparse_attention.calibration.show import (
    check_plot,
    draw,
    layer_table,
    sentences,
)
from token_sparse_attention.config import LayerProfile, TokenSparseConfig, load_config
from token_sparse_attention.selection import IMPLS

if TYPE_CHECKING:
    from token_sparse_attention.calibration.prompts import Prompt

MakeCommand = Callable[[Any, str, str, str], argparse.ArgumentParser]
DEFAULT_LENGTH, DEFAULT_PROMPTS = 4096, 4
DROP_MASSES = (0.05, 0.1, 0.2, 0.4)


def add_commands(commands: Any, make: MakeCommand) -> None:
    """Add ``tsa calibrate``; `make` adds a command of that name, summary and example."""
    command = make(
        commands,
        "calibrate",
        "measure which layers of a model tolerate sparsity, and write a profile of them",
        "tsa calibrate --method drift --out profile.json\n"
        "  tsa calibrate meta-llama/Llama-3.1-8B-Instruct --method sensitivity \\\n"
        "    --prompts prompts.jsonl --divergence-budget 0.05 --out profile.json --plot plot.svg",
    )
    command.add_argument(
        "model", nargs="?", help="hub id or folder (default: the small model that ships here)"
    )
    command.add_argument("--method", choices=METHODS, required=True)
    _add_prompt_arguments(command)
    _add_choice_arguments(command)
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="where to write the profile; what was measured goes to FILE.measured.json beside it",
    )
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw what was measured; .svg or .png"
    )
    command.add_argument("--device", default="auto", help="torch device (default: auto)")
    command.add_argument("--dtype", default="auto", help="torch dtype (default: the checkpoint's)")
    command.add_argument("--impl", default="auto", choices=IMPLS)
    command.add_argument("--attention-backend", default="auto", choices=BACKENDS)
    command.add_argument(
        "--trust-remote-code", action="store_true", help="let the checkpoint's own code run"
    )
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
        type=_not_negative,
        default=32,
        metavar="N",
        help="measure along this many tokens of the model's own reply, where the prompt brings "
        "no continuation; 0: after the prompt only (default: 32)",
    )


def _add_choice_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        metavar="FILE",
        help="JSON of the settings that layers start from; of a profile, its base (default: the "
        "published ones for drift, else the model folder's profile or the library's defaults)",
    )
    command.add_argument(
        "--drift-quantile",
        type=float,
        default=0.5,
        metavar="Q",
        help="layers at or below this quantile of the drift become sparse (default: 0.5)",
    )
    shown = ",".join(map(str, DROP_MASSES))
    command.add_argument(
        "--drop-mass",
        type=_numbers,
        default=DROP_MASSES,
        metavar="LIST",
        help=f"settings that sensitivity tries in each layer (default: {shown})",
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


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part.strip())


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def measured_path(profile: Path) -> Path:
    """Return where what was measured is written, beside the profile."""
    return profile.with_name(f"{profile.stem}.measured.json")


def _calibrate(args: argparse.Namespace) -> int:
    if args.prompts and (args.text or args.length):
        raise CalibrationError("--prompts are used whole; --text and --length do not go with it")
    chosen = _read_base(args.config) if args.config else None
    for name, path in (("--out", args.out), ("--plot", args.plot)):
        if path is not None:
            _check_writable(name, path)
    if args.plot:
        check_plot(args.plot)
    try:
        import transformers

        from token_sparse_attention import run
        from token_sparse_attention.calibration import job
    except ImportError as error:
        raise CalibrationError(
            "this command needs transformers: pip install 'token-sparse-attention[transformers]'"
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model_name = args.model or str(bundled.MODEL)
    base = chosen or _default_base(args.method, run.default_config(model_name)[0])
    try:
        options = job.CalibrationOptions(
            method=args.method,
            base=base,
            drift_quantile=args.drift_quantile,
            drop_masses=args.drop_mass,
            divergence_budget=args.divergence_budget,
            target_speedup=args.target_speedup,
            max_reply=args.reply_tokens,
            impl=args.impl,
            attention_backend=args.attention_backend,
        )
    except (ValueError, TypeError) as error:
        raise CalibrationError(str(error)) from error
    with Console(stderr=True).status(f"loading {model_name}") as status:
        model, prompts = _load(model_name, args)
        try:
            result = job.calibrate(
                model,
                prompts,
                options,
                name=model_name,
                arguments=_asked(args),
                on_progress=status.update,
            )
        except (ValueError, TypeError) as error:
            raise CalibrationError(f"{model_name} cannot be calibrated: {error}") from error
    written = _write(result, args.out, args.plot)
    _print(result, written, as_json=args.json)
    return 1 if result.failure else 0


def _load(name: str, args: argparse.Namespace) -> tuple[Any, list[Prompt]]:
    """Load the model, and cut or read its prompts."""
    from token_sparse_attention import run
    from token_sparse_attention.calibration import prompts

    texts = [] if args.prompts else [_read_text(p) for p in args.text or [bundled.DEMO_DOCUMENT]]
    try:
        model, tokenizer = run.load_model(
            name, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise CalibrationError(f"{name} cannot be loaded: {error}") from error
    if args.prompts:
        cut = prompts.file_prompts(tokenizer, args.prompts, args.num_prompts)
    else:
        length, count = args.length or DEFAULT_LENGTH, args.num_prompts or DEFAULT_PROMPTS
        cut = prompts.text_prompts(tokenizer, texts, length, count)
    longest, limit = max(prompt.ids.shape[1] for prompt in cut), run.context_limit(model)
    if limit is not None and longest > limit:
        print(
            f"tsa: warning: {longest} prompt tokens exceed the {limit} positions this model was "
            "made for",
            file=sys.stderr,
        )
    return model, cut


def _check_writable(name: str, path: Path) -> None:
    """Raise before hours of measuring if the result could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalibrationError(f"{name} {path} cannot be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise CalibrationError(f"{name} {path} cannot be written")


def _read_base(path: str) -> TokenSparseConfig:
    try:
        config = load_config(path)
    except (OSError, ValueError, TypeError) as error:
        raise CalibrationError(f"--config {path} cannot be used: {error}") from error
    return config.base if isinstance(config, LayerProfile) else config


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--text {path} cannot be read: {error}") from error
    if not text.strip():
        raise CalibrationError(f"--text {path} must hold text, but is empty")
    return text


def _default_base(method: str, of_model: TokenSparseConfig | LayerProfile) -> TokenSparseConfig:
    if method == "drift":
        return TokenSparseConfig.published()
    base = of_model.base if isinstance(of_model, LayerProfile) else of_model
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
            raise CalibrationError(f"{path} cannot be written: {error}") from error
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
