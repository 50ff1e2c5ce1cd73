"""KV sampling against dense attention: the whole operator, its parts, its memory.

    python -m benchmarks.operator.sampling --out benchmarks/results/sampling-h200.json
    python -m benchmarks.operator.sampling --shapes 14/2/64 --lengths 32768

The crossover is off, but for one time of the whole. Before anything is timed, the operator's
output is compared with the oracle's on a short prompt. Whole and dense take turns, once replayed
from CUDA graphs, once called eagerly and timed by the host's clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.command import DTYPES, add_lists, make_parser, positive, run_command
from torch import Tensor

from token_sparse_attention import reference
from token_sparse_attention.attention.names import BACKENDS
from token_sparse_attention.attention.output import new_output
from token_sparse_attention.attention.resolve import causal_attention, resolve_backend
from token_sparse_attention.benchmark import checks, timing
from token_sparse_attention.benchmark.checks import Inputs, Verdict, random_inputs
from token_sparse_attention.benchmark.measuring import device_named
from token_sparse_attention.benchmark.record import Record, ResultFile
from token_sparse_attention.benchmark.timing import Call, Timing
from token_sparse_attention.config import KVSamplingConfig, config_from_dict
from token_sparse_attention.errors import UsageError
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.impls import resolve_impl
from token_sparse_attention.info import provenance
from token_sparse_attention.inputs import AuxRequest, Chunk, Problem, real_tokens
from token_sparse_attention.methods.probes import blocks_of, find_probes
from token_sparse_attention.methods.sampling import (
    KVSampling,
    parts_of,
    sample_parts,
    score_blocks,
)

SUITE = "sampling"
DENSE, WHOLE, WITHOUT_LAST, AUTO = "dense", "whole", "whole without dense queries", "crossover on"
SCORE, SAMPLE, WINDOWS, ATTEND, FIRST = "score", "sample", "windows", "attend", "first queries"
K = 1024
LENGTHS = tuple(count * K for count in (8, 12, 16, 24, 32, 64, 128, 256))
SHORT = 1000  # tokens of the prompt that the oracle attends to, too


class Shape(NamedTuple):
    """A layer's query heads, KV heads and head size."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = (Shape(32, 8, 128), Shape(8, 2, 128), Shape(14, 2, 64))


@dataclass(frozen=True)
class SamplingOptions:
    """What to measure, and how.

    Attributes:
        device: where.
        dtype: of the inputs.
        config: the settings; their crossover is off.
        backend: the dense kernel, which also attends within the windows.
        budget: seconds to spend on each time, as far as a few samples allow.
    """

    device: torch.device
    dtype: torch.dtype
    config: KVSamplingConfig
    backend: str
    budget: float


class Point:
    """One shape and length: its inputs, and what its records have in common."""

    def __init__(self, options: SamplingOptions, shape: Shape, seq_len: int) -> None:
        timing.free_memory(options.device)
        self.options, self.shape, self.seq_len = options, shape, seq_len
        self.inputs = random_inputs(seq_len, *shape, options.device, options.dtype)
        self.config = replace(options.config, dense_heads=())

    def record(self, name: str, kind: str, **fields: Any) -> Record:
        """Return a record of this shape and length."""
        dtype = str(self.options.dtype).removeprefix("torch.")
        at = (1, *self.shape, self.seq_len, dtype)
        return Record(SUITE, name, kind, *at, **fields)

    def dense(self) -> Tensor:
        """Attend densely."""
        backend = self.options.backend
        return causal_attention(*self.inputs, scale=self.inputs.scale, backend=backend)

    def whole(self, config: KVSamplingConfig | None = None) -> Tensor:
        """Call the operator."""
        execution = Execution("auto", self.options.backend)
        config = config or self.config
        return token_sparse_attention(*self.inputs, config, execution=execution)

    def timed(self, calls: dict[str, Call], verdict: Verdict | None = None) -> Iterator[Record]:
        """Time calls in turns, by the host's clock too where there is another one."""
        device, budget = self.options.device, self.options.budget
        for measure in (timing.kernel_times, timing.wall_times):
            taken = measure(list(calls.values()), device, budget)
            yield from (self._time(name, one, verdict) for name, one in zip(calls, taken))
            if taken and taken[0].kind == "eager":
                return

    def _time(self, name: str, taken: Timing, verdict: Verdict | None) -> Record:
        if verdict is None:
            return self.record(name, **taken._asdict())
        note = "; ".join(filter(None, (verdict.note, taken.note)))
        fields = taken._replace(note=note)._asdict()
        return self.record(name, **fields, error=verdict.error, passed=verdict.passed)


def measure(
    options: SamplingOptions,
    shapes: Sequence[Shape],
    lengths: Sequence[int],
    report: Callable[[str], object] = lambda _: None,
) -> Iterator[Record]:
    """Yield every record of a run, in order; `report` is told what is being measured."""
    for shape in shapes:
        verdict = check(options, shape)
        for seq_len in lengths:
            what = f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}, {seq_len:,}"
            report(f"{what} tokens")
            point = Point(options, shape, seq_len)
            try:
                yield from _measure_point(point, verdict)
            except torch.OutOfMemoryError as error:
                yield point.record(WHOLE, "skipped", note=f"OutOfMemoryError: {error}"[:200])


def check(options: SamplingOptions, shape: Shape) -> Verdict:
    """Compare the operator with the oracle on a short prompt, with settings to match.

    Twice the error of the dense kernel is allowed, and rounding. Scores that are rounded
    otherwise may exchange a sampled key.
    """
    config = replace(
        options.config, block_size=64, num_probes=16, sliding_window=64, num_samples=96,
        dense_queries=32,
    )  # fmt: skip
    point = Point(replace(options, config=config), shape, SHORT)
    query, key, value = (tensor[0].cpu().double() for tensor in point.inputs)
    causal = torch.ones(SHORT, SHORT, dtype=torch.bool).tril()[None]
    scale = point.inputs.scale
    try:
        dense = _error(point.dense(), reference.masked_attention(query, key, value, causal, scale))
    except ValueError as error:
        raise UsageError(f"--dense: {error}") from error
    expected, chosen = reference.token_sparse_attention(query, key, value, config, scale)
    found = _error(point.whole(), expected)
    problems = [] if chosen is not None else ["the oracle ran dense"]
    return checks.judge(found, max(2 * dense, 1e-5) + point.inputs.eps, problems)


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out[0].cpu().double() - exact).norm() / exact.norm())


def _measure_point(point: Point, verdict: Verdict) -> Iterator[Record]:
    calls: dict[str, Call] = {DENSE: point.dense, WHOLE: point.whole}
    calls[AUTO] = partial(point.whole, replace(point.config, crossover="auto"))
    if point.config.dense_queries:
        calls[WITHOUT_LAST] = partial(point.whole, replace(point.config, dense_queries=0))
    yield from point.timed(calls, verdict)
    for name in (DENSE, WHOLE):
        peak = timing.peak_extra_mib(calls[name], point.options.device)
        if peak is not None:
            yield point.record(name, "memory", peak_extra_mib=peak)
    parts = parts_calls(point.inputs, point.config, point.options.backend)
    yield from point.timed(parts)


@torch.no_grad()
def parts_calls(inputs: Inputs, config: KVSamplingConfig, backend_name: str) -> dict[str, Call]:
    """Return a call of each part of the operator; none if the prompt runs dense.

    `SAMPLE` scores, as `SCORE` does alone, and then samples. `ATTEND` is all of that, and attends
    to windows, as `WINDOWS` does alone, and to samples.
    """
    query, key, value = inputs
    impl = resolve_impl("auto", query, query.shape[-1])
    tokens = real_tokens(None, 1, key.shape[2], query.device, on_device=impl == "triton")
    problem = Problem(
        query, key, value, tokens, inputs.scale, impl, None, None, AuxRequest(), Chunk()
    )
    method = KVSampling(config)
    gate = method.gate(query.device, query.shape[1], query.shape[3])
    blocks = blocks_of(config, problem, gate.sparse.position)
    if blocks is None or gate.reason(query.shape[2], key.shape[2]) is not None:
        return {}
    probes = find_probes(problem, blocks)
    backend, into = resolve_backend(backend_name, query, key), new_output(problem)
    plan = method.prepare(problem, gate)
    if isinstance(plan, DenseReason):
        return {}

    def score() -> None:
        for begin, some in parts_of(blocks, problem):
            score_blocks(problem, some, probes.of_blocks(blocks, begin, begin + some.num_blocks))

    def sample() -> None:
        for _ in sample_parts(problem, blocks, probes, config):
            pass

    window = min(config.sliding_window, problem.kv_len)
    later = problem.since(plan.begin)
    windows = partial(
        backend.dense.attend_windows, later, None, into.of_queries(slice(plan.begin, None)), window
    )
    calls: dict[str, Call] = {
        SCORE: score,
        SAMPLE: sample,
        WINDOWS: windows,
        ATTEND: partial(method.attend, plan, problem, backend, into),
    }
    if plan.begin:
        before = into.of_queries(slice(plan.begin))
        calls[FIRST] = partial(backend.dense.attend_all, problem.until(plan.begin), before)
    return calls


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = make_parser("benchmarks.operator.sampling", __doc__)
    shapes = tuple("/".join(map(str, shape)) for shape in SHAPES)
    add_lists(
        parser,
        {
            "lengths": (positive, LENGTHS, "prompt lengths"),
            "shapes": (str, shapes, "query heads/KV heads/head size"),
        },
    )
    parser.add_argument(
        "--config", default="{}", metavar="JSON", help="settings that are not the defaults"
    )
    dense = [name for name in BACKENDS if name != "auto"]
    parser.add_argument("--dense", choices=dense, help="dense kernel (default: fa4; CPU: flash)")
    parser.add_argument("--device", default="auto", help="torch device (default: auto)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--budget-seconds", type=float, default=0.3, metavar="S", help="per time")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the results")
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    device = device_named(args.device)
    backend = args.dense or ("fa4" if device.type == "cuda" else "flash")
    dtype = getattr(torch, args.dtype)
    options = SamplingOptions(device, dtype, _config(args.config), backend, args.budget_seconds)
    about = provenance(str(device))
    about["commit"] = about["commit"] or args.commit
    asked = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(args).items()}
    asked = {n: v for n, v in asked.items() if n not in ("out", "commit")}
    asked |= {"command": "benchmarks.operator.sampling", "config": options.config.to_dict()}
    records: list[Record] = []
    shapes = [_shape(text) for text in args.shapes]
    for record in measure(options, shapes, args.lengths, partial(print, file=sys.stderr)):
        records.append(record)
        result = ResultFile(about, asked, tuple(records))
        if args.out:
            result.save(args.out, f"--out {args.out}")
        if record.median_ms is not None:
            print(f"{record.name}, {record.kind}: {record.median_ms:.4g} ms", flush=True)
    failed = next((one for one in records if one.passed is False), None)
    if failed:
        print(f"check failed: {failed.note}", file=sys.stderr)
    return failed is None


def _config(text: str) -> KVSamplingConfig:
    try:
        config = config_from_dict({**json.loads(text), "crossover": "off"})
    except (TypeError, ValueError) as error:
        raise UsageError(f"--config: {error}") from error
    if not isinstance(config, KVSamplingConfig):
        raise UsageError(f"--config must be of the method kv_sampling, got {config.method}")
    return config


def _shape(text: str) -> Shape:
    numbers = text.split("/")
    if len(numbers) != 3 or not all(one.isdigit() and int(one) for one in numbers):
        raise UsageError(f"--shapes must be like 32/8/128, got {text!r}")
    return Shape(*map(int, numbers))


if __name__ == "__main__":
    sys.exit(main())
