"""Prefill densely and sparsely, run the answer on both caches in one pass, and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention import bundled
from token_sparse_attention.calibration.sensitivity import token_divergences
from token_sparse_attention.errors import JobFailedError, UsageError, within_memory
from token_sparse_attention.evaluation import generate
from token_sparse_attention.evaluation.evaluate import Runner
from token_sparse_attention.evaluation.generate import Prefill
from token_sparse_attention.evaluation.record import DENSE
from token_sparse_attention.evaluation.settings import Configuration, settings_dicts
from token_sparse_attention.fidelity.prompts import Prompt
from token_sparse_attention.fidelity.record import (
    FILES,
    AnswerResult,
    FidelityHeader,
    FidelityResults,
    Key,
)
from token_sparse_attention.info import provenance

_DIGITS = 6  # of the numbers that are recorded


class Comparison(NamedTuple):
    """What is recorded of an answer's tokens; see `AnswerResult`."""

    divergence: list[float]
    agreement: list[bool]
    loss: list[float]


def compare(dense: Tensor, sparse: Tensor, answer: Sequence[int]) -> Comparison:
    """Compare the predictions of an answer's tokens.

    Args:
        dense: ``[N, V]`` log-probabilities of the N tokens.
        sparse: ``[N, V]``, after a sparse prefill.
        answer: the tokens.

    Raises:
        ValueError: if a divergence or a loss is not finite.
    """
    tokens = torch.tensor(answer, device=sparse.device)
    losses = -sparse.gather(1, tokens[:, None])[:, 0]
    if not losses.isfinite().all():
        raise ValueError("the model's logits of the answer must be finite, but one is not")
    return Comparison(
        _rounded(token_divergences(dense, sparse).clamp(min=0)),
        (dense.argmax(-1) == sparse.argmax(-1)).tolist(),
        _rounded(losses),
    )


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


@torch.no_grad()
def predictions(model: Any, read: Prefill, follow: Sequence[int]) -> Tensor:
    """Return the log-probabilities ``[N, V]`` of the N tokens that follow a prefill."""
    logits = [read.logits[None]]
    if len(follow) > 1:
        given = torch.tensor([follow[:-1]], device=model.device)
        logits.append(model(given, past_key_values=read.cache, use_cache=True).logits[0])
    return torch.cat(logits).float().log_softmax(-1)


def make_header(
    runner: Runner, model: str | None, texts: Mapping[str, str], **more: Any
) -> FidelityHeader:
    """Return the header of the runner's results.

    Args:
        runner: the model and the configurations.
        model: what was asked for, None for the bundled model.
        texts: name -> text.
        more: what else was asked for.
    """
    return FidelityHeader(
        provenance=provenance(str(runner.model.device)),
        arguments={
            "model": model or bundled.NAME,
            "dtype": str(runner.model.dtype).removeprefix("torch."),
            "impl": runner.impl,
            "attention_backend": runner.attention_backend,
            **more,
        },
        model=runner.facts(),
        configurations=settings_dicts(runner.configurations),
        texts={name: hashlib.sha256(t.encode()).hexdigest() for name, t in texts.items()},
    )


def measure(
    runner: Runner,
    prompts: Sequence[Prompt],
    header: FidelityHeader,
    path: Path | None,
    report: Callable[[str, int], object] = lambda *_: None,
) -> FidelityResults:
    """Measure every prompt under every configuration.

    Args:
        runner: the model and the configurations.
        prompts: what to read.
        header: the first line of the result file.
        path: the result file, None for none; what it holds already is not done again.
        report: is told what runs next, and how many prefills are done.

    Raises:
        UsageError: if the file belongs to another run, or a configuration cannot be run.
        JobFailedError: if the model computes something that is no number.
    """
    results, file = ([], None) if path is None else FILES.open(path, header)
    known = {result.key for result in results}
    done = 0
    try:
        for number, prompt in enumerate(prompts, 1):
            for step in _of_prompt(runner, prompt, known):
                if isinstance(step, str):
                    report(f"{_name(prompt)}, {step}", done)
                    done = min(done + 1, number * len(runner.names))
                    continue
                results.append(step)
                if file is not None:
                    file.write(step)
            done = number * len(runner.names)
        report("done", done)
    finally:
        if file is not None:
            file.close()
    return FidelityResults(header, tuple(results))


def _name(prompt: Prompt) -> str:
    shapes = " and ".join(part.shape for part in prompt.parts)
    return f"{prompt.length:,} tokens, {shapes} {prompt.index + 1}"


def _of_prompt(
    runner: Runner, prompt: Prompt, known: Collection[Key]
) -> Iterator[str | AnswerResult]:
    """Yield the name of each configuration before it runs, and then its results.

    The dense one runs wherever a result is missing, as the others are compared with it.
    """
    missing = {
        name: [part for part in prompt.parts if _key(prompt, part.shape, name) not in known]
        for name in runner.names
    }
    if not any(missing.values()):
        return
    if runner.on_cuda and not known and prompt.index == 0:  # kernels are compiled now
        for name in runner.names:
            yield f"warming up {name}"
            _prefill(runner, prompt, name)
    dense: Tensor | None = None
    for name in runner.names:
        if name != DENSE and not missing[name]:
            continue
        yield name
        with within_memory(prompt.length, name):
            read = _prefill(runner, prompt, name)
            log_probs = predictions(runner.model, read, prompt.follow)
            dense = log_probs if dense is None else dense
            for part in missing[name]:
                rows = slice(part.begin, part.end)
                try:
                    found = compare(dense[rows], log_probs[rows], prompt.follow[rows])
                except ValueError as error:
                    raise JobFailedError(f"{name!r} on {_name(prompt)}: {error}") from error
                yield AnswerResult(
                    shape=part.shape,
                    length=prompt.length,
                    index=prompt.index,
                    configuration=name,
                    source=prompt.source,
                    kept=read.kept,
                    seconds=read.seconds,
                    **found._asdict(),
                )


def _key(prompt: Prompt, shape: str, name: str) -> Key:
    return prompt.length, shape, prompt.index, name


def _prefill(runner: Runner, prompt: Prompt, name: str) -> Prefill:
    run = runner.configurations.get(name, Configuration())
    try:
        return generate.prefill(
            runner.model,
            torch.tensor([prompt.ids]),
            run.settings,
            pattern=run.pattern,
            impl=runner.impl,
            attention_backend=runner.attention_backend,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"the configuration {name!r} cannot be run: {error}") from error
