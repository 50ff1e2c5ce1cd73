"""``tsa eval``: accuracy of sparse and dense prefill."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from token_sparse_attention.checks import check_apart, check_writable
from token_sparse_attention.cli.command import Command, counting, print_json, working
from token_sparse_attention.cli.model import ModelOptions, require_transformers
from token_sparse_attention.errors import UsageError, loading, resumable
from token_sparse_attention.evaluation import harness
from token_sparse_attention.evaluation.record import (
    EvalHeader,
    EvalResults,
    begin_with_dense,
    check_results,
    load_results,
    save_results,
)
from token_sparse_attention.evaluation.samples import SampleSet
from token_sparse_attention.options import Count, Option, Tokens
from token_sparse_attention.result_lines import held

if TYPE_CHECKING:
    from token_sparse_attention.evaluation.evaluate import Runner

_LENGTHS, _LIMIT = (4096,), 50
_RULER = f"ruler: the tasks of RULER that need no download: {', '.join(harness.LOCAL_RULER)}"
Names = Annotated[tuple[str, ...] | None, Option(metavar="NAMES")]
Result = Annotated[Path | None, Option(metavar="RESULT")]


@dataclass(frozen=True, kw_only=True)
class PreparedOptions:
    """Samples to prepare.

    Attributes:
        tasks: lm-eval's tasks or groups
        lengths: prompt lengths in tokens, for tasks made to a length
        limit: samples per task and length
        seed: another one draws other samples of RULER
        apply_chat_template: make prompts chats, for chat models
    """

    tasks: Annotated[Names, Option(default=_RULER)] = None
    lengths: Annotated[tuple[Tokens, ...] | None, Option(default="4096")] = None
    limit: Annotated[Count | None, Option(default=str(_LIMIT))] = None
    seed: Annotated[int | None, Option(default="0")] = None
    apply_chat_template: bool = False

    def prepare(self, tokenizer: Any, name: str) -> SampleSet:
        """Return the samples, for the tokenizer of that name."""
        if self.apply_chat_template and tokenizer.chat_template is None:
            raise UsageError("--apply-chat-template needs a tokenizer with a chat template")
        with working("preparing samples") as status:
            return harness.prepare(
                self.tasks or ("ruler",),
                self.lengths or _LENGTHS,
                self.limit or _LIMIT,
                tokenizer=tokenizer,
                tokenizer_name=name,
                seed=self.seed or 0,
                chat_template=self.apply_chat_template,
                report=status.update,
            )


@dataclass(frozen=True, kw_only=True)
class StoredOptions:
    """Samples of a file.

    Attributes:
        samples: take the samples from this file (.jsonl.gz)
        only_tasks: of those in --samples, only these
        only_lengths: of those in --samples, only these; others may be added to --out later
    """

    samples: Path | None = None
    only_tasks: Names = None
    only_lengths: tuple[Tokens, ...] | None = None

    def choose(self, samples: SampleSet) -> SampleSet:
        """Return the samples to run; a result names the file they are from, not the choice."""
        for option, asked, there in (
            ("--only-tasks", self.only_tasks, {sample.task for sample in samples.samples}),
            ("--only-lengths", self.only_lengths, {sample.length for sample in samples.samples}),
        ):
            unknown = [entry for entry in asked or () if entry not in there]
            if unknown:
                raise UsageError(
                    f"{option} must be among {', '.join(map(str, sorted(there)))} for these "
                    f"--samples, got {unknown[0]}"
                )
        chosen = [
            sample
            for sample in samples.samples
            if sample.task in (self.only_tasks or (sample.task,))
            and sample.length in (self.only_lengths or (sample.length,))
        ]
        return replace(samples, samples=chosen)


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Compare the accuracy of sparse and dense prefill on lm-evaluation-harness's tasks.

    Attributes:
        out: results; a run goes on there
        config: a sparse configuration; VALUE: default, published, profile (the model folder's
            token_sparse_profile.json), a profile that ships here (llama-3.1-8b-instruct,
            mistral-nemo-instruct-2407), a JSON file, or JSON; or a block-sparse pattern alone
            (flexprefill, minference, xattention, streaming; settings as JSON after a colon); or
            PATTERN+VALUE for both; dense for no sparse one; may be given several times
        prepare_only: only write the samples, to --samples
        score: only score the results in this file that have no score yet; needs --samples
        attention_backend: dense kernel: auto, fa4, flash, cudnn, efficient, math
        processes: load the model into N processes, which take turns with all visible GPUs;
            prefill times are then not those of an idle one
        dense_from: take the dense replies from these results, of the same model, dtype, kernel
            and samples, instead of making them again
    """

    name: ClassVar[str] = "eval"
    example: ClassVar[str] = (
        "tsa eval --lengths 2048,4096 --limit 10 --config published --out result.jsonl\n"
        "tsa eval --config flexprefill --config both=flexprefill+published --out result.jsonl\n"
        "tsa eval --prepare-only --samples samples.jsonl.gz     (where lm-eval is)\n"
        "tsa eval --samples samples.jsonl.gz --out result.jsonl (where the GPU is)\n"
        "tsa eval --samples samples.jsonl.gz --score result.jsonl"
    )
    model: ModelOptions
    out: Path | None = None
    config: Annotated[
        tuple[str, ...],
        Option(metavar="NAME=VALUE", default="the model's profile, else default", repeat=True),
    ] = ()
    prepared: PreparedOptions
    stored: StoredOptions
    prepare_only: bool = False
    score: Result = None
    attention_backend: Annotated[str, Option(metavar="NAME")] = "auto"
    processes: Count = 1
    dense_from: Result = None

    def run(self) -> bool:
        """Prepare samples, run them, or score replies."""
        self._check()
        self._check_outputs()
        samples = self.stored.samples
        if samples and self.score:
            return self._score(self.score, samples)
        require_transformers()
        if samples and self.prepare_only:
            return self._prepare_only(samples)
        return self._evaluate(self.out)  # type: ignore[arg-type]

    def _check(self) -> None:
        """Refuse options that do not go together."""
        self._check_backend()
        elsewhere = self.prepare_only or self.score is not None
        stored = self.stored
        if elsewhere and not stored.samples:
            raise UsageError("--prepare-only and --score need --samples FILE")
        given = [name for name, value in vars(self.prepared).items() if value not in (None, False)]
        if stored.samples and not self.prepare_only and given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} only matters where samples are prepared, but "
                "--samples gives them; leave one of the two out"
            )
        without = elsewhere or not stored.samples
        if without and (stored.only_tasks is not None or stored.only_lengths is not None):
            raise UsageError("--only-tasks and --only-lengths choose from --samples what to run")
        if without and self.dense_from:
            raise UsageError("--dense-from needs --samples, the file that those results are about")
        if not (self.out or elsewhere):
            raise UsageError("--out FILE is needed, for the results")
        if self.model.device_map and self.processes > 1:
            raise UsageError(
                "--processes must be 1 with --device-map, which has one process use all GPUs; "
                f"got {self.processes}"
            )

    def _check_outputs(self) -> None:
        """Refuse files that could not be written, or gone on with."""
        if self.out and not self.score:
            reads = (self.stored.samples, self.dense_from)
            check_apart({"--out": self.out}, filter(None, reads))
        if self.score:
            if self.score.is_file():  # what is missing is told when it is read
                check_writable(self.score, f"--score {self.score}")
        elif self.prepare_only and self.stored.samples:
            check_writable(self.stored.samples, f"--samples {self.stored.samples}")
        elif self.out:
            check_results(self.out)

    def _check_backend(self) -> None:
        from token_sparse_attention.attention.names import BACKENDS, parse_backend

        try:
            backend = parse_backend(self.attention_backend)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--attention-backend: {error}") from error
        if backend not in BACKENDS:
            raise UsageError(
                "--attention-backend must name a dense kernel, which the dense replies run on "
                f"too; patterns are configurations: --config {backend} or --config "
                f"NAME={backend}+VALUE"
            )

    def _score(self, path: Path, samples: Path) -> bool:
        from token_sparse_attention.evaluation.evaluate import score

        with held(path), working("scoring"):
            results, sample_set = load_results(path), SampleSet.load(samples)
            results = score(results, sample_set, harness.Scorer(sample_set))
            save_results(path, results)
        return self._show(results, path)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name, trusted = self.model.path, self.model.trust_remote_code
        self.model.check()
        with working(f"loading the tokenizer of {name}"), loading(name):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)

    def _prepare_only(self, path: Path) -> bool:
        samples = self.prepared.prepare(self._tokenizer(), self.model.recorded)
        samples.save(path)
        if self.json:
            print_json({"samples": str(path), "count": len(samples.samples)})
        else:
            print(f"{path}: {len(samples.samples)} samples")
        return True

    def _evaluate(self, out: Path) -> bool:
        from token_sparse_attention.evaluation.evaluate import Runner, make_header
        from token_sparse_attention.evaluation.settings import read_runs

        configurations = read_runs(self.config, self.model.path)
        dense = load_results(self.dense_from) if self.dense_from else None
        if self.stored.samples:
            samples = SampleSet.load(self.stored.samples)
            self.stored.choose(samples)
        else:  # before the model: what cannot be prepared is told at once
            samples = self.prepared.prepare(self._tokenizer(), self.model.recorded)
        scorer = harness.Scorer(samples) if harness.installed_version() else None
        with working(f"loading {self.model.path}"):
            model, tokenizer = self.model.load()
        runner = Runner(model, tokenizer, configurations, self.model.impl, self.attention_backend)
        header = make_header(runner, samples, self.model.name, self.processes)
        if dense:
            header = begin_with_dense(out, header, dense)
        return self._show(self._replies(runner, samples, scorer, out, header), out)

    def _replies(
        self,
        runner: Runner,
        samples: SampleSet,
        scorer: harness.Scorer | None,
        out: Path,
        header: EvalHeader,
    ) -> EvalResults:
        """Evaluate, and show how far it is."""
        from token_sparse_attention.evaluation import processes
        from token_sparse_attention.evaluation.evaluate import evaluate

        samples = self.stored.choose(samples)
        source = None
        if self.processes > 1:
            model = self.model
            source = processes.several(runner, self.processes, model.path, model.loading)
        total = len(samples.samples) * len(runner.names)
        with counting(total) as report, resumable("the evaluation", out):
            return evaluate(
                runner, samples, header, out, scorer=scorer, source=source, report=report
            )

    def _show(self, results: EvalResults, path: Path) -> bool:
        from token_sparse_attention.evaluation.show import show

        show(results, path, as_json=self.json)
        return True
