"""docs/troubleshooting.md knows every error, every note and every reason for running dense."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import token_sparse_attention
from token_sparse_attention import DenseReason

SOURCE = Path(token_sparse_attention.__file__).parent
PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
LISTED = [cell.replace(r"\|", "|") for cell in re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)]
NEVER_SEEN = {"NoFigureError"}  # caught where it is raised for, and shown as an empty cell
NOTES = {"warn", "warning"}  # functions that tell without raising


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(SOURCE.rglob("*.py")):
        yield file.relative_to(SOURCE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def template(text: ast.expr) -> str | None:
    """A message with "…" for what differs; None if none of it stands in the code."""
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        parts = [re.sub(r"%\w", "…", text.value)]
    elif isinstance(text, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in text.values]
    else:
        return None
    message = re.sub("…+", "…", "".join(parts)).partition("\n")[0]
    return message if re.search("[a-z]{2}", message.removeprefix("tsa: ")) else None


def messages(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What is raised, warned of, or printed to standard error by name of the command."""
    for node in ast.walk(tree):
        told: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            told = [] if name in NEVER_SEEN else node.exc.args[:1]
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            first = template(node.args[0]) or ""
            if name in NOTES or (name == "print" and first.startswith("tsa: ")):
                told = node.args[:1]
        for text in told:
            if message := template(text):
                yield message, node.lineno


def test_every_message_is_listed():
    found = {
        message: f"{name}:{line}" for name, tree in trees() for message, line in messages(tree)
    }
    assert len(found) > 200, "the code is not read as it is written"
    missing = [f"{found[m]}: | `{m}` | what to do |" for m in found if m not in LISTED]
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(sorted(missing))
    old = [m for m in LISTED if m not in found and m not in list(DenseReason)]
    assert not old, "no longer in the code, remove from docs/troubleshooting.md:\n" + "\n".join(
        old
    )


def test_every_reason_is_listed():
    missing = [reason.value for reason in DenseReason if reason not in LISTED]
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_reasons_are_members_and_not_text():
    """A record's reason is never written out where it is recorded."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "dense_reason":
                assert template(node.value) is None, f"{name}:{node.value.lineno}"


def test_messages_are_told_apart():
    code = """
raise ValueError(f"a must be {x!r}, got {y}{z}")
raise NoFigureError("nothing")
raise UsageError(str(error)) from error
warnings.warn(f"ran dense: {reason}")
log.warning("%s ran dense", name)
print(f"tsa: warning: {count} tokens", file=sys.stderr)
print("an answer")
"""
    assert [message for message, _ in messages(ast.parse(code))] == [
        "a must be …, got …",
        "ran dense: …",
        "… ran dense",
        "tsa: warning: … tokens",
    ]
