"""``tsa fidelity``: what sparse prefill costs on a model and a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from token_sparse_attention import bundled
from token_sparse_attention.checks import check_apart, check_writable
from token_sparse_attention.cli.command import Command, counting, working
from token_sparse_attention.cli.model import (
    DenseKernel,
    ModelOptions,
    check_length,
    read_text,
    require_transformers,
)
from token_sparse_attention.errors import UsageError, resumable, tokenizing
from token_sparse_attention.options import Count, Option, Tokens
from token_sparse_attention.records import check_choice, save

if TYPE_CHECKING:
    from token_sparse_attention.evaluation.evaluate import Runner
    from token_sparse_attention.evaluation.settings import Configuration
    from token_sparse_attention.fidelity.prompts import Prompt
    from token_sparse_attention.fidelity.record import FidelityResults

_SHAPES = "continue,recall,recall-first,lookup,second-turn"


@dataclass(frozen=True, kw_only=True)
class Fidelity(Command):
    """Compare a model's answers after sparse and dense prefill, on your text, without labels.

    Attributes:
        text: text to make prompts from; may be repeated
        lengths: prompt lengths in tokens
        pieces: pieces of text per length; a prompt of every shape is made from each
        shapes: what follows a prompt
        config: a sparse configuration, a block-sparse pattern, or both, as in tsa eval; may be
            given several times
        crossover: run dense where sparse would not be faster, as the settings say; without it
            short prompts show what long ones will do
        seed: of what is asked
        attention_backend: dense kernel
        out: results; a run goes on there
        plot: draw divergence against time to first token; .svg or .png
    """

    name: ClassVar[str] = "fidelity"
    example: ClassVar[str] = (
        "tsa fidelity HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "tsa fidelity Qwen/Qwen2.5-Coder-0.5B-Instruct --text notes.txt --text code.py \\\n"
        "  --lengths 8192,31744 --pieces 16 --config default --config profile.json \\\n"
        "  --config flexprefill --out fidelity.jsonl --plot fidelity.svg"
    )
    model: ModelOptions
    text: Annotated[
        tuple[str, ...],
        Option(metavar="FILE", default="code and prose that ship here", repeat=True),
    ] = ()
    lengths: Annotated[tuple[Tokens, ...], Option(minimum=256)] = (4096,)
    pieces: Count = 2
    shapes: Annotated[tuple[str, ...] | None, Option(metavar="NAMES", default=_SHAPES)] = None
    config: Annotated[
        tuple[str, ...],
        Option(metavar="NAME=VALUE", default="the model's profile, else default", repeat=True),
    ] = ()
    crossover: bool = False
    seed: int = 0
    attention_backend: DenseKernel = "auto"
    out: Annotated[Path | None, Option(metavar="RESULT.jsonl")] = None
    plot: Path | None = None

    def run(self) -> bool:
        """Make prompts, measure, and show what came out."""
        self.model.check()
        texts = self._texts()
        self._check_outputs()
        require_transformers()
        from token_sparse_attention.evaluation.evaluate import Runner
        from token_sparse_attention.evaluation.settings import read_runs
        from token_sparse_attention.fidelity import show

        configurations = read_runs(self.config, self.model.path)
        if not configurations:
            raise UsageError("--config must name a sparse configuration; dense runs by itself")
        if not self.crossover:
            configurations = {name: _eager(run) for name, run in configurations.items()}
        with working(f"loading {self.model.path}") as status:
            model, tokenizer = self.model.load()
            status.update("making prompts")
            with tokenizing():
                prompts = self._prompts(tokenizer, texts)
        _check_prompts(model, prompts)
        runner = Runner(model, tokenizer, configurations, self.model.impl, self.attention_backend)
        results = self._measure(runner, prompts, texts)
        show.show(results, as_json=self.json)
        if self.plot:
            save(self.plot, show.draw(results, self.plot.suffix))
        return True

    def _texts(self) -> dict[str, str]:
        if not self.text:
            return {f"bundled {path.name}": read_text("--text", path) for path in bundled.SAMPLE}
        return {path: read_text("--text", path) for path in self.text}

    def _check_outputs(self) -> None:
        """Refuse files that could not be written, or gone on with."""
        from token_sparse_attention.fidelity.prompts import SHAPES

        for shape in self.shapes or ():
            check_choice("--shapes", shape, SHAPES)
        check_apart({"--out": self.out, "--plot": self.plot}, self.text)
        if self.plot:
            from token_sparse_attention.plots import check_plot

            check_plot(self.plot)
            check_writable(self.plot, f"--plot {self.plot}")
        if self.out:
            from token_sparse_attention.fidelity.record import FILES

            FILES.check_file(self.out)

    def _prompts(self, tokenizer: Any, texts: dict[str, str]) -> list[Prompt]:
        from token_sparse_attention.fidelity.prompts import SHAPES, PromptMaker

        maker = PromptMaker(tokenizer, texts, self.seed)
        shapes = self.shapes or tuple(SHAPES)
        return [
            prompt for length in self.lengths for prompt in maker.make(length, self.pieces, shapes)
        ]

    def _measure(
        self, runner: Runner, prompts: list[Prompt], texts: dict[str, str]
    ) -> FidelityResults:
        """Measure, and show how far it is."""
        from token_sparse_attention.fidelity.measure import make_header, measure

        asked = {name: self.asked[name] for name in ("lengths", "pieces", "seed")}
        shapes = sorted({part.shape for prompt in prompts for part in prompt.parts})
        header = make_header(runner, self.model.name, texts, shapes=shapes, **asked)
        total = len(prompts) * len(runner.names)
        with counting(total) as report, resumable("the measurement", self.out):
            return measure(runner, prompts, header, self.out, report)


def _eager(run: Configuration) -> Configuration:
    """Return a configuration that never runs dense for speed."""
    from token_sparse_attention.profile import without_crossover

    return run if run.settings is None else replace(run, settings=without_crossover(run.settings))


def _check_prompts(model: Any, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that the model cannot read; warn once of too long ones."""
    import torch

    from token_sparse_attention.run import check_prompt

    for prompt in prompts:
        check_prompt(model, torch.tensor([prompt.ids]), len(prompt.follow))
    longest = max(prompts, key=lambda prompt: len(prompt.ids) + len(prompt.follow))
    check_length(model, torch.tensor([longest.ids]), len(longest.follow))
