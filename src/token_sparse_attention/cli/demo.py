"""``tsa demo``: the bundled model and document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from token_sparse_attention.cli.command import Command, note, output, print_json, working
from token_sparse_attention.cli.model import require_transformers
from token_sparse_attention.cli.run import layer_table
from token_sparse_attention.options import Device

if TYPE_CHECKING:
    from token_sparse_attention.demo import DemoResult


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Find facts hidden in a real document with the bundled model, dense and sparse.

    Attributes:
        device: torch device
    """

    name: ClassVar[str] = "demo"
    example: ClassVar[str] = "tsa demo"
    device: Device = "auto"

    def run(self) -> bool:
        """Ask for every fact, and show which were found."""
        with working("importing PyTorch and transformers") as progress:
            require_transformers()
            from token_sparse_attention.demo import run_demo

            result = run_demo(device=self.device, on_progress=progress.update, say=note)
        if self.json:
            print_json(result.to_dict())
        else:
            show(result)
        return not result.failures


def show(result: DemoResult) -> None:
    """Print what was found, how long it took, and whether it passes."""
    from rich.table import Table

    console = output()
    table = Table("depth", "expected", "dense", "sparse", title="Facts hidden in the document")
    for finding in result.findings:
        needle = finding.needle
        table.add_row(
            f"{needle.depth:.0%}",
            needle.answer,
            _verdict(finding.dense_correct, finding.dense.text),
            _verdict(finding.sparse_correct, finding.sparse.text),
        )
    console.print(table)
    last = result.findings[-1]
    if last.sparse.report:
        console.print("What each layer did with the document, read sparsely:")
        console.print(layer_table(last.sparse.report.last_prefill()))
    for path, seconds in result.reading_seconds.items():
        console.print(f"{path}: read the document in {seconds:.2f} s (one run)")
    if result.note is not None:
        console.print(f"[yellow]note[/]: {result.note}", highlight=False)
    for failure in result.failures:
        console.print(f"[red]FAILED[/]: {failure}")
    if not result.failures:
        console.print(f"[green]passed[/]: {result.summary}")


def _verdict(correct: bool, text: str) -> str:
    from rich.markup import escape

    return "[green]found[/]" if correct else "[red]missed[/]: " + escape(text[:40])
