"""What happened in each prefill: tokens kept per layer and head, which path ran, and why.

Records hold device tensors and are turned into numbers only when read, so that recording
never waits for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from token_sparse_attention.config import DenseReason, TokenSparseConfig
from token_sparse_attention.crossover import BreakEven
from token_sparse_attention.selection import TokenSelection

MAX_RECORDS = 8192  # the oldest records are forgotten, so that a server's report stays small


@dataclass(frozen=True)
class SelectionRecord:
    """Device tensors that say what a sparse layer selected.

    Attributes:
        config: the layer's settings.
        lengths: ``[B, H]`` tokens kept; where queries are not selected, the tokens that every
            query sees beyond its window.
        ran_sparse: ``[B]`` bool.
        query_lens: ``[B]`` real queries per row.
        kv_lens: ``[B]`` real keys per row.
        budget: ``[B, H]`` tokens the method would keep, whether or not the row ran sparse.
        even: from where on sparse was taken to be faster.
    """

    config: TokenSparseConfig
    lengths: Tensor
    ran_sparse: Tensor
    query_lens: Tensor
    kv_lens: Tensor
    budget: Tensor
    even: BreakEven

    @classmethod
    def of(
        cls,
        selection: TokenSelection,
        config: TokenSparseConfig,
        even: BreakEven,
        query_len: int,
        kv_len: int,
        padding_mask: Tensor | None,
    ) -> SelectionRecord:
        """Take down a selection; without a `padding_mask` all rows have these lengths."""
        if padding_mask is None:
            query_lens, kv_lens = (
                selection.lengths.new_full(selection.ran_sparse.shape, length)
                for length in (query_len, kv_len)
            )
        else:
            query_lens = padding_mask[:, kv_len - query_len :].sum(-1)
            kv_lens = padding_mask.sum(-1)
        budget = selection.lengths if selection.budget is None else selection.budget
        return cls(
            config, selection.lengths, selection.ran_sparse, query_lens, kv_lens, budget, even
        )


@dataclass(frozen=True)
class LayerRecord:
    """One layer's part in one prefill call.

    Attributes:
        layer: layer number.
        query_len: query slots of the call, padding included.
        kv_len: key slots of the call, padding included.
        dense_reason: why the whole call ran dense; None if the method decided.
        detail: what the reason was met on, for example an argument's name.
        selection: what the method decided, None where `dense_reason` is set.
        sequence: number of the sequence in a packed call, as continuous batching makes them.
    """

    layer: int
    query_len: int
    kv_len: int
    dense_reason: DenseReason | None = None
    detail: str = ""
    selection: SelectionRecord | None = None
    sequence: int = 0

    @property
    def paths(self) -> list[str]:
        """``"sparse"`` or ``"dense"`` for each row; one entry if the whole call ran dense."""
        if self.selection is None:
            return ["dense"]
        return ["sparse" if ran else "dense" for ran in self.selection.ran_sparse.tolist()]

    @property
    def reasons(self) -> list[str | None]:
        """Why each row ran dense, None for sparse rows; aligned with `paths`."""
        if self.selection is None:
            reason = str(self.dense_reason)
            return [f"{reason}: {self.detail}" if self.detail else reason]
        reasons: list[str | None] = []
        for ran, query_len, kv_len, budget in zip(
            self.selection.ran_sparse.tolist(),
            self.selection.query_lens.tolist(),
            self.selection.kv_lens.tolist(),
            self.selection.budget.tolist(),
        ):
            why: DenseReason | None = None
            if not ran:
                why = self.selection.config.dense_reason(query_len, kv_len)
                why = why or self.selection.even.dense_reason(query_len, kv_len)
                dropped = min(budget) < kv_len
                why = why or (
                    DenseReason.CROSSOVER_KEPT if dropped else DenseReason.NOTHING_TO_DROP
                )
            reasons.append(None if why is None else str(why))
        return reasons

    @property
    def kept(self) -> list[list[int]] | None:
        """Tokens kept, ``[B][H]``; None if the whole call ran dense.

        With ``select_queries=False`` these are the tokens that every query sees beyond its
        window: sinks, landmarks and samples.
        """
        return None if self.selection is None else self.selection.lengths.tolist()

    @property
    def kept_share(self) -> float:
        """Share of the real tokens that the heads kept on average; 1 for a dense layer."""
        if self.selection is None:
            return 1.0
        shares = self.selection.lengths.double() / self.selection.kv_lens[:, None]
        return float(shares.mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {
            "layer": self.layer,
            "sequence": self.sequence,
            "query_len": self.query_len,
            "kv_len": self.kv_len,
            "paths": self.paths,
            "reasons": self.reasons,
            "kept": self.kept,
            "kept_share": self.kept_share,
        }


@dataclass
class PrefillReport:
    """Every layer's record of every prefill call, oldest first, and how often was decoded.

    Attributes:
        records: the newest records, at most `MAX_RECORDS`.
        decode_calls: attention calls with one query, which always run dense.
    """

    records: deque[LayerRecord] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))
    decode_calls: int = 0

    def add(self, record: LayerRecord) -> None:
        """Add a record; decode steps are only counted."""
        if record.dense_reason is DenseReason.DECODE:
            self.decode_calls += 1
        else:
            self.records.append(record)

    def clear(self) -> None:
        """Forget everything so far."""
        self.records.clear()
        self.decode_calls = 0

    def prefills(self) -> list[list[LayerRecord]]:
        """Return the records grouped into forward passes, oldest first."""
        passes: list[list[LayerRecord]] = []
        place = (-1, -1)
        for record in self.records:
            before, place = place, (record.layer, record.sequence)
            if not passes or place <= before:
                passes.append([])
            passes[-1].append(record)
        return passes

    def last_prefill(self) -> list[LayerRecord]:
        """Return the newest forward pass's records, one per layer and packed sequence."""
        passes = self.prefills()
        return passes[-1] if passes else []

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "prefills": [[record.to_dict() for record in one] for one in self.prefills()],
            "decode_calls": self.decode_calls,
        }

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        lines = ["layer  path    kept share  tokens kept per head, or why dense"]
        lines += [_line(record) for record in self.last_prefill()]
        return "\n".join(lines)


def describe(record: LayerRecord) -> str:
    """Say in a few words what a layer kept, or why it ran dense."""
    if record.kept is None:
        return str(record.reasons[0])
    parts = []
    for kept, reason in zip(record.kept, record.reasons):
        parts.append(_range(kept) if reason is None else reason)
    return "; ".join(dict.fromkeys(parts))


def path_name(record: LayerRecord) -> str:
    """Return ``"sparse"``, ``"dense"``, or ``"mixed"`` where rows differ."""
    paths = set(record.paths)
    return paths.pop() if len(paths) == 1 else "mixed"


def _range(kept: Iterable[int]) -> str:
    low, high = min(kept), max(kept)
    return str(low) if low == high else f"{low} to {high}"


def _line(record: LayerRecord) -> str:
    return (
        f"{record.layer:5d}  {path_name(record):6s}  {record.kept_share:10.3f}  {describe(record)}"
    )
