"""One command, whose errors are raised: `main` without the exit codes of errors."""

from __future__ import annotations

from token_sparse_attention.cli.commands import parse


def run(*words: object) -> int:
    """Run a command, and return its exit code if it raises no error."""
    return 0 if parse([str(word) for word in words]).run() else 1
