"""The result file of an evaluation: a header line, then one line per sample and configuration.

JSON Lines, so that a run that was cut off loses at most the line it was writing.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from token_sparse_attention.config import LayerProfile, TokenSparseConfig, layer_configs
from token_sparse_attention.errors import UsageError

SCHEMA_VERSION = 1
DENSE = "dense"  # the configuration that all others are compared with
PATTERN = "pattern"  # what the settings of a configuration with a block-sparse pattern hold
MODEL_FACTS = ("num_layers", "num_heads", "num_kv_heads", "head_dim")
LayerKept = int | list[int] | None
Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class EvalHeader:
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
        version: of this format.
    """

    provenance: Mapping[str, Any]
    arguments: Mapping[str, Any]
    model: Mapping[str, int]
    configurations: Mapping[str, Mapping[str, Any] | None]
    tasks: Mapping[str, Any]
    version: int = SCHEMA_VERSION

    def layer_configs(self, configuration: str) -> dict[int, TokenSparseConfig]:
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
            kind = LayerProfile if "version" in settings else TokenSparseConfig
            return layer_configs(kind.from_json(json.dumps(settings)), self.model["num_layers"])
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
        kept: one entry per layer: how many tokens the heads kept, window included, or with
            ``select_queries=False`` how many every query sees besides its window; a list
            with one number per head where they differ; None where the layer ran dense. None
            in place of the list without token sparsity.
        new_tokens: length of the reply.
        seconds: from the start of the prefill to the first token.
    """

    task: str
    length: int
    index: int
    configuration: str
    score: float | None
    reply: str
    prompt_tokens: int
    kept: list[LayerKept] | None
    new_tokens: int
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


_HEADER_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "provenance": (dict,),
    "arguments": (dict,),
    "model": (dict,),
    "configurations": (dict,),
    "tasks": (dict,),
}
_SAMPLE_KINDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "length": (int,),
    "index": (int,),
    "configuration": (str,),
    "score": (int, float, NoneType),
    "reply": (str,),
    "prompt_tokens": (int,),
    "kept": (list, NoneType),
    "new_tokens": (int,),
    "seconds": (int, float),
}


def to_line(entry: EvalHeader | SampleResult) -> str:
    """Return a header or a result as one line of the file."""
    return json.dumps(dataclasses.asdict(entry), allow_nan=False) + "\n"


def load_results(path: str | Path) -> EvalResults:
    """Read a result file, also one that gzip compressed; a cut-off last line is left out.

    Raises:
        UsageError: if the file cannot be read or is none; the message names the line.
    """
    text = _read(Path(path))
    lines = text.split("\n")[:-1]  # what follows the last line's end is nothing, or cut off
    if not lines:
        raise UsageError(f"{path} must begin with the header of an evaluation, but is empty")
    header = _header(_object(lines[0], f"{path}, line 1"), f"{path}, line 1")
    samples: dict[Key, SampleResult] = {}
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}, line {number}"
        sample = _sample(_object(line, where), header, where)
        if sample.key in samples:
            raise UsageError(f"{where} repeats the result of {sample.key}")
        samples[sample.key] = sample
    return EvalResults(header, tuple(samples.values()))


def open_results(path: Path, header: EvalHeader) -> tuple[list[SampleResult], TextIO]:
    """Open a result file for more results: a new one, or the one of a run that was cut off.

    Returns:
        The results that are there already, and the open file.

    Raises:
        UsageError: if the file belongs to another run; the message says what differs.
    """
    if path.suffix == ".gz":
        raise UsageError(f"--out must not end in .gz, as results are appended to it; got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or "\n" not in _read(path):
            file = path.open("w", encoding="utf-8", newline="\n")
            file.write(to_line(header))
            file.flush()
            return [], file
        found = load_results(path)
        _check_same_run(path, found.header, header)
        whole = path.read_bytes().rfind(b"\n") + 1
        file = path.open("r+", encoding="utf-8", newline="\n")
        file.seek(whole)
        file.truncate()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    return list(found.samples), file


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
            file.writelines(to_line(s) for s in other.samples if s.configuration == DENSE)
    return header


def save_results(path: Path, results: EvalResults) -> None:
    """Write a whole result file; the old one stays until the new one is complete."""
    lines = [to_line(results.header), *map(to_line, results.samples)]
    part = path.with_name(path.name + ".part")
    try:
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def _check_same_run(path: Path, found: EvalHeader, wanted: EvalHeader) -> None:
    asked = json.loads(to_line(wanted))
    for name, there in json.loads(to_line(found)).items():
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


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8", errors="replace")  # a cut-off line may end badly
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where} must be a JSON object, got {type(content).__name__}")
    return content


def check_entries(
    content: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str
) -> None:
    """Check that an object has exactly the entries of `kinds`, of those types.

    Raises:
        UsageError: if not; the message begins with `where`.
    """
    if set(content) != set(kinds):
        wrong = ", ".join(sorted(set(content) ^ set(kinds)))
        raise UsageError(f"{where} has missing or unknown entries: {wrong}")
    for name, value in content.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if type(value) not in kinds[name] or (number and not math.isfinite(value)):
            wanted = " or ".join("null" if k is NoneType else k.__name__ for k in kinds[name])
            raise UsageError(f"{where}: {name} must be {wanted}, got {value!r}")


def _header(content: dict[str, Any], where: str) -> EvalHeader:
    check_entries(content, _HEADER_KINDS, where)
    if content["version"] != SCHEMA_VERSION:
        raise UsageError(f"{where}: version must be {SCHEMA_VERSION}, got {content['version']!r}")
    check_entries(content["model"], dict.fromkeys(MODEL_FACTS, (int,)), f"{where}: model")
    if content["configurations"].get(DENSE, "") is not None:
        raise UsageError(f"{where}: configurations must have {DENSE!r}, as null")
    for name, settings in content["configurations"].items():
        if name != DENSE and not isinstance(settings, dict):
            raise UsageError(f"{where}: configurations[{name!r}] must be an object")
        if settings and not isinstance(settings.get(PATTERN, {}), dict):
            raise UsageError(f"{where}: configurations[{name!r}].{PATTERN} must be an object")
    return EvalHeader(**content)


def _sample(content: dict[str, Any], header: EvalHeader, where: str) -> SampleResult:
    check_entries(content, _SAMPLE_KINDS, where)
    score, kept = content["score"], content["kept"]
    if score is not None and not 0 <= score <= 1:
        raise UsageError(f"{where}: score must be from 0 to 1, got {score}")
    for name, lowest in (("length", 0), ("index", 0), ("new_tokens", 0), ("prompt_tokens", 1)):
        if content[name] < lowest:
            raise UsageError(f"{where}: {name} must be at least {lowest}, got {content[name]}")
    for name, known in (("task", header.tasks), ("configuration", header.configurations)):
        if content[name] not in known:
            raise UsageError(f"{where}: {name} {content[name]!r} is not in the header")
    if kept is not None:
        _check_kept(kept, content["prompt_tokens"], header.model, where)
    return SampleResult(**content)


def _check_kept(kept: list[Any], prompt_tokens: int, model: Mapping[str, int], where: str) -> None:
    if len(kept) != model["num_layers"]:
        raise UsageError(
            f"{where}: kept must have {model['num_layers']} entries, one per layer; "
            f"got {len(kept)}"
        )
    for layer, entry in enumerate(kept):
        heads = entry if isinstance(entry, list) else [entry]
        wrong_length = isinstance(entry, list) and len(entry) != model["num_heads"]
        wrong = [n for n in heads if type(n) is not int or not 0 <= n <= prompt_tokens]
        if entry is not None and (wrong_length or wrong):
            raise UsageError(
                f"{where}: kept[{layer}] must be null, or one number from 0 to {prompt_tokens}, "
                f"or {model['num_heads']} of them; got {entry!r}"
            )
