"""What ran sparse, what ran dense and why, how many blocks sampled keys, and how many were kept.

Counts live in this process, go to the engine's log, and to Prometheus where it collects the
metrics of several processes (`PROMETHEUS_MULTIPROC_DIR`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from logging import Logger
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention.gate import DenseReason, reason_of
from token_sparse_attention.results import TokenSelection

SPARSE = "sparse"
_METRICS = {
    "prefills": "Prompts and chunks of prompts, by path and by why they ran dense",
    "layer_calls": "Calls of a sparse layer, by path and by why they ran dense",
    "tokens_seen": "Tokens that heads in sparse layers could attend over",
    "tokens_kept": "Tokens that heads in sparse layers kept; for KV sampling the sinks and "
    "sampled keys of a call's last block",
    "blocks_sampled": "KV sampling's blocks of queries that sampled keys, in all sparse layers",
}


class Counters:
    """Counts since the process started.

    Numbers from the device are added up there, and read when the counts are read.
    """

    def __init__(self) -> None:
        self._prefills: Counter[str] = Counter()
        self._tokens_seen = 0
        self._reasons: Tensor | int = 0  # how often each reason's code, 0 for sparse, was met
        self._tokens_kept: Tensor | int = 0
        self._blocks_sampled: Tensor | int = 0
        self._changed = False
        self._reported_at = -float("inf")
        self._metrics: dict[str, Any] | None = None
        self._published: Counter[tuple[str, str, str]] = Counter()
        self._publishes = True

    def add_prefill(self, dense_reason: str | None) -> None:
        """Count a prompt or a chunk; None means that it runs sparse."""
        self._prefills[SPARSE if dense_reason is None else dense_reason] += 1
        self._changed = True

    def add_layer(self, selection: TokenSelection) -> None:
        """Count what a sparse layer did with one prompt or chunk."""
        self._tokens_seen += int(selection.kv_len or 0) * selection.lengths.shape[1]
        assert selection.reasons is not None, "the operator gives them with the selection"
        codes = torch.arange(len(DenseReason) + 1, device=selection.reasons.device)
        self._reasons = self._reasons + (selection.reasons[:, None] == codes).sum(0)
        self._tokens_kept = self._tokens_kept + selection.lengths.sum()
        if selection.num_blocks is not None:
            self._blocks_sampled = self._blocks_sampled + selection.num_blocks.sum()
        self._changed = True

    def read(self) -> dict[str, Any]:
        """Return all counts; waits for the device.

        Returns:
            ``prefills_sparse``, ``prefills_dense`` by reason, ``layer_calls_sparse``,
            ``layer_calls_dense`` by reason; ``tokens_seen`` and ``tokens_kept``, summed over
            heads and layers; and ``blocks_sampled``, summed over layers. For KV sampling the
            kept tokens are the sinks and sampled keys of the call's last block. A block that two
            chunks share counts in both.
        """
        met = self._reasons.tolist() if isinstance(self._reasons, Tensor) else [0]
        return {
            "prefills_sparse": self._prefills[SPARSE],
            "prefills_dense": {
                reason: count for reason, count in self._prefills.items() if reason != SPARSE
            },
            "layer_calls_sparse": met[0],
            "layer_calls_dense": {
                str(reason_of(code)): count for code, count in enumerate(met) if code and count
            },
            "tokens_seen": self._tokens_seen,
            "tokens_kept": int(self._tokens_kept),
            "blocks_sampled": int(self._blocks_sampled),
        }

    def report(self, log: Callable[..., None], interval: float) -> None:
        """Log and publish the counts if they changed and the last report is old enough.

        Args:
            log: takes a format and its arguments.
            interval: seconds.
        """
        now = time.monotonic()
        if not self._changed or now - self._reported_at < interval:
            return
        self._changed = False
        self._reported_at = now
        counts = self.read()
        log("%s", describe(counts))
        if self._publishes:
            try:
                self._publish(counts)
            except Exception as error:  # whatever it is, serving goes on
                self._publishes = False
                log(
                    "Token sparse attention: counts are no longer published to Prometheus: %s: %s",
                    type(error).__name__,
                    error,
                )

    def _publish(self, counts: dict[str, Any]) -> None:
        if self._metrics is None:
            from prometheus_client import Counter as Metric

            self._metrics = {
                name: Metric(
                    f"token_sparse_attention_{name}",
                    text,
                    ("path", "reason") if name in ("prefills", "layer_calls") else (),
                )
                for name, text in _METRICS.items()
            }
        now = Counter(
            {
                ("prefills", SPARSE, ""): counts["prefills_sparse"],
                ("layer_calls", SPARSE, ""): counts["layer_calls_sparse"],
                ("tokens_seen", "", ""): counts["tokens_seen"],
                ("tokens_kept", "", ""): counts["tokens_kept"],
                ("blocks_sampled", "", ""): counts["blocks_sampled"],
            }
        )
        for what in ("prefills", "layer_calls"):
            for reason, count in counts[f"{what}_dense"].items():
                now[what, "dense", reason] = count
        for key, count in (now - self._published).items():
            name, path, reason = key
            metric = self._metrics[name]
            (metric.labels(path, reason) if path else metric).inc(count)
        self._published = now


def describe(counts: dict[str, Any]) -> str:
    """Say the counts of `Counters.read` in one line."""
    dense = counts["prefills_dense"]
    reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(dense.items()))
    share = counts["tokens_kept"] / max(counts["tokens_seen"], 1)
    calls = counts["layer_calls_sparse"] + sum(counts["layer_calls_dense"].values())
    blocks = counts["blocks_sampled"]
    return (
        f"Token sparse attention: {counts['prefills_sparse']} prefills sparse, "
        f"{sum(dense.values())} dense{f' ({reasons})' if reasons else ''}; "
        f"{counts['layer_calls_sparse']} of {calls} calls of sparse layers ran sparse, "
        f"{share:.1%} of tokens kept{f', {blocks} blocks sampled keys' if blocks else ''}"
    )


def log_layers(log: Logger, number: int, obstacles: Mapping[str, str]) -> None:
    """Log at the start how many layers can run sparse, and why others cannot.

    Args:
        log: of the engine.
        number: of layers that can.
        obstacles: why others cannot, by their names.
    """
    if number:
        log.info("Token sparse attention is on in %d layers", number)
    for obstacle in dict.fromkeys(obstacles.values()):
        names = [name for name, text in obstacles.items() if text == obstacle]
        log.warning("Token sparse attention: %s stay dense: %s", ", ".join(names), obstacle)


COUNTERS = Counters()  # of this process, as Prometheus' registry is
