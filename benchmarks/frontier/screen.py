"""How likely the right answers are under several settings: less noisy than replies' scores.

    python -m benchmarks.frontier.screen --samples samples.jsonl.gz --points points.json \\
        --out result.jsonl --processes 6

The points are ``{"name": {...}}``, each settings or a layer profile. The result is a file of
`tsa eval` whose scores are probabilities of the right answer, and goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, positive, run_command
from benchmarks.frontier.answers import Likelihood, likelihood
from rich.console import Console
from rich.progress import Progress

from token_sparse_attention import bundled, run
from token_sparse_attention.evaluation import processes
from token_sparse_attention.evaluation.evaluate import Runner, evaluate, make_header
from token_sparse_attention.evaluation.generate import Reply
from token_sparse_attention.evaluation.samples import Sample, SampleSet
from token_sparse_attention.evaluation.settings import Configuration
from token_sparse_attention.profile import settings_from_json


@dataclasses.dataclass(frozen=True)
class AnswerRunner(Runner):
    """A runner whose replies are the right answers' negative log-likelihoods."""

    def reply(self, sample: Sample, ids: Any, name: str, drafts: Sequence[Sequence[int]]) -> Reply:  # noqa: ARG002
        """Return the answer's negative log-likelihood under a configuration."""
        settings = self.configurations.get(name, Configuration()).settings
        return likelihood(self.model, self.tokenizer, ids, sample, settings)


def load_runner(model: str, options: dict[str, Any], points: dict[str, Any]) -> AnswerRunner:
    """Load the model and return its runner under the points."""
    configurations = {
        name: Configuration(settings_from_json(json.dumps(point), name))
        for name, point in points.items()
    }
    return AnswerRunner(*run.load_model(model, **options), configurations)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the points that the command line names."""
    parser = make_parser("benchmarks.frontier.screen", __doc__)
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--points", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=positive, default=1)
    return run_command(parser, _run, argv)


def _run(args: Namespace) -> bool:
    samples, points = SampleSet.load(args.samples), json.loads(args.points.read_text())
    model = args.model or str(bundled.MODEL)
    load = partial(load_runner, model, {"device": args.device}, points)
    runner = load()
    header = make_header(runner, samples, args.model, args.processes, answers=True)
    several = args.processes > 1
    source = partial(processes.spread, load, args.processes) if several else None
    if several:
        runner.model.to("cpu")
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=len(samples.samples) * len(runner.names))
        evaluate(
            runner,
            samples,
            header,
            args.out,
            scorer=Likelihood(),
            source=source,
            report=lambda what, done: progress.update(bar, description=what, completed=done),
        )
    return True


if __name__ == "__main__":
    sys.exit(main())
