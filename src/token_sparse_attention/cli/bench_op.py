"""``tsa bench op``: the operator and its peers; and what all measurements share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from token_sparse_attention.benchmark.options import MeasuringOptions, OpOptions
from token_sparse_attention.checks import check_writable
from token_sparse_attention.cli.command import Command, working
from token_sparse_attention.errors import running

if TYPE_CHECKING:
    from token_sparse_attention.benchmark.record import Record

Measure = Callable[[Callable[[str], object]], "Iterator[Record]"]


@dataclass(frozen=True, kw_only=True)
class Benchmark(Command):
    """Measure.

    Attributes:
        out: where to write the results
    """

    options: MeasuringOptions
    out: Path | None = None

    def show(self, measure: Measure) -> bool:
        """Measure, keeping what there is after each length, and show it; whether all passed."""
        from token_sparse_attention.benchmark.measuring import collect
        from token_sparse_attention.benchmark.runs import Run
        from token_sparse_attention.benchmark.show import show
        from token_sparse_attention.info import provenance

        if self.out is not None:
            check_writable(self.out, f"--out {self.out}")
        asked = {"command": f"tsa bench {self.name}", **self.asked_but("out")}
        about = provenance(str(self.options.torch_device))
        with working("starting") as status, running(f"tsa bench {self.name}", "measured"):
            result = collect(measure(status.update), about, asked, self.out)
        if self.json:
            print(result.to_json(), end="")
        else:
            show(Run("this run", result))
        return not result.failures


@dataclass(frozen=True, kw_only=True)
class BenchOp(Benchmark):
    """Time the operator stage by stage and against its peers."""

    name: ClassVar[str] = "op"
    example: ClassVar[str] = (
        "tsa bench op --out benchmarks/results/op.json\n"
        "tsa bench op --lengths 131072 --kept 0.5 --crossover-lengths ''"
    )
    options: OpOptions

    def run(self) -> bool:
        """Measure, and show the times."""
        from token_sparse_attention.benchmark.op import measure

        return self.show(lambda report: measure(self.options, report))
