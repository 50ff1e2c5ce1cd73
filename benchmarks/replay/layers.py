"""How long the operator takes where the heads keep numbers of tokens that were recorded.

Token selection runs as `method.Replayed`, which attends over random tokens of those numbers.
With key sampling there are no numbers to replay: how many keys every query sees follows from the
settings, and only which ones from the scores. So the operator is timed as it is, on random
inputs, whose sampled keys are spread over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from benchmarks.replay.method import replayed
from msgspec import Meta

from token_sparse_attention.attention.resolve import (
    causal_attention,
    check_backend,
    resolve_backend,
)
from token_sparse_attention.benchmark import checks, timing
from token_sparse_attention.benchmark.checks import Verdict, random_inputs
from token_sparse_attention.config import SparseConfig, TokenSelectionConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.execution import Execution
from token_sparse_attention.functional import token_sparse_attention
from token_sparse_attention.inputs import AuxRequest
from token_sparse_attention.methods import method_of
from token_sparse_attention.records import Count

SKIPPED = "skipped"


class Shape(NamedTuple):
    """The attention to measure: H, H_kv and D."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class LayerRun(NamedTuple):
    """What a sparse layer did.

    Attributes:
        config: its settings.
        shares: share of the prompt that each head kept, or one number for all of them;
            empty if the layer ran dense. With key sampling, only whether there are any is read.
    """

    config: SparseConfig
    shares: tuple[float, ...]


@dataclass(frozen=True)
class ReplayOptions:
    """How to measure.

    Attributes:
        device: where.
        dtype: of the tensors.
        attention_backend: which dense kernel attends, dense and sparse: one of `BACKENDS`.
        share_within: runs share a measurement where no head's number of tokens differs by
            more than this share of it.
        budget_seconds: to spend on each time, as far as a few samples allow.

    Raises:
        UsageError: if a field is out of range.
        ValueError: if `attention_backend` is no dense kernel.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    attention_backend: str = "auto"
    share_within: float = 0.01
    budget_seconds: float = 0.2

    def __post_init__(self) -> None:
        check_backend(self.attention_backend)
        if not 0 <= self.share_within < 1:
            raise UsageError(f"--share-within must be in [0, 1), got {self.share_within:g}")


@dataclass(frozen=True)
class ReplayPoint:
    """One measurement: a layer's attention, and dense attention in turns with it.

    Attributes:
        num_heads: H.
        num_kv_heads: H_kv.
        head_dim: D.
        seq_len: S.
        dtype: of the tensors.
        backend: the kernel that attended, here and densely.
        settings: of the layer; None for dense attention by itself.
        kept: tokens that each head kept, or one number for all; None if the layer ran dense,
            which with `settings` means after it was scored. With key sampling, the sinks and
            sampled keys in what was timed.
        kind: how the layer was timed, see `Record`; ``"skipped"`` if it could not be.
        median_ms: median time.
        low_ms: 20th percentile of the time.
        high_ms: 80th percentile.
        dense_ms: median time of dense attention.
        samples: how many times were taken.
        error: relative error against float64, the worst of the rows checked.
        passed: whether the check passed.
        note: what else to know.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int
    dtype: str
    backend: str
    settings: Mapping[str, Any] | None
    kept: Annotated[tuple[Count, ...], Meta(min_length=1)] | None
    kind: str
    median_ms: float | None
    low_ms: float | None
    high_ms: float | None
    dense_ms: float | None
    samples: int
    error: float | None
    passed: bool
    note: str


class Replayer:
    """Measures at one shape and length, and what is nearly the same only once."""

    def __init__(self, options: ReplayOptions, shape: Shape, seq_len: int) -> None:
        if shape.num_heads % shape.num_kv_heads:
            raise UsageError(
                f"--heads must be a multiple of --kv-heads {shape.num_kv_heads}, "
                f"got {shape.num_heads}"
            )
        timing.free_memory(options.device)
        self.options, self.shape, self.seq_len = options, shape, seq_len
        self.inputs = random_inputs(seq_len, *shape, options.device, options.dtype)
        query, key, _ = self.inputs
        try:
            self._backend = resolve_backend(options.attention_backend, query, key).name
            self._dense_call = partial(
                causal_attention, *self.inputs, scale=self.inputs.scale, backend=self._backend
            )
            verdict = checks.check_dense(self.inputs, self._dense_call())
        except ValueError as error:
            raise UsageError(f"--attention-backend: {error}") from error
        (taken,) = timing.kernel_times([self._dense_call], options.device, options.budget_seconds)
        self._reference_error = verdict.allowance
        self.dense = self._point(None, None, taken, taken, verdict)
        self._measured: list[tuple[SparseConfig, ReplayPoint]] = []

    def point(self, run: LayerRun | None) -> ReplayPoint:
        """Return a measurement of a layer: made now, or of one that was nearly the same.

        Args:
            run: what the layer did; None for one that was not to run sparse. One that ran
                dense counts as scored, unless its length alone decides.
        """
        if run is None or (not run.shares and self._is_dense_unscored(run.config)):
            return self.dense
        config = replace(run.config, dense_heads=_dense_heads(run, self.shape.num_heads))
        probes = method_of(config).num_probes
        if self.seq_len <= probes:
            raise UsageError(
                f"lengths must exceed the {probes} queries that score keys, got {self.seq_len}"
            )
        counted = isinstance(config, TokenSelectionConfig)
        kept = head_counts(run, self.shape.num_heads, self.seq_len) if counted else None
        for other, point in self._measured:
            near = not counted or _nearly_equal(point.kept, kept, self.options.share_within)
            if other == config and near:
                return point
        try:
            point = self._measure(config, kept)
        except torch.OutOfMemoryError as error:
            timing.free_memory(self.options.device)
            point = self._point(config, kept, None, None, Verdict(False, None, _first_line(error)))
        self._measured.append((config, point))
        return point

    def _is_dense_unscored(self, config: SparseConfig) -> bool:
        """Whether lengths made a layer run dense; else the scores of token selection did."""
        shape = self.shape
        gate = method_of(config).gate(self.options.device, shape.num_heads, shape.head_dim)
        decided = gate.reason(self.seq_len, self.seq_len) is not None
        return decided or not isinstance(config, TokenSelectionConfig)

    @torch.no_grad()
    def _measure(self, config: SparseConfig, kept: tuple[int, ...] | None) -> ReplayPoint:
        """Check the operator, sparse as it was recorded to be, and time it beside dense attention.

        Args:
            config: the layer's settings.
            kept: for token selection, how many tokens to attend over.
        """
        ran = replace(config, crossover="off")
        if isinstance(config, TokenSelectionConfig):
            ran = replayed(config, kept, self.seq_len)
        call = partial(
            token_sparse_attention, *self.inputs, ran, execution=Execution("auto", self._backend)
        )
        out, selection, _ = call(return_aux=AuxRequest(selection=True))
        if not isinstance(config, TokenSelectionConfig):
            counts = selection.lengths[0].tolist()
            kept = tuple(counts[:1] if len(set(counts)) == 1 else counts)
        verdict = checks.check_sparse(
            self.inputs, out, selection, config, reference_error=self._reference_error
        )
        del out
        dense, ours = timing.kernel_times(
            [self._dense_call, call], self.options.device, self.options.budget_seconds
        )
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()  # what the graphs held
        return self._point(config, kept, ours, dense, verdict)

    def _point(
        self,
        config: SparseConfig | None,
        kept: tuple[int, ...] | None,
        ours: timing.Timing | None,
        dense: timing.Timing | None,
        verdict: Verdict,
    ) -> ReplayPoint:
        notes = [verdict.note]
        if ours and dense:
            notes.append(ours.note)
            notes.append("" if ours.kind == dense.kind else f"dense time: {dense.kind}")
        return ReplayPoint(
            *self.shape,
            seq_len=self.seq_len,
            dtype=str(self.options.dtype).removeprefix("torch."),
            backend=self._backend,
            settings=None if config is None else config.to_dict(),
            kept=kept,
            kind=ours.kind if ours else SKIPPED,
            median_ms=ours.median_ms if ours else None,
            low_ms=ours.low_ms if ours else None,
            high_ms=ours.high_ms if ours else None,
            dense_ms=dense.median_ms if dense else None,
            samples=ours.samples if ours else 0,
            error=verdict.error,
            passed=verdict.passed,
            note="; ".join(filter(None, notes)),
        )


def head_counts(run: LayerRun, num_heads: int, seq_len: int) -> tuple[int, ...] | None:
    """Return how many of `seq_len` tokens each of `num_heads` heads keeps; None for dense.

    Recorded heads are repeated or thinned out evenly; one number for all stays one.

    Example:
        >>> head_counts(LayerRun(TokenSelectionConfig(), (0.5, 1.0)), 4, 1000)
        (500, 500, 1000, 1000)
    """
    shares = run.shares
    if not shares:
        return None
    if len(shares) > 1:
        shares = tuple(shares[head] for head in _recorded_heads(len(shares), num_heads))
    lowest = method_of(run.config).num_probes
    return tuple(min(max(round(share * seq_len), lowest), seq_len) for share in shares)


def _dense_heads(run: LayerRun, num_heads: int) -> tuple[int, ...]:
    """The dense ones of `num_heads` heads, given what a layer's own heads did."""
    recorded = _recorded_heads(len(run.shares), num_heads)
    return tuple(head for head, own in enumerate(recorded) if own in run.config.dense_heads)


def _recorded_heads(recorded: int, num_heads: int) -> list[int]:
    """Which of the recorded heads each of `num_heads` stands for, repeated or thinned evenly."""
    return [head * recorded // num_heads for head in range(num_heads)]


def _nearly_equal(
    one: tuple[int, ...] | None, other: tuple[int, ...] | None, within: float
) -> bool:
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(
        abs(a - b) <= within * min(a, b) for a, b in zip(one, other)
    )


def _first_line(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
