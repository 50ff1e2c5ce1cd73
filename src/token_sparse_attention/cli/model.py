"""What the commands that run a model share: their options, and what these name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from token_sparse_attention import bundled, records
from token_sparse_attention.cli.command import note, warn
from token_sparse_attention.errors import UsageError, loading
from token_sparse_attention.options import Device, Option

DenseKernel = Literal["auto", "fa4", "flash", "cudnn", "efficient", "math"]


def _read_backend(text: str) -> str:
    """Return the canonical form of a dense kernel or a block-sparse pattern."""
    from token_sparse_attention.attention.names import parse_backend

    return parse_backend(text)


def _read_dtype(text: str) -> str:
    import torch

    if text != "auto" and not isinstance(getattr(torch, text, None), torch.dtype):
        raise ValueError(f"must be auto or a torch dtype such as bfloat16, got {text!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, where and how it is loaded, and which code runs.

    Attributes:
        name: hub id or folder
        device: torch device
        device_map: how accelerate spreads the layers over all visible GPUs, and over the host's
            memory where these are too small; then --device is not read
        dtype: torch dtype
        impl: which code scores, selects and moves tokens
        trust_remote_code: let the checkpoint's own code run
    """

    name: Annotated[
        str | None, Option("model", "model", default="the small model that ships here")
    ] = None
    device: Device = "auto"
    device_map: Annotated[
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | None,
        Option(default="all on --device"),
    ] = None
    dtype: Annotated[
        str, Option(metavar="DTYPE", default="the checkpoint's", read=_read_dtype)
    ] = "auto"
    impl: Literal["auto", "reference", "triton"] = "auto"
    trust_remote_code: bool = False

    @property
    def path(self) -> str:
        """What to load: the model that was asked for, or the bundled one."""
        return self.name or str(bundled.MODEL)

    @property
    def recorded(self) -> str:
        """What results call the model."""
        return self.name or bundled.NAME

    @property
    def loading(self) -> dict[str, Any]:
        """What `run.load_model` takes after the name."""
        names = ("device", "device_map", "dtype", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    def load(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Raises:
            UsageError: if they cannot be loaded.
        """
        from token_sparse_attention import run

        with loading(self.path):
            return run.load_model(self.path, **self.loading, say=note)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The text to read, and the settings to read it with.

    Attributes:
        prompt_file: text to read; - for standard input
        question: asked after the text
        config: the settings: a JSON file of a config or a profile, JSON itself,
            default, published, profile (the model folder's token_sparse_profile.json), or a
            profile that ships here (llama-3.1-8b-instruct, mistral-nemo-instruct-2407)
        attention_backend: dense kernel: auto, fa4, flash, cudnn, efficient, math; or block-sparse
            pattern in every layer: flexprefill, minference, xattention, streaming, settings as
            JSON after a colon
    """

    prompt_file: Annotated[str, Option(metavar="FILE")]
    question: str | None = None
    config: Annotated[
        str | None, Option(metavar="VALUE", default="profile if there is one, else default")
    ] = None
    attention_backend: Annotated[str, Option(metavar="NAME", read=_read_backend)] = "auto"

    def read(self) -> str:
        """Return the text."""
        return read_text("--prompt-file", self.prompt_file)


def read_text(option: str, path: str | Path) -> str:
    """Return the text of a file that `option` named; ``"-"`` is standard input.

    Raises:
        UsageError: if it cannot be read, or is empty.
    """
    name = f"{option} {path}"
    text = sys.stdin.read() if path == "-" else records.read_text(Path(path), name)
    if not text.strip():
        raise UsageError(f"{name} must hold text, but is empty")
    return text


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


def warn_of_length(model: Any, prompt_tokens: int, new_tokens: int = 0) -> None:
    """Say on standard error that a prompt exceeds the positions a model was made for."""
    from token_sparse_attention.run import context_limit

    limit = context_limit(model)
    if limit is not None and prompt_tokens + new_tokens > limit:
        reply = f" and {new_tokens} new ones" if new_tokens else ""
        warn(
            f"{prompt_tokens} prompt tokens{reply} exceed the {limit} positions this model was "
            "made for"
        )
