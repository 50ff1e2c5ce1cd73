"""The result file of an evaluation: a header line, then one line per sample and configuration.

JSON Lines, so that a run that was cut off loses at most the line it was writing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.profile import layer_configs, settings_from_json
from token_sparse_attention.records import (
    Count,
    Versioned,
    check_keys,
    encode,
    save_lines,
)
from token_sparse_attention.result_lines import LineFile, ResultLines

DENSE = "dense"  # the configuration that all others are compared with
PATTERN = "pattern"  # what the settings of a configuration with a block-sparse pattern hold
MODEL_FACTS = ("num_layers", "num_heads", "num_kv_heads", "head_dim")
LayerKept = int | list[int] | None
Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class RunHeader(Versioned):
    """What was run, on what, and with which settings.

    Attributes:
        provenance: device, versions and commit when the run began, of `info.provenance`.
        arguments: what was asked for.
        model: `MODEL_FACTS` of the model.
        configurations: name -> settings of every configuration, None for the dense one. With
            a block-sparse pattern, an object of its ``"pattern"``, name and settings, and the
            ``"settings"`` of token sparsity, None without.
    """

    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    model: Mapping[str, int]
    configurations: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_keys("model", self.model, MODEL_FACTS)
        for name in MODEL_FACTS:
            if name not in self.model:
                raise UsageError(f"model has no entry {name!r}")
        if self.configurations.get(DENSE, "") is not None:
            raise UsageError(f"configurations must have {DENSE!r}, as null")
        for name, settings in self.configurations.items():
            if name != DENSE and not isinstance(settings, Mapping):
                raise UsageError(f"configurations[{name!r}] must be an object, got {settings!r}")
            if settings and not isinstance(settings.get(PATTERN, {}), Mapping):
                raise UsageError(f"configurations[{name!r}].{PATTERN} must be an object")

    def layer_configs(self, configuration: str) -> dict[int, SparseConfig]:
        """Return the settings of each layer that a configuration lets run sparse.

        Raises:
            UsageError: if they are none of this version.
        """
        settings = self.configurations[configuration]
        if settings and PATTERN in settings:
            settings = settings.get("settings")
        if settings is None:
            return {}
        try:
            return layer_configs(settings_from_json(encode(settings)), self.model["num_layers"])
        except (ValueError, TypeError) as error:
            raise UsageError(f"configuration {configuration!r} cannot be read: {error}") from error

    def skips_blocks(self, configuration: str) -> bool:
        """Return whether a block-sparse pattern skips what `Method.work` does not count."""
        return PATTERN in (self.configurations[configuration] or {})


@dataclass(frozen=True)
class EvalHeader(RunHeader):
    """The header of an evaluation's results.

    Attributes:
        tasks: task -> its version in lm-eval, whose own version is in `provenance`; the digest
            of the samples is in `arguments`.
    """

    tasks: Mapping[str, Any]


@dataclass(frozen=True)
class SampleResult:
    """One reply to one sample.

    Attributes:
        task: lm-eval's name of the task.
        length: the length the task was built for, in tokens; 0 if the task sets none.
        index: which of the task's samples of that length.
        configuration: name of the configuration that ran.
        score: from 0 to 1; None if it was not scored yet.
        reply: the text that was scored.
        prompt_tokens: S.
        kept: one entry per layer: how many tokens the method chose for the heads, see
            `TokenSelection`; a list with one number per head where they differ; None where the
            layer ran dense. None in place of the list without token sparsity.
        new_tokens: length of the reply.
        seconds: from the start of the prefill to the first token.
    """

    task: str
    length: Count
    index: Count
    configuration: str
    score: Annotated[float, Meta(ge=0, le=1)] | None
    reply: str
    prompt_tokens: Annotated[int, Meta(ge=1)]
    kept: list[LayerKept] | None
    new_tokens: Count
    seconds: float

    @property
    def key(self) -> Key:
        """What tells results of one file apart."""
        return self.task, self.length, self.index, self.configuration


@dataclass(frozen=True)
class EvalResults:
    """A result file's content, finished or not."""

    header: EvalHeader
    samples: tuple[SampleResult, ...]


def load_results(path: str | Path) -> EvalResults:
    """Read a result file; see `ResultLines.load`."""
    return EvalResults(*_FILES.load(Path(path)))


def check_results(path: Path) -> None:
    """Raise unless results can be written to a file; see `ResultLines.check_file`."""
    _FILES.check_file(path)


def open_results(path: Path, header: EvalHeader) -> tuple[list[SampleResult], LineFile]:
    """Open a result file for more results; see `ResultLines.open`."""
    return _FILES.open(path, header)


def begin_with_dense(path: Path, header: EvalHeader, other: EvalResults) -> EvalHeader:
    """Let a new result file begin with the dense replies of another one.

    Args:
        path: the result file; if it holds results already, it is left as it is.
        header: what is to run.
        other: results with dense replies to the same samples.

    Returns:
        The header, whose arguments then say under ``"dense_from"`` where those were made.

    Raises:
        UsageError: if they are not the dense replies that the run would give.
    """
    for name in ("model", "dtype", "attention_backend", "samples_sha256"):
        there, asked = other.header.arguments.get(name), header.arguments.get(name)
        if there != asked:
            raise UsageError(
                f"--dense-from must be of the same {name}, {asked!r}, but is of {there!r}"
            )
    arguments = {**header.arguments, "dense_from": other.header.provenance}
    header = dataclasses.replace(header, arguments=arguments)
    results, file = open_results(path, header)
    with file:
        if not results:
            for sample in other.samples:
                if sample.configuration == DENSE:
                    file.write(sample)
    return header


def save_results(path: Path, results: EvalResults) -> None:
    """Write a whole result file; the old one stays until the new one is complete."""
    lines = map(encode, (results.header, *results.samples))
    save_lines(path, lines, pack=path.suffix == ".gz")


def _check_sample(sample: SampleResult, header: EvalHeader, where: str) -> None:
    for name, known in (("task", header.tasks), ("configuration", header.configurations)):
        if getattr(sample, name) not in known:
            raise UsageError(f"{where}: {name} {getattr(sample, name)!r} is not in the header")
    if sample.kept is not None:
        check_kept(sample.kept, sample.prompt_tokens, header.model, where)


def check_kept(
    kept: list[LayerKept], prompt_tokens: int, model: Mapping[str, int], where: str
) -> None:
    """Raise UsageError unless `kept` fits the prompt and the model; see `SampleResult`."""
    if len(kept) != model["num_layers"]:
        raise UsageError(
            f"{where}: kept must have {model['num_layers']} entries, one per layer; "
            f"got {len(kept)}"
        )
    for layer, entry in enumerate(kept):
        heads = entry if isinstance(entry, list) else [entry]
        wrong_length = isinstance(entry, list) and len(entry) != model["num_heads"]
        wrong = [n for n in heads if n is not None and not 0 <= n <= prompt_tokens]
        if wrong_length or wrong:
            raise UsageError(
                f"{where}: kept[{layer}] must be null, or one number from 0 to {prompt_tokens}, "
                f"or {model['num_heads']} of them; got {entry!r}"
            )


_FILES = ResultLines("an evaluation", EvalHeader, SampleResult, _check_sample)
