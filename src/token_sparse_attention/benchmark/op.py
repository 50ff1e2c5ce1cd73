"""`tsa bench op`: the operator stage by stage, whole, and against its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from token_sparse_attention.attention.backend import PackedHeads
from token_sparse_attention.attention.resolve import causal_attention, resolve_backend
from token_sparse_attention.benchmark import checks, timing
from token_sparse_attention.benchmark.checks import Inputs, Verdict, random_inputs
from token_sparse_attention.benchmark.contenders import dense_call, eager_composition
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.compression import compress, decompress
from token_sparse_attention.config import KVSamplingConfig, SparseConfig, TokenSelectionConfig
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.inputs import AuxRequest
from token_sparse_attention.methods.selection import select_tokens
from token_sparse_attention.scoring import score_tokens

_FULL_UP_TO = 2**18  # longer points measure one dense kernel and the whole operator
_LONG_MS = 100.0  # calls so long that the host's part does not matter
_SLOW_PEERS = ("flash", "flex")
_NEW_LENGTHS = (1, 37, 101)  # tokens more than a warm length
_CONFIG = TokenSelectionConfig()
_SAMPLING = KVSamplingConfig(crossover="off")
_SELECTION = AuxRequest(selection=True)
_WINDOWED = replace(_CONFIG, fallback="window")

Report = Callable[[str], object]


class Contender(NamedTuple):
    """Something to time on the device and, if `wall`, by the host's clock."""

    name: str
    call: Callable[..., Any]
    verdict: Verdict | None = None
    kernel: bool = True
    wall: bool = False


def measure(options: OpOptions, report: Report = lambda _: None) -> Iterator[Record]:
    """Yield every record of a run, in order; `report` is told what is being measured."""
    for seq_len in options.lengths:
        yield from _measure_length(Point(options, seq_len), report)
    for seq_len in options.crossover_lengths:
        yield from _measure_crossover(Point(options, seq_len), report)


class Point:
    """One length's inputs, and what its records have in common."""

    def __init__(self, options: OpOptions, seq_len: int, suite: str = "op") -> None:
        timing.free_memory(options.torch_device)
        self.options, self.seq_len, self.suite = options, seq_len, suite
        self.inputs = _make_inputs(options, seq_len)
        self.reference_error = 0.0  # of the first dense kernel that ran

    def record(self, name: str, kind: str, **fields: Any) -> Record:
        options = self.options
        return Record(
            suite=self.suite,
            name=name,
            kind=kind,
            batch=1,
            num_heads=options.num_heads,
            num_kv_heads=options.num_kv_heads,
            head_dim=options.head_dim,
            seq_len=self.seq_len,
            dtype=options.dtype,
            **fields,
        )

    def timed(self, *contenders: Contender, **fields: Any) -> Iterator[Record]:
        """Time contenders in turns."""
        device, budget = self.options.torch_device, self.options.budget_seconds
        kernel = [one for one in contenders if one.kernel]
        timings = timing.kernel_times([one.call for one in kernel], device, budget)
        done = {
            one.name
            for one, taken in zip(kernel, timings)
            if taken.kind == "eager" or taken.median_ms > _LONG_MS
        }
        wall = [one for one in contenders if one.wall and one.name not in done]
        timings += timing.wall_times([one.call for one in wall], device, budget)
        for contender, taken in zip(kernel + wall, timings):
            checked = contender.verdict or Verdict(True, None)
            passed = checked.passed if contender.verdict else None
            note = "; ".join(filter(None, (checked.note, taken.note)))
            times = taken._replace(note=note)._asdict()
            yield self.record(
                contender.name, **times, error=checked.error, passed=passed, **fields
            )

    def memory(self, name: str, call: Callable[[], Tensor], **fields: Any) -> Iterator[Record]:
        peak = timing.peak_extra_mib(call, self.options.torch_device)
        if peak is not None:
            yield self.record(name, "memory", peak_extra_mib=peak, **fields)

    def skipped(self, name: str, error: Exception, **fields: Any) -> Record:
        timing.free_memory(self.options.torch_device)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return self.record(name, "skipped", note=reason[:200], **fields)

    def whole(self, config: SparseConfig, **keywords: Any) -> Callable[..., Any]:
        return partial(token_sparse_attention, *self.inputs, config, **keywords)

    def checked_whole(self, name: str, config: SparseConfig, **keywords: Any) -> Contender:
        """Run the whole operator once, check it, and return it for timing."""
        call = self.whole(config, **keywords)
        out, selection, _ = call(return_aux=_SELECTION)
        verdict = checks.check_sparse(
            self.inputs, out, selection, config, reference_error=self.reference_error
        )
        return Contender(name, call, verdict)


def keeping(kept: float) -> TokenSelectionConfig:
    """Return the paper's settings with a given share of kept tokens."""
    return replace(_CONFIG, keep_ratio=kept)


def _make_inputs(options: OpOptions, seq_len: int) -> Inputs:
    heads = (options.num_heads, options.num_kv_heads)
    return random_inputs(
        seq_len, *heads, options.head_dim, options.torch_device, options.torch_dtype
    )


def _measure_length(point: Point, report: Report) -> Iterator[Record]:
    options, seq_len = point.options, point.seq_len
    say = prefixed(report, seq_len)
    full = seq_len <= _FULL_UP_TO
    if full:
        say("first calls")
        yield _first_calls(point)
    yield from _dense_peers(point, say, full)
    if not full:
        say("whole operator")
        kept = options.main_kept
        one = point.checked_whole("ours/whole", keeping(kept))
        yield from point.timed(one, kept=kept)
        yield from point.memory(one.name, one.call, kept=kept)
        return
    say("KV sampling")
    sampling = point.checked_whole("sampling/whole", _SAMPLING)._replace(wall=True)
    yield from point.timed(sampling)
    yield from point.memory(sampling.name, sampling.call)
    say("scoring and window")
    query, key, value = point.inputs
    score = partial(score_tokens, query, key, _CONFIG.observation_window)
    yield from point.timed(Contender("ours/score", score))
    backend = resolve_backend("auto", query, key)
    window = partial(
        backend.attend,
        *(query, key, value),
        scale=point.inputs.scale,
        window=_CONFIG.sliding_window,
    )
    yield from point.timed(Contender("ours/window", window))
    scores = score()
    for kept in options.kept:
        say(f"stages, kept {kept:g}")
        yield from _if_it_fits(point, "ours/attend", kept, _stages(point, scores, kept))
        say(f"whole operator, kept {kept:g}")
        yield from _if_it_fits(point, "ours/whole", kept, _whole(point, kept))
        if seq_len <= options.peers_up_to:
            say(f"eager composition, kept {kept:g}")
            yield from _if_it_fits(point, "eager/whole", kept, _eager(point, kept))


def _if_it_fits(
    point: Point, name: str, kept: float, records: Iterator[Record]
) -> Iterator[Record]:
    try:
        yield from records
    except torch.OutOfMemoryError as error:
        yield point.skipped(name, error, kept=kept)


def prefixed(report: Report, seq_len: int) -> Report:
    return lambda what: report(f"{seq_len:,} tokens: {what}")


def _first_calls(point: Point) -> Record:
    """How much longer than a warm call the first call takes at lengths not seen before."""
    options, kept = point.options, point.options.main_kept
    point.whole(keeping(kept))()
    extra_ms = []
    for more in _NEW_LENGTHS:
        inputs = _make_inputs(options, point.seq_len + more)
        call = partial(token_sparse_attention, *inputs, keeping(kept))
        first = timing.wall_ms(call, options.torch_device)
        warm = sorted(timing.wall_ms(call, options.torch_device) for _ in range(3))[1]
        extra_ms.append(first - warm)
    note = "low and high are the extremes; lengths S + " + ", S + ".join(map(str, _NEW_LENGTHS))
    taken = timing.summarize("first_call", extra_ms, note)
    taken = taken._replace(low_ms=min(extra_ms), high_ms=max(extra_ms))
    return point.record("ours/whole", kept=kept, **taken._asdict())


def _dense_peers(point: Point, say: Report, full: bool) -> Iterator[Record]:
    options = point.options
    have_reference = False
    for backend in options.dense:
        if have_reference and not full:
            return
        if point.seq_len > options.peers_up_to and backend in _SLOW_PEERS and have_reference:
            continue
        name = f"dense/{backend}"
        say(name)
        try:
            call = dense_call(backend, point.inputs)
            verdict = checks.check_dense(point.inputs, call())
            records = list(point.timed(Contender(name, call, verdict, wall=not have_reference)))
        except Exception as error:  # a peer that cannot run is a finding, not a failure
            yield point.skipped(name, error)
            continue
        if not have_reference and verdict.passed:
            have_reference = True
            point.reference_error = verdict.allowance
        yield from records


def _stages(point: Point, scores: Tensor, kept: float) -> Iterator[Record]:
    query, key, value = point.inputs
    select = partial(select_tokens, scores, keeping(kept))
    selection = select()
    packed = compress(query, key, value, selection)
    heads = PackedHeads(range(query.shape[1]), query.shape[1])
    backend = resolve_backend("auto", query, key)
    attend = partial(backend.attend_packed, packed, heads, scale=point.inputs.scale)
    attended = attend().out
    stages: dict[str, Callable[..., Any]] = {
        "ours/select": select,
        "ours/gather": partial(compress, query, key, value, selection),
        "ours/attend": attend,
        "ours/scatter": partial(decompress, attended, selection, point.seq_len),
    }
    for name, call in stages.items():
        yield from point.timed(Contender(name, call), kept=kept)


def _whole(point: Point, kept: float) -> Iterator[Record]:
    contenders = [
        point.checked_whole("ours/whole", keeping(kept))._replace(wall=True),
        point.checked_whole("ours/whole_window", replace(_WINDOWED, keep_ratio=kept)),
    ]
    if kept == point.options.main_kept:
        at_once = Execution(head_chunk=point.options.num_heads)
        unchunked = point.checked_whole("ours/unchunked", keeping(kept), execution=at_once)
        contenders.append(unchunked)
    yield from point.timed(*contenders, kept=kept)
    for contender in contenders:
        yield from point.memory(contender.name, contender.call, kept=kept)


def _eager(point: Point, kept: float) -> Iterator[Record]:
    call = partial(eager_composition, point.inputs, _CONFIG, kept)
    out, selection = call()
    verdict = checks.check_sparse(
        *(point.inputs, out, selection, keeping(kept)), reference_error=point.reference_error
    )
    del out, selection
    contender = Contender("eager/whole", call, verdict, kernel=False, wall=True)
    yield from point.timed(contender, kept=kept)
    yield from point.memory("eager/whole", lambda: call()[0], kept=kept)


def _measure_crossover(point: Point, report: Report) -> Iterator[Record]:
    """Time the operator as a user calls it against dense attention, in turns."""
    say = prefixed(report, point.seq_len)
    for drop_mass in point.options.drop_mass:
        say(f"crossover, drop_mass {drop_mass:g}")
        config = TokenSelectionConfig(drop_mass=drop_mass, crossover="auto")
        dense = partial(causal_attention, *point.inputs, scale=point.inputs.scale)
        out = dense()
        verdict = checks.check_dense(point.inputs, out)
        ours = point.whole(config)
        out, selection, _ = ours(return_aux=_SELECTION)
        ours_verdict = checks.check_sparse(
            *(point.inputs, out, selection, config), reference_error=verdict.allowance
        )
        del out
        share = float(selection.lengths.double().mean()) / point.seq_len
        kept = round(share, 4) if bool(selection.ran_sparse[0]) else 1.0
        yield from point.timed(
            Contender("crossover/dense", dense, verdict, wall=True),
            Contender("crossover/ours", ours, ours_verdict, wall=True),
            kept=kept,
            drop_mass=drop_mass,
        )
