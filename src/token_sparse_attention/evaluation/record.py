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

from token_sparse_attention.checks import check_writable
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.profile import layer_configs, settings_from_json
from token_sparse_attention.records import (
    Count,
    LineFile,
    Versioned,
    check_keys,
    convert,
    encode,
    parse,
    parse_object,
    read_lines,
    save_lines,
)

_HEADER_BEGINS = '{"version":'
DENSE = "dense"  # the configuration that all others are compared with
PATTERN = "pattern"  # what the settings of a configuration with a block-sparse pattern hold
MODEL_FACTS = ("num_layers", "num_heads", "num_kv_heads", "head_dim")
LayerKept = int | list[int] | None
Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class EvalHeader(Versioned):
    """What was run, on what, and with which settings.

    Attributes:
        provenance: device, versions and commit when the run began, of `info.provenance`;
            its versions also name the lm-eval that made the samples.
        arguments: what was asked for, and the digest of the samples.
        model: `MODEL_FACTS` of the model.
        configurations: name -> settings of every configuration, None for the dense one. With
            a block-sparse pattern, an object of its ``"pattern"``, name and settings, and the
            ``"settings"`` of token sparsity, None without.
        tasks: task -> its version in lm-eval.
    """

    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    model: Mapping[str, int]
    configurations: Mapping[str, Any]
    tasks: Mapping[str, Any]

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
    """Read a result file, also one that gzip compressed; a cut-off last line is left out.

    Raises:
        UsageError: if the file cannot be read or is none; the message names the line.
    """
    lines = read_lines(Path(path), unfinished=True)
    where, line = next(lines, ("", None))
    if line is None:
        raise UsageError(f"{path} must begin with the header of an evaluation, but is empty")
    header = EvalHeader.from_dict(parse_object(where, line), where)
    samples: dict[Key, SampleResult] = {}
    for where, line in lines:
        sample = convert(parse_object(where, line), SampleResult, where)
        _check_sample(sample, header, where)
        if sample.key in samples:
            raise UsageError(f"{where} repeats the result of {sample.key}")
        samples[sample.key] = sample
    return EvalResults(header, tuple(samples.values()))


def check_results(path: Path) -> None:
    """Raise unless results can be written to a file, which may hold those of a cut-off run.

    Raises:
        UsageError: if it cannot be written, or holds something else.
    """
    if path.suffix == ".gz":
        raise UsageError(f"--out must not end in .gz, as results are appended to it; got {path}")
    check_writable(path, f"--out {path}")
    if not path.is_file():
        return
    if next(read_lines(path, unfinished=True), None) is not None:
        load_results(path)
    elif not _HEADER_BEGINS.startswith(next(read_lines(path), ("", ""))[1][: len(_HEADER_BEGINS)]):
        raise UsageError(f"{path} must begin with the header of an evaluation, but does not")


def open_results(path: Path, header: EvalHeader) -> tuple[list[SampleResult], LineFile]:
    """Open a result file for more results: a new one, or the one of a run that was cut off.

    Returns:
        The results that are there already, and the open file.

    Raises:
        UsageError: if the file belongs to another run; the message says what differs.
    """
    check_results(path)
    if not path.exists() or next(read_lines(path, unfinished=True), None) is None:
        file = LineFile(path, new=True)
        file.write(header)
        return [], file
    found = load_results(path)
    _check_same_run(path, found.header, header)
    return list(found.samples), LineFile(path, new=False)


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
    save_lines(path, map(encode, (results.header, *results.samples)))


def _check_same_run(path: Path, found: EvalHeader, wanted: EvalHeader) -> None:
    asked = parse("", encode(wanted))
    for name, there in parse("", encode(found)).items():
        if there == asked[name]:
            continue
        if isinstance(there, dict):
            names = [*there, *(entry for entry in asked[name] if entry not in there)]
            entry = next(e for e in names if there.get(e) != asked[name].get(e))
            name, there, now = f"{name}.{entry}", there.get(entry), asked[name].get(entry)
        else:
            now = asked[name]
        raise UsageError(
            f"{path} holds another evaluation: its {name} is {there!r}, now it would be {now!r}; "
            "give another --out, or delete the file"
        )


def _check_sample(sample: SampleResult, header: EvalHeader, where: str) -> None:
    for name, known in (("task", header.tasks), ("configuration", header.configurations)):
        if getattr(sample, name) not in known:
            raise UsageError(f"{where}: {name} {getattr(sample, name)!r} is not in the header")
    if sample.kept is not None:
        _check_kept(sample.kept, sample.prompt_tokens, header.model, where)


def _check_kept(
    kept: list[LayerKept], prompt_tokens: int, model: Mapping[str, int], where: str
) -> None:
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
