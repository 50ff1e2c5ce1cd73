"""Accuracy of the method's variants, which the library does not have, on samples of `tsa eval`.

    python -m benchmarks.frontier.screen --samples samples.jsonl.gz --points points.json \\
        --out result.jsonl --processes 6

The points are ``{"name": {"config": {...}, "variant": {...}}}``, with settings or a layer profile
as the config; the result is a file of `tsa eval`, which scores it (``tsa eval --score``) and goes
on from it. With ``--answers`` a score is the probability of the right answer instead of a reply's
score.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.frontier.answers import Likelihood, likelihood
from benchmarks.frontier.variants import Variant, varied
from rich.console import Console
from rich.progress import Progress

from token_sparse_attention import TokenSparseConfig, bundled, run
from token_sparse_attention.config import LayerProfile
from token_sparse_attention.evaluation import harness, processes
from token_sparse_attention.evaluation.evaluate import (
    Runner,
    SampleScorer,
    evaluate,
    make_header,
)
from token_sparse_attention.evaluation.generate import Reply
from token_sparse_attention.evaluation.samples import Sample, SampleSet
from token_sparse_attention.evaluation.settings import Configuration
from token_sparse_attention.named_settings import Settings


@dataclasses.dataclass(frozen=True)
class VariantRunner(Runner):
    """A runner some of whose configurations are variants."""

    variants: Mapping[str, Variant] = dataclasses.field(default_factory=dict)
    answers: bool = False

    def reply(self, sample: Sample, ids: Any, name: str, drafts: Sequence[Sequence[int]]) -> Reply:
        """Reply under a configuration, varied where it is a variant."""
        variant = self.variants.get(name)
        with nullcontext() if variant is None else varied(variant):
            if self.answers:
                settings = self.configurations.get(name, Configuration()).settings
                return likelihood(self.model, self.tokenizer, ids, sample, settings)
            return super().reply(sample, ids, name, drafts)


def load_runner(
    model: str, options: dict[str, Any], points: dict[str, Any], answers: bool
) -> VariantRunner:
    """Load the model and return its runner under the points."""
    return VariantRunner(
        *run.load_model(model, **options),
        {name: Configuration(_settings(point["config"])) for name, point in points.items()},
        variants={
            name: Variant(**point["variant"]) for name, point in points.items() if point["variant"]
        },
        answers=answers,
    )


def _settings(config: dict[str, Any]) -> Settings:
    """A layer profile has a version, as in files."""
    if "version" in config:
        return LayerProfile.from_json(json.dumps(config))
    return TokenSparseConfig.from_dict(config)


def main() -> None:
    """Run the points that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--points", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--answers", action="store_true", help="score the answer's probability")
    args = parser.parse_args()
    samples, points = SampleSet.load(args.samples), json.loads(args.points.read_text())
    model = args.model or str(bundled.MODEL)
    load = partial(load_runner, model, {"device": args.device}, points, args.answers)
    runner = load()
    variants = {name: dataclasses.asdict(variant) for name, variant in runner.variants.items()}
    measured = {"answers": True} if args.answers else {}
    header = make_header(
        runner, samples, args.model, args.processes, variants=variants, **measured
    )
    several = args.processes > 1
    source = partial(processes.spread, load, args.processes) if several else None
    if several:
        runner.model.to("cpu")
    scorer: SampleScorer | None = Likelihood() if args.answers else None
    if scorer is None and harness.installed_version():
        scorer = harness.Scorer(samples)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting", total=len(samples.samples) * len(runner.names))
        evaluate(
            runner,
            samples,
            header,
            args.out,
            scorer=scorer,
            source=source,
            report=lambda what, done: progress.update(bar, description=what, completed=done),
        )


if __name__ == "__main__":
    main()
