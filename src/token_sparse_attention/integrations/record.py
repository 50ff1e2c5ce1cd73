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

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.gate import DenseReason, reason_of
from token_sparse_attention.results import TokenSelection

MAX_RECORDS = 8192  # the oldest records are forgotten, so that a server's report stays small


@dataclass(frozen=True)
class SelectionRecord:
    """Device tensors that say what a layer did with each sequence of a batch.

    Attributes:
        lengths: ``[B, H]`` tokens kept; for KV sampling the sinks and sampled keys of a head.
        ran_sparse: ``[B]`` bool.
        reasons: ``[B]`` int32 codes of why a sequence ran dense, see `gate.reason_of`.
        kv_lens: ``[B]`` real keys of each sequence.
        indices: ``[B, H, K]`` which tokens, see `TokenSelection`; K is 0 unless they were to
            be recorded.
    """

    lengths: Tensor
    ran_sparse: Tensor
    reasons: Tensor
    kv_lens: Tensor
    indices: Tensor

    @classmethod
    def of(
        cls, selection: TokenSelection, kv_len: int, padding_mask: Tensor | None
    ) -> SelectionRecord:
        """Record a selection; without a `padding_mask` all sequences have `kv_len` keys."""
        assert selection.reasons is not None, "the operator gives them with the selection"
        if padding_mask is None:
            kv_lens = selection.lengths.new_full(selection.ran_sparse.shape, kv_len)
        else:
            kv_lens = padding_mask.sum(-1)
        of_selection = (selection.lengths, selection.ran_sparse, selection.reasons)
        return cls(*of_selection, kv_lens, selection.indices)


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
        config: the layer's settings, None where `dense_reason` is set.
        sequence: number of the sequence in a packed call, as continuous batching makes them.
        forward_pass: number of the forward pass; a layer may attend more than once in one.
    """

    layer: int
    query_len: int
    kv_len: int
    dense_reason: DenseReason | None = None
    detail: str = ""
    selection: SelectionRecord | None = None
    config: SparseConfig | None = None
    sequence: int = 0
    forward_pass: int = 0

    @property
    def paths(self) -> list[str]:
        """``"sparse"`` or ``"dense"`` for each sequence; one entry if the whole call ran dense."""
        if self.selection is None:
            return ["dense"]
        return ["sparse" if ran else "dense" for ran in self.selection.ran_sparse.tolist()]

    @property
    def reasons(self) -> list[str | None]:
        """Why each sequence ran dense, None for sparse ones; aligned with `paths`."""
        if self.selection is None:
            reason = str(self.dense_reason)
            return [f"{reason}: {self.detail}" if self.detail else reason]
        reasons = [reason_of(code) for code in self.selection.reasons.tolist()]
        return [None if reason is None else str(reason) for reason in reasons]

    @property
    def kept(self) -> list[list[int]] | None:
        """Tokens kept, ``[B][H]``; None if the whole call ran dense.

        For KV sampling these are a head's sinks and sampled keys, without its window.
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
        passes: dict[int, list[LayerRecord]] = {}
        for record in self.records:
            passes.setdefault(record.forward_pass, []).append(record)
        return list(passes.values())

    def last_prefill(self) -> list[LayerRecord]:
        """Return the newest forward pass's records, one per layer and packed sequence."""
        passes = self.prefills()
        return passes[-1] if passes else []

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "prefills": [[record.to_dict() for record in records] for records in self.prefills()],
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
    """Return ``"sparse"``, ``"dense"``, or ``"mixed"`` where sequences differ."""
    paths = set(record.paths)
    return paths.pop() if len(paths) == 1 else "mixed"


def _range(kept: Iterable[int]) -> str:
    low, high = min(kept), max(kept)
    return str(low) if low == high else f"{low} to {high}"


def _line(record: LayerRecord) -> str:
    return (
        f"{record.layer:5d}  {path_name(record):6s}  {record.kept_share:10.3f}  {describe(record)}"
    )
