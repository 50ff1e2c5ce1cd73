"""``tsa info``: what is installed, and what runs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from token_sparse_attention.cli.command import Command, output, print_json


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Show versions, devices, and the attention backends found."""

    name: ClassVar[str] = "info"
    example: ClassVar[str] = "tsa info"

    def run(self) -> bool:
        """Show them."""
        from rich.table import Table

        from token_sparse_attention.info import collect

        facts = collect()
        if self.json:
            print_json(facts)
            return True
        console = output()
        table = Table("package", "version")
        for name, version in facts["versions"].items():
            table.add_row(name, version or "not installed")
        console.print(table)
        table = Table(
            "device", "dtype", "backends that ran", "auto picks", "because", "patterns run on"
        )
        for device in facts["devices"]:
            for entry in facts["backends"][device["device"]]:
                table.add_row(
                    f"{device['device']} ({device['name']})",
                    entry["dtype"],
                    ", ".join(entry["available"]) or "none",
                    entry["auto"],
                    entry["reason"],
                    entry["patterns_on"],
                )
        console.print(table)
        return True
