"""``tsa report``: one page of many results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from token_sparse_attention.checks import check_apart, check_writable
from token_sparse_attention.cli.command import Command, print_json
from token_sparse_attention.options import Option
from token_sparse_attention.records import save
from token_sparse_attention.report import TITLE


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Make one HTML page of results of tsa eval, tsa bench and tsa capture.

    Attributes:
        results: result files
        out: the page to write
        title: the page's title
    """

    name: ClassVar[str] = "report"
    example: ClassVar[str] = (
        "tsa report result.jsonl kept.json benchmarks/results/op.json --out report.html"
    )
    results: Annotated[tuple[Path, ...], Option("results", "RESULT")]
    out: Path
    title: str = TITLE

    def run(self) -> bool:
        """Read the results, and write the page."""
        from token_sparse_attention.report.load import load
        from token_sparse_attention.report.page import build_page

        check_apart({"--out": self.out}, self.results)
        check_writable(self.out, f"--out {self.out}")
        inputs = load(self.results)
        save(self.out, build_page(inputs, self.title), f"--out {self.out}")
        if self.json:
            facts = {
                "written": str(self.out),
                "evaluations": len(inputs.evaluations),
                "captures": len(inputs.captures),
                "benchmarks": len(inputs.runs),
            }
            print_json(facts)
        else:
            print(self.out)
        return True
