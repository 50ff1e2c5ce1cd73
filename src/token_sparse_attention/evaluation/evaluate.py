"""Run every configuration on the same samples, and score what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from token_sparse_attention import bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation import generate
from token_sparse_attention.evaluation.generate import Reply
from token_sparse_attention.evaluation.record import (
    DENSE,
    EvalHeader,
    EvalResults,
    Key,
    SampleResult,
    open_results,
)
from token_sparse_attention.evaluation.samples import Sample, SampleSet
from token_sparse_attention.evaluation.settings import Configuration, settings_dicts
from token_sparse_attention.info import provenance
from token_sparse_attention.inputs import check_dense_heads
from token_sparse_attention.integrations.implementation import use_own_kernels
from token_sparse_attention.profile import layer_configs

Arrival = tuple[Sample, str, Reply]  # a configuration's reply to a sample


class Source(Protocol):
    """What gives the replies: `replies` in this process, or others."""

    def __call__(
        self, samples: Sequence[Sample], done: Collection[Key], report: Callable[[str], object]
    ) -> Generator[Arrival, None, None]:
        """Yield a reply for each sample and configuration that is not done."""


class SampleScorer(Protocol):
    """What scores replies: `harness.Scorer`, where lm-eval is installed."""

    def score(self, sample: Sample, reply: str) -> float:
        """Return the score of a reply, from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model that replies under named configurations.

    On CUDA, dense layers run on this library's dense kernels too, so that times compare
    sparsity and not kernels.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        configurations: the sparse ones; the dense one comes first, by itself.
        impl: see `token_sparse_attention`.
        attention_backend: the kernel of dense attention; patterns are in configurations.

    Raises:
        UsageError: if a configuration names a layer that the model does not have.
    """

    model: Any
    tokenizer: Any
    configurations: Mapping[str, Configuration]
    impl: str = "auto"
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        facts = self.facts()
        for name, run in self.configurations.items():
            if run.settings is None:
                continue
            try:
                for config in layer_configs(run.settings, facts["num_layers"]).values():
                    check_dense_heads(config, facts["num_heads"])
            except ValueError as error:
                raise UsageError(f"--config {name} does not fit the model: {error}") from error
        use_own_kernels(self.model, self.attention_backend)

    @property
    def on_cuda(self) -> bool:
        """Whether the model is on a CUDA device."""
        return bool(self.model.device.type == "cuda")

    @property
    def names(self) -> list[str]:
        """All configurations, the dense one first."""
        return [DENSE, *self.configurations]

    def facts(self) -> dict[str, int]:
        """Return the `MODEL_FACTS`."""
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        return {
            "num_layers": config.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }

    def encode(self, sample: Sample) -> Tensor:
        """Return a sample's token ids ``[1, S]``."""
        return generate.encode(self.model, self.tokenizer, sample.prompt, sample.max_new_tokens)

    def reply(
        self, sample: Sample, ids: Tensor, name: str, drafts: Sequence[Sequence[int]]
    ) -> Reply:
        """Reply to a sample under a configuration.

        Args:
            sample: says when a reply ends.
            ids: the sample, encoded.
            name: of the configuration.
            drafts: see `generate.reply`.

        Raises:
            UsageError: if the configuration cannot be run on the model.
        """
        end = generate.ending(self.model, self.tokenizer, sample.until, sample.max_new_tokens)
        run = self.configurations.get(name, Configuration())
        try:
            return generate.reply(
                self.model,
                ids,
                run.settings,
                end,
                pattern=run.pattern,
                drafts=drafts,
                impl=self.impl,
                attention_backend=self.attention_backend,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"the configuration {name!r} cannot be run: {error}") from error


def make_header(
    runner: Runner, samples: SampleSet, model: str | None, processes: int = 1, **more: Any
) -> EvalHeader:
    """Return the header of the runner's results.

    Args:
        runner: the model and the configurations.
        samples: all of the samples that replies may be to.
        model: what was asked for, None for the bundled model.
        processes: how many share the devices.
        more: what else tells what was asked for.
    """
    about = provenance(str(runner.model.device))
    about["versions"]["lm-eval"] = samples.lm_eval
    return EvalHeader(
        provenance=about,
        arguments={
            "model": model or bundled.NAME,
            "dtype": str(runner.model.dtype).removeprefix("torch."),
            "impl": runner.impl,
            "attention_backend": runner.attention_backend,
            "lengths": samples.lengths,
            "limit": samples.limit,
            "seed": samples.seed,
            "chat_template": samples.chat_template,
            "samples_sha256": samples.digest(),
            **({"processes": processes} if processes > 1 else {}),
            **more,
        },
        model=runner.facts(),
        configurations=settings_dicts(runner.configurations),
        tasks=samples.tasks,
    )


def evaluate(
    runner: Runner,
    samples: SampleSet,
    header: EvalHeader,
    path: Path,
    *,
    scorer: SampleScorer | None,
    source: Source | None = None,
    report: Callable[[str, int], object] = lambda *_: None,
) -> EvalResults:
    """Reply to every sample densely and under each configuration, and write the results.

    What the file holds already is not done again.

    Args:
        runner: the model and the configurations.
        samples: what to reply to.
        header: the first line of the result file.
        path: the result file.
        scorer: scores the replies; None leaves them without a score.
        source: gives the replies; None for the runner itself.
        report: is told what runs next, and how many of the results wanted there are.

    Raises:
        UsageError: if the file belongs to another run, or a configuration cannot be run.
    """
    results, file = open_results(path, header)
    done = {result.key for result in results}
    wanted = {(*_key(sample), name) for sample in samples.samples for name in runner.names}
    others = len(done - wanted)  # a file may hold samples that are not asked for now
    left = {key[:3] for key in wanted - done}
    todo = [sample for sample in samples.samples if _key(sample) in left]

    def tell(what: str) -> None:
        report(what, len(results) - others)

    tell("starting")
    arriving = (source or partial(replies, runner))(todo, done, tell)
    with file, closing(arriving):
        for sample, name, reply in arriving:
            result = _result(sample, name, reply, scorer)
            file.write(result)
            results.append(result)
    tell("done")
    return EvalResults(header, tuple(results))


def replies(
    runner: Runner,
    samples: Sequence[Sample],
    done: Collection[Key],
    report: Callable[[str], object],
    *,
    shared: bool = False,
) -> Generator[Arrival, None, None]:
    """Yield the replies to each sample, densely first and then under each configuration.

    A sample's earlier replies are the drafts of its later ones.

    Args:
        runner: the model and the configurations.
        samples: what to reply to.
        done: keys of replies that are not wanted.
        report: is told what runs next.
        shared: whether other processes use the device, so that times are not worth a warm-up.
    """
    warm = not runner.on_cuda or shared
    for sample in samples:
        names = [name for name in runner.names if (*_key(sample), name) not in done]
        if not names:
            continue
        ids = runner.encode(sample)
        drafts: list[list[int]] = []
        for name in names:
            report(f"{sample.task} {sample.length or ''}, {name}")
            if not warm:  # kernels are compiled now, not in the first result's time
                for each in runner.names:
                    runner.reply(sample, ids, each, [])
                warm = True
            reply = runner.reply(sample, ids, name, tuple(drafts))
            drafts.append(reply.tokens)
            yield sample, name, reply


def _key(sample: Sample) -> tuple[str, int, int]:
    return sample.task, sample.length, sample.index


def score(results: EvalResults, samples: SampleSet, scorer: SampleScorer) -> EvalResults:
    """Return results with scores where they had none.

    Raises:
        UsageError: if the results are about other samples.
    """
    if results.header.arguments.get("samples_sha256") != samples.digest():
        raise UsageError("--samples must be the file that the results were made from")
    by_key = {_key(sample): sample for sample in samples.samples}
    scored = [
        dataclasses.replace(result, score=scorer.score(by_key[result.key[:3]], result.reply))
        if result.score is None
        else result
        for result in results.samples
    ]
    return EvalResults(results.header, tuple(scored))


def _result(sample: Sample, name: str, reply: Reply, scorer: SampleScorer | None) -> SampleResult:
    return SampleResult(
        task=sample.task,
        length=sample.length,
        index=sample.index,
        configuration=name,
        score=None if scorer is None else scorer.score(sample, reply.text),
        reply=reply.text,
        prompt_tokens=reply.prompt_tokens,
        kept=reply.kept,
        new_tokens=len(reply.tokens),
        seconds=reply.seconds,
    )
