"""What the commands that run a model share: arguments, reading what they name, loading it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from token_sparse_attention import bundled
from token_sparse_attention.attention.backends import BACKENDS
from token_sparse_attention.attention.causal import parse_backend
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.errors import JobFailedError, UsageError
from token_sparse_attention.selection import IMPLS

FAILED, BAD_INPUT = 1, 2  # exit codes besides 0
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
BUNDLED = "bundled"  # what results call the bundled model, wherever it lies
_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
_NO_HOST_MEMORY = "DefaultCPUAllocator: "  # begins what PyTorch says where the host has none


def _backend(text: str) -> str:
    try:
        return parse_backend(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _dtype(text: str) -> str:
    if text != "auto" and not isinstance(getattr(torch, text, None), torch.dtype):
        raise argparse.ArgumentTypeError(
            f"must be auto or a torch dtype such as bfloat16, got {text!r}"
        )
    return text


DENSE_BACKEND: dict[str, Any] = {
    "choices": BACKENDS,
    "help": "which dense kernel attends (default: auto)",
}
BACKEND_OR_PATTERN: dict[str, Any] = {
    "type": _backend,
    "metavar": "NAME",
    "help": f"dense kernel: {', '.join(BACKENDS)}; or block-sparse pattern in every layer: "
    f"{', '.join(PATTERNS)}, settings as JSON after a colon (default: auto)",
}


def add_model_argument(command: argparse.ArgumentParser) -> None:
    """Add the model, which `model_name` and `load_model` read."""
    command.add_argument(
        "model", nargs="?", help="hub id or folder (default: the small model that ships here)"
    )


def add_loading_arguments(
    command: argparse.ArgumentParser, *, attention_backend: dict[str, Any] | None = None
) -> None:
    """Add where and how the model is loaded, and which code runs.

    Args:
        command: the command.
        attention_backend: how that argument is read, if not as the name of a dense kernel.
    """
    add_device_argument(command)
    command.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="how accelerate spreads the layers over all visible GPUs, and over the host's memory "
        "where these are too small; then --device is not read (default: all on --device)",
    )
    command.add_argument(
        "--dtype", default="auto", type=_dtype, help="torch dtype (default: the checkpoint's)"
    )
    command.add_argument(
        "--impl",
        default="auto",
        choices=IMPLS,
        help="which code scores, selects and moves tokens (default: auto)",
    )
    backend = DENSE_BACKEND if attention_backend is None else attention_backend
    command.add_argument("--attention-backend", default="auto", **backend)
    command.add_argument(
        "--trust-remote-code", action="store_true", help="let the checkpoint's own code run"
    )


def add_device_argument(command: argparse.ArgumentParser) -> None:
    """Add where the model is to lie."""
    command.add_argument("--device", default="auto", help="torch device (default: auto)")


def add_prompt_arguments(command: argparse.ArgumentParser) -> None:
    """Add the text to read, which `read_text` reads, and the question after it."""
    command.add_argument(
        "--prompt-file", required=True, metavar="FILE", help="text to read; - for standard input"
    )
    command.add_argument("--question", metavar="TEXT", help="asked after the text")


def model_name(args: argparse.Namespace) -> str:
    """Return what to load: the model that was asked for, or the bundled one."""
    return args.model or str(bundled.MODEL)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `run.load_model` takes besides the name."""
    names = ("device", "device_map", "dtype", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def read_text(option: str, path: str | Path) -> str:
    """Return the text of a file that `option` named; ``"-"`` is standard input.

    Raises:
        UsageError: if it cannot be read, or is empty.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path} cannot be read: {error}") from error
    if not text.strip():
        raise UsageError(f"{option} {path} must hold text, but is empty")
    return text


CONFIG_HELP = (
    "the settings: a JSON file of a TokenSparseConfig or a LayerProfile, JSON itself, default, "
    "published, profile (the model folder's token_sparse_profile.json), or a profile that ships "
    "here (llama-3.1-8b-instruct, mistral-nemo-instruct-2407)"
)


def require_transformers() -> None:
    """Keep transformers' own messages and progress bars off the terminal.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "this command needs transformers: pip install 'token-sparse-attention[transformers]'"
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what goes wrong in loading from a checkpoint into bad input.

    Raises:
        UsageError: if the block raises what loading raises.
    """
    try:
        yield
    except _LOADING_ERRORS as error:
        raise UsageError(f"{name} cannot be loaded: {error}") from error


@contextmanager
def within_memory(prompt_tokens: int, doing: str) -> Iterator[None]:
    """Turn a lack of memory, on a GPU or not, into one line.

    Args:
        prompt_tokens: length of the longest prompt.
        doing: what is run on it, in a word.

    Raises:
        JobFailedError: if the block runs out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        lacking = isinstance(error, torch.OutOfMemoryError) or _NO_HOST_MEMORY in str(error)
        if not lacking:
            raise
        said = str(error).partition("\n")[0]
        raise JobFailedError(
            f"out of memory at {prompt_tokens:,} prompt tokens, {doing}: {said}"
        ) from error


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and the tokenizer that was asked for.

    Raises:
        UsageError: if they cannot be loaded.
    """
    from token_sparse_attention import run

    name = model_name(args)
    with loading(name):
        return run.load_model(name, **load_options(args))
