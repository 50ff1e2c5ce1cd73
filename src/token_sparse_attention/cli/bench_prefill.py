"""``tsa bench prefill``: the first token of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from token_sparse_attention.benchmark.options import PrefillOptions
from token_sparse_attention.cli.bench_op import Benchmark
from token_sparse_attention.cli.model import require_transformers


@dataclass(frozen=True, kw_only=True)
class BenchPrefill(Benchmark):
    """Time the first token of a Llama-shaped model with random weights, dense and sparse."""

    name: ClassVar[str] = "prefill"
    example: ClassVar[str] = "tsa bench prefill --out benchmarks/results/prefill.json"
    options: PrefillOptions

    def run(self) -> bool:
        """Measure, and show the times."""
        require_transformers()
        from token_sparse_attention.benchmark.prefill import measure

        return self.show(lambda report: measure(self.options, report))
