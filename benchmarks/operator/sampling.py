"""Key sampling stage by stage: windows, sinks, sampled keys, and dense last queries.

    python -m benchmarks.operator.sampling --out benchmarks/results/far.json
    python -m benchmarks.operator.sampling --lengths 131072 --samples 4096

The times give the constants of `crossover` for sampled keys and dense queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from benchmarks.command import (
    add_lists,
    add_measuring_arguments,
    make_parser,
    measured,
    op_options,
    positive,
    run_command,
)
from benchmarks.operator.sampling_tables import SAMPLING, SAMPLING_TABLES, WINDOW

from token_sparse_attention.attention.names import BACKENDS
from token_sparse_attention.attention.output import new_output
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.benchmark import checks
from token_sparse_attention.benchmark.contenders import dense_call
from token_sparse_attention.benchmark.op import Contender, Point, Report, prefixed
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.impls import resolve_impl
from token_sparse_attention.inputs import AuxRequest, Problem, real_tokens
from token_sparse_attention.methods.local import attend_windows
from token_sparse_attention.methods.sampling import sample
from token_sparse_attention.scoring import score_tokens

LENGTHS = (65536, 131072)
SAMPLES, SINKS, DENSE_QUERIES = (1024, 4096, 8192), (4096,), (128,)
_CONFIG = KVSamplingConfig(
    sliding_window=512, sink_size=0, num_samples=0, dense_queries=0, crossover="off"
)


@dataclass(frozen=True)
class SamplingOptions:
    """What to measure.

    Attributes:
        common: device, lengths, shape and budget; of its backends only the first is read, the
            dense kernel, which also attends within the windows.
        samples: numbers of sampled keys.
        sinks: numbers of first keys, which every query sees: the most that sampled keys can cost.
        dense_queries: numbers of last queries that attend to every key.
    """

    common: OpOptions
    samples: tuple[int, ...] = SAMPLES
    sinks: tuple[int, ...] = SINKS
    dense_queries: tuple[int, ...] = DENSE_QUERIES

    def settings(self) -> dict[str, KVSamplingConfig]:
        """Return what is measured, by name; the middle number of samples in every combination."""
        found = {WINDOW: _CONFIG}
        for count in self.sinks:
            found[f"sinks-{count}"] = replace(_CONFIG, sink_size=count)
        for count in self.samples:
            found[f"samples-{count}"] = replace(_CONFIG, num_samples=count)
        main = WINDOW
        if self.samples:
            main = f"samples-{self.samples[len(self.samples) // 2]}"
            found[f"{main}-per-head"] = replace(found[main], budget="per_head")
        for count in self.dense_queries:
            found[f"{main}-dense-{count}"] = replace(found[main], dense_queries=count)
        return found


def measure(options: SamplingOptions, report: Report = lambda _: None) -> Iterator[Record]:
    """Yield every record of a run, in order; `report` is told what is being measured.

    Raises:
        UsageError: if the dense kernel cannot run.
    """
    for seq_len in options.common.lengths:
        point = Point(options.common, seq_len, "far")
        say = prefixed(report, seq_len)
        backend = options.common.dense[0]
        say(f"dense, {backend}")
        try:
            dense = dense_call(backend, point.inputs)
            verdict = checks.check_dense(point.inputs, dense())
        except ValueError as error:
            raise UsageError(f"--dense: {error}") from error
        point.reference_error = verdict.allowance
        yield from point.timed(Contender(f"far/dense/{backend}", dense, verdict))
        yield from _stages(options, point, say)
        yield from _whole(options, point, say)


def _stages(options: SamplingOptions, point: Point, say: Report) -> Iterator[Record]:
    """Time scoring; sampling; windows with and without sampled keys in turns."""
    query, key, value = point.inputs
    backend = resolve_backend(options.common.dense[0], query, key)
    impl = resolve_impl("auto", query, query.shape[-1])
    tokens = real_tokens(None, 1, point.seq_len, query.device, on_device=impl == "triton")
    of = (query, key, value, tokens, point.inputs.scale, impl)
    problem = Problem(*of, head_chunk=None, tp_group=None, aux=AuxRequest())
    every = torch.ones(1, dtype=torch.bool, device=query.device)
    say("scoring")
    score = partial(score_tokens, query, key, _CONFIG.num_probes)
    yield from point.timed(Contender("far/score", score))
    scores = score()
    sampling, windows = [], []
    into = new_output(problem)
    for name, config in options.settings().items():
        if config.dense_queries:
            continue
        choose = partial(sample, scores, config, tokens, impl)
        if name != WINDOW:
            sampling.append(Contender(f"{SAMPLING}{name}", choose))
        sampled, _ = choose()
        attend = partial(
            attend_windows, problem, sampled, every, into,
            window=config.sliding_window, backend=backend,
        )  # fmt: skip
        windows.append(Contender(f"far/windows/{name}", attend))
    say("sampling keys")
    yield from point.timed(*sampling)
    say("windows and sampled keys")
    yield from point.timed(*windows)


def _whole(options: SamplingOptions, point: Point, say: Report) -> Iterator[Record]:
    """Check the operator under every setting, and time all in turns."""
    contenders = []
    for name, config in options.settings().items():
        say(f"whole operator, {name}")
        call = partial(
            token_sparse_attention,
            *point.inputs,
            config,
            execution=Execution("auto", options.common.dense[0]),
        )
        out, selection, _ = call(return_aux=AuxRequest(selection=True))
        verdict = checks.check_sparse(
            point.inputs, out, selection, config, reference_error=point.reference_error
        )
        del out, selection
        contenders.append(Contender(f"far/whole/{name}", call, verdict))
    try:
        yield from point.timed(*contenders)
    except torch.OutOfMemoryError as error:
        yield point.skipped("far/whole", error)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = make_parser("benchmarks.operator.sampling", __doc__)
    add_lists(
        parser,
        {
            "lengths": (positive, LENGTHS, "prompt lengths"),
            "samples": (positive, SAMPLES, "numbers of sampled keys"),
            "sinks": (positive, SINKS, "numbers of first keys, the costliest place"),
            "dense-queries": (positive, DENSE_QUERIES, "numbers of last, dense queries"),
        },
    )
    parser.add_argument(
        "--dense",
        choices=[name for name in BACKENDS if name != "auto"],
        help="dense kernel, also of the windows (default: fa4; off CUDA flash)",
    )
    add_measuring_arguments(parser, 0.2)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    common = op_options(args)
    dense = args.dense or ("fa4" if common.torch_device.type == "cuda" else "flash")
    counts = (args.samples, args.sinks, args.dense_queries)
    options = SamplingOptions(replace(common, backends=(dense,)), *counts)
    name = "benchmarks.operator.sampling"
    return measured(args, name, partial(measure, options), SAMPLING_TABLES)


if __name__ == "__main__":
    sys.exit(main())
