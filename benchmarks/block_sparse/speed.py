"""Block-sparse attention against its peers, and what choosing the blocks costs.

python -m benchmarks.block_sparse.speed --out benchmarks/results/block/block.json
python -m benchmarks.block_sparse.speed --lengths 131072 --densities 0.4
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from benchmarks.block_sparse.inputs import random_mask, structured_inputs
from benchmarks.block_sparse.tables import BLOCK_TABLES
from benchmarks.command import (
    add_lists,
    add_measuring_arguments,
    list_of,
    make_parser,
    measured,
    op_options,
    positive,
    run_command,
)
from torch import Tensor

from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockGrid, BlockMask
from token_sparse_attention.attention.block_sparse import attend_blocks, choose_block_backend
from token_sparse_attention.attention.patterns import (
    FlexPrefillConfig,
    MInferenceConfig,
    StreamingConfig,
    XAttentionConfig,
)
from token_sparse_attention.attention.patterns.flexprefill import flexprefill_mask
from token_sparse_attention.attention.patterns.minference import (
    VerticalSlash,
    attend_chosen,
    slash_blocks,
    vertical_slash,
)
from token_sparse_attention.attention.patterns.streaming import streaming_mask
from token_sparse_attention.attention.patterns.xattention import xattention_mask
from token_sparse_attention.benchmark import checks
from token_sparse_attention.benchmark.checks import Inputs, Verdict, judge
from token_sparse_attention.benchmark.contenders import dense_call
from token_sparse_attention.benchmark.op import Contender, Point, prefixed
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.errors import UsageError

LENGTHS = (32768, 65536, 131072)
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
ESTIMATE_DENSITIES = (0.2, 0.4)
EXECUTORS = ("fa4", "flex", "triton", "reference")  # triton: the plain kernel to compare with
MATMUL_SIDE = 8192
_FIT_STEPS = 9
_MOST_APART = 0.01  # share of the chosen blocks in which an estimate may differ from float32's

Report = Callable[[str], object]


@dataclass(frozen=True)
class BlockOptions:
    """What to measure.

    Attributes:
        common: device, lengths, shape and budget.
        executors: of `EXECUTORS`.
        dense: the dense kernel to compare with.
        densities: shares of the blocks, chosen at random.
        estimate_densities: shares of the blocks that patterns are set to choose.

    Raises:
        UsageError: if a field is out of range.
    """

    common: OpOptions
    executors: tuple[str, ...]
    dense: str
    densities: tuple[float, ...] = DENSITIES
    estimate_densities: tuple[float, ...] = ESTIMATE_DENSITIES

    def __post_init__(self) -> None:
        unknown = [name for name in self.executors if name not in EXECUTORS]
        if unknown:
            raise UsageError(
                f"--executors must be among {', '.join(EXECUTORS)}; got {unknown[0]!r}"
            )
        if not all(0 < share <= 1 for share in (*self.densities, *self.estimate_densities)):
            raise UsageError("densities must be shares in (0, 1]")
        lengths = self.common.lengths
        if not lengths or min(lengths) < 2 * BLOCK_SIZE[0]:
            raise UsageError(f"--lengths must be at least {2 * BLOCK_SIZE[0]}, got {lengths}")


def measure(options: BlockOptions, report: Report = lambda _: None) -> Iterator[Record]:
    """Yield every record of a run, in order; `report` is told what is being measured."""
    for seq_len in options.common.lengths:
        say = prefixed(report, seq_len)
        point = Point(options.common, seq_len, "block")
        yield from _speeds(options, point, say)
        if options.estimate_densities:
            point.inputs = structured_inputs(point.inputs)
            yield from _estimates(options, point, say)


def _speeds(options: BlockOptions, point: Point, say: Report) -> Iterator[Record]:
    """Time executors and dense attention in turns, on a random mask per density."""
    for density in options.densities:
        say(f"executors, density {density:g}")
        dense = dense_call(options.dense, point.inputs)
        verdict = checks.check_dense(point.inputs, dense())
        contenders = [Contender("block/dense", dense, _noted(verdict, options.dense))]
        mask, kept = random_mask(point.inputs, density)
        actual = f"density {float(mask.density().mean()):.4f}"
        for name in options.executors:
            try:
                call = executor(name, point.inputs, mask)
                checked = check_blocks(point.inputs, call(), mask, verdict.allowance)
            except Exception as error:  # a peer that cannot run is a finding, not a failure
                yield point.skipped(f"block/{name}", error, kept=density)
                continue
            contenders.append(Contender(f"block/{name}", call, _noted(checked, actual)))
        build = partial(BlockMask.from_block_map, kept, BlockGrid(point.seq_len, point.seq_len))
        contenders.append(Contender("block/lists", build))
        yield from point.timed(*contenders, kept=density)


def executor(name: str, inputs: Inputs, mask: BlockMask) -> Callable[[], Tensor]:
    """Return a call of one of `EXECUTORS`."""
    query, key, value = inputs
    if name == "triton":
        from benchmarks.block_sparse.kernel import attend_block_lists  # needs Triton

        partial_lists = mask.partial_count, mask.partial_index
        full = mask.full_count, mask.full_index
        size, scale = mask.grid.block_size, inputs.scale
        return partial(attend_block_lists, query, key, value, partial_lists, full, size, scale)
    choose_block_backend(name, query, mask.grid.block_size)
    attend = partial(
        attend_blocks,
        *(query, key, value, mask),
        scale=inputs.scale,
        backend=name,
        want_lse=False,
    )
    return lambda: attend().out


def check_blocks(
    inputs: Inputs,
    out: Tensor,
    mask: BlockMask,
    reference_error: float,
    columns: Tensor | None = None,
) -> Verdict:
    """Check sampled rows of attention over a mask's blocks, and over `columns`, in float64."""
    slots = torch.arange(mask.grid.kv_len, device=out.device)
    inside = torch.arange(mask.grid.block_size[1], device=out.device)
    errors = []
    for head in checks.sampled_heads(inputs):
        for position in checks.sampled_slots(slots).tolist():
            block = position // mask.grid.block_size[0]
            allowed = torch.zeros(mask.grid.kv_len + mask.grid.block_size[1], dtype=torch.bool)
            allowed = allowed.to(out.device)
            for name in ("partial", "full"):
                count = int(getattr(mask, f"{name}_count")[0, head, block])
                listed = getattr(mask, f"{name}_index")[0, head, block, :count].long()
                allowed[(listed[:, None] * mask.grid.block_size[1] + inside).flatten()] = True
            if columns is not None:
                allowed[columns[0, head].clamp(max=mask.grid.kv_len)] = True
            own = slots[allowed[: mask.grid.kv_len]]
            place = slots[position : position + 1]
            exact = checks.exact_rows(inputs, head, place, own)
            errors.append(checks.row_error(out[0, head, place], exact))
    return judge(max(errors), 2 * reference_error + inputs.eps / 2)


class _Estimator(NamedTuple):
    """A pattern with one setting to vary.

    Attributes:
        name: of its records.
        settings: the config for a value of the setting, as a share of its range.
        choose: what it chooses by ``(query, key, config, scale, impl)``.
    """

    name: str
    settings: Callable[[float, int], Any]
    choose: Callable[[Tensor, Tensor, Any, float, str], tuple[BlockMask, VerticalSlash | None]]


def _choose_by(make_mask: Callable[..., BlockMask]) -> Any:
    def choose(
        query: Tensor, key: Tensor, config: Any, scale: float, impl: str
    ) -> tuple[BlockMask, None]:
        return make_mask(query, key, config, scale, BLOCK_SIZE, impl), None

    return choose


def _choose_vertical_slash(
    query: Tensor, key: Tensor, config: Any, scale: float, impl: str
) -> tuple[BlockMask, VerticalSlash]:
    chosen = vertical_slash(query, key, config, scale, impl)
    return slash_blocks(chosen, query.shape[2], BLOCK_SIZE, impl), chosen


def _closer_to_one(share: float) -> float:
    """Spread a share so that half of the range is above 0.9."""
    return min(1.0 - 10.0 ** (-2.0 * share), 0.9999) if share > 0 else 1e-4


ESTIMATORS = (
    _Estimator(
        "flexprefill",
        lambda share, _: FlexPrefillConfig(gamma=_closer_to_one(share)),
        _choose_by(flexprefill_mask),
    ),
    _Estimator(
        "minference",
        lambda share, length: MInferenceConfig(slash_size=max(int(share**3 * length), 100)),
        _choose_vertical_slash,
    ),
    *(
        _Estimator(
            f"xattention-{stride}",
            lambda share, _, stride=stride: XAttentionConfig(stride, _closer_to_one(share)),  # type: ignore[misc]
            _choose_by(xattention_mask),
        )
        for stride in (8, 16)
    ),
    _Estimator(
        "streaming",
        lambda share, length: StreamingConfig(local_size=max(int(share * length), 1)),
        _choose_by(streaming_mask),
    ),
)


def _estimates(options: BlockOptions, point: Point, say: Report) -> Iterator[Record]:
    """Time each pattern's estimate and the attention over what it chose, in turns."""
    query, key, _ = point.inputs
    scale = point.inputs.scale
    dense = checks.check_dense(point.inputs, dense_call(options.dense, point.inputs)())
    square = query.new_empty(MATMUL_SIDE if query.is_cuda else 256, 1)
    left, right = torch.randn(2, len(square), len(square), dtype=query.dtype, device=query.device)
    for estimator in ESTIMATORS:
        for density in options.estimate_densities:
            say(f"{estimator.name}, density {density:g}")
            try:
                config = _fit(estimator, query, key, density, scale)
                estimate = partial(estimator.choose, query, key, config, scale, "auto")
                mask, chosen = estimate()
                attend = _attention(point.inputs, mask, chosen)
                columns = chosen.columns if chosen else None
                checked = check_blocks(
                    point.inputs, attend(), mask, dense.allowance, columns=columns
                )
            except Exception as error:
                yield point.skipped(f"estimate/{estimator.name}", error, kept=density)
                continue
            agreed = _check_estimate(estimator, query, key, config, scale, mask)
            multiply = partial(torch.matmul, left, right)
            yield from point.timed(
                Contender(
                    f"estimate/{estimator.name}", estimate, _noted(agreed, _settings(config))
                ),
                Contender(f"attend/{estimator.name}", attend, checked),
                Contender("block/matmul", multiply, Verdict(True, None, f"side {len(square)}")),
                kept=round(float(mask.density().mean()), 4),
            )


def _attention(
    inputs: Inputs, mask: BlockMask, chosen: VerticalSlash | None
) -> Callable[[], Tensor]:
    query, key, value = inputs
    if chosen is not None:
        attend_both = partial(
            attend_chosen, query, key, value, chosen, mask, scale=inputs.scale, backend="auto"
        )
        return lambda: attend_both().out
    attend = partial(
        attend_blocks, query, key, value, mask, scale=inputs.scale, backend="auto", want_lse=False
    )
    return lambda: attend().out


def _fit(estimator: _Estimator, query: Tensor, key: Tensor, density: float, scale: float) -> Any:
    """Return settings whose density is about as wanted, by bisection."""
    low, high, best = 0.0, 1.0, (math.inf, estimator.settings(1.0, key.shape[2]))
    for _ in range(_FIT_STEPS):
        middle = (low + high) / 2
        config = estimator.settings(middle, key.shape[2])
        mask = estimator.choose(query, key, config, scale, "auto")[0]
        got = float(mask.density().mean())
        best = min(best, (abs(got - density), config), key=lambda found: found[0])
        low, high = (middle, high) if got < density else (low, middle)
    return best[1]


def _check_estimate(
    estimator: _Estimator, query: Tensor, key: Tensor, config: Any, scale: float, mask: BlockMask
) -> Verdict:
    """Compare the first group's blocks with those of the reference in float32."""
    group = query.shape[1] // key.shape[1]
    exact = estimator.choose(
        query[:, :group].float(), key[:, :1].float(), config, scale, "reference"
    )[0].block_map()
    ours = replace(
        mask,
        partial_count=mask.partial_count[:, :group],
        partial_index=mask.partial_index[:, :group],
        full_count=mask.full_count[:, :group],
        full_index=mask.full_index[:, :group],
    ).block_map()
    return judge(float((ours ^ exact).sum() / exact.sum()), _MOST_APART)


def _settings(config: Any) -> str:
    plain = type(config)()
    changed = {n: v for n, v in vars(config).items() if v != getattr(plain, n)}
    return ", ".join(
        f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in changed.items()
    )


def _noted(verdict: Verdict, note: str) -> Verdict:
    return verdict._replace(note="; ".join(filter(None, (verdict.note, note))))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = make_parser("benchmarks.block_sparse.speed", __doc__)
    add_lists(
        parser,
        {
            "lengths": (positive, LENGTHS, "prompt lengths"),
            "densities": (float, DENSITIES, "shares of the blocks, chosen at random"),
            "estimate-densities": (
                float,
                ESTIMATE_DENSITIES,
                "shares of the blocks that patterns are set to choose",
            ),
        },
    )
    parser.add_argument(
        "--executors",
        type=list_of(str),
        metavar="NAMES",
        help=f"of {','.join(EXECUTORS)} (default: fa4,flex,triton; off CUDA reference)",
    )
    parser.add_argument(
        "--dense",
        metavar="NAME",
        help="dense kernel to compare with (default: fa4; off CUDA math)",
    )
    add_measuring_arguments(parser, 0.4)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    common = op_options(args)
    on_cuda = common.torch_device.type == "cuda"
    executors = ("fa4", "flex", "triton") if on_cuda else ("reference",)
    options = BlockOptions(
        common,
        executors=executors if args.executors is None else args.executors,
        dense=args.dense or ("fa4" if on_cuda else "math"),
        densities=args.densities,
        estimate_densities=args.estimate_densities,
    )
    return measured(args, "benchmarks.block_sparse.speed", partial(measure, options), BLOCK_TABLES)


if __name__ == "__main__":
    sys.exit(main())
