"""What the commands that run a model share: their options, and what these name."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from token_sparse_attention import bundled, records
from token_sparse_attention.checks import check_unicode
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

    dtype = getattr(torch, text, None)
    computes = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    if text != "auto" and not computes:
        raise ValueError(
            "must be auto or a torch dtype of real numbers in 16 bits or more, such as bfloat16, "
            f"got {text!r}"
        )
    return text


def _read_question(text: str) -> str:
    check_unicode("the text", text)
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

    def check(self) -> None:
        """Refuse what no model is, before anything is read.

        Raises:
            UsageError: if the model is a file, a folder without config.json, or no name at all.
        """
        if self.name is not None and not self.name.strip():
            raise UsageError("model must be a hub id or a folder, got an empty text")
        configs = {"config.json", "adapter_config.json"}
        if os.path.isdir(self.path):
            with loading(self.path):
                there = os.listdir(self.path)
            if not configs.intersection(there):
                raise UsageError(f"{self.path} cannot be loaded: the folder has no config.json")
        if self.path.lower().endswith(".gguf"):
            raise UsageError(
                f"{self.path} cannot be loaded: GGUF files are not read; give the hub id or the "
                "folder of the model's safetensors"
            )
        if os.path.isfile(self.path):
            raise UsageError(
                f"{self.path} cannot be loaded: it is a file; give the folder that holds "
                "config.json and the safetensors"
            )

    def load(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer.

        Raises:
            UsageError: if they cannot be loaded.
        """
        from token_sparse_attention import run

        self.check()
        with loading(self.path):
            return run.load_model(self.path, **self.loading, say=note, warn=warn)


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
    question: Annotated[str | None, Option(read=_read_question)] = None
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
    text = _standard_input(name) if path == "-" else records.read_text(Path(path), name)
    if not text.strip():
        raise UsageError(f"{name} must hold text, but is empty")
    return text


def _standard_input(name: str) -> str:
    if sys.stdin is None:
        raise UsageError(f"{name} cannot be read: standard input is closed")
    try:
        return records.decode(sys.stdin.buffer.read(records.MAX_BYTES + 1), name)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error}") from error


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


def check_length(model: Any, ids: Any, new_tokens: int = 0) -> None:
    """Refuse a prompt that the model cannot read; warn of one longer than it was made for.

    Args:
        model: the model.
        ids: ``[1, S]`` token ids of the prompt.
        new_tokens: most tokens of the reply.

    Raises:
        UsageError: see `run.check_prompt`.
    """
    from token_sparse_attention.run import check_prompt, context_limit

    check_prompt(model, ids, new_tokens)
    limit, prompt_tokens = context_limit(model), ids.shape[1]
    if limit is not None and prompt_tokens + new_tokens > limit:
        reply = f" and {new_tokens} new ones" if new_tokens else ""
        warn(
            f"{prompt_tokens} prompt tokens{reply} exceed the {limit} positions this model was "
            "made for"
        )
