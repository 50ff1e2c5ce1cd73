"""Change one thing at a time in the code of the methods, and see whether a test fails.

    python scripts/mutants.py --count 120 --out benchmarks/results/mutants.json
    python scripts/mutants.py --only methods/sampling.py --count 20

Each mutant changes one comparison, sum, constant, bound or condition in a copy of the tree, and
runs the tests that are for its file until one fails. A survivor either lacks a test or cannot
matter: `scripts/mutants-harmless.txt` says which cannot, and why.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/token_sparse_attention")
HARMLESS = ROOT / "scripts" / "mutants-harmless.txt"
SAMPLING = ("tests/methods/test_blocks.py", "tests/methods/test_sampling.py",
            "tests/methods/test_properties.py")  # fmt: skip
SELECTION = ("tests/methods/test_selection.py", "tests/test_golden.py", "tests/test_functional.py")
TESTS: dict[str, tuple[str, ...]] = {
    "blocks.py": (*SAMPLING, "tests/kernels/test_block_scoring.py"),
    "compression.py": ("tests/test_compression.py", *SELECTION),
    "crossover.py": ("tests/test_crossover.py", "tests/test_gate.py", "tests/test_docs_pages.py"),
    "gate.py": ("tests/test_gate.py", "tests/test_crossover.py", *SAMPLING),
    "inputs.py": ("tests/test_functional.py", *SAMPLING),
    "functional.py": ("tests/test_functional.py", "tests/test_custom_op.py"),
    "attention/sdpa.py": ("tests/attention/test_backend.py", *SAMPLING),
    "methods/local.py": SAMPLING,
    "methods/probes.py": (*SAMPLING, "tests/integrations/test_chunks.py"),
    "methods/sampling.py": (*SAMPLING, "tests/test_tensor_parallel.py"),
    "methods/selection.py": (*SELECTION, "tests/test_tensor_parallel.py"),
    "kernels/block_scoring.py": ("tests/kernels/test_block_scoring.py",),
    "kernels/budget.py": ("tests/kernels/test_selection.py", "tests/kernels/test_kernels.py"),
    "kernels/sampled_attention.py": ("tests/kernels/test_sampled_attention.py",),
    "kernels/sampling.py": ("tests/kernels/test_sampling.py",),
    "kernels/selection.py": ("tests/kernels/test_selection.py", "tests/kernels/test_kernels.py"),
    "integrations/past_probes.py": ("tests/integrations/test_chunks.py",
                                    "tests/integrations/test_kv_sampling.py"),
}  # fmt: skip
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {  # how it is written, and what replaces it
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
CALLED = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin",
          "amin": "amax", "any": "all", "all": "any"}  # fmt: skip
DROPPED = {"clamp", "masked_fill", "nan_to_num", "double", "round"}  # methods: x.f(...) becomes x


@dataclass(frozen=True)
class Mutant:
    """One change to a file.

    Attributes:
        file: in the package.
        line: of the change, from 1.
        begin: its first character in the file.
        end: the character after its last.
        before: what stands there.
        after: what replaces it.
        context: the whole line, without indentation.
    """

    file: str
    line: int
    begin: int
    end: int
    before: str
    after: str
    context: str

    def __str__(self) -> str:
        return f"{self.file}: {self.before} -> {self.after} in: {self.context}"


def mutants_of(file: str) -> list[Mutant]:
    """Return every change to a file, in order."""
    text = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = text.splitlines()
    skipped = {id(child) for node in _unread(tree) for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped or not hasattr(node, "lineno"):
            continue
        for begin, end, after in _changes(node, text, starts):
            line = next(n for n in range(len(lines), 0, -1) if starts[n - 1] <= begin)
            before, context = text[begin:end], lines[line - 1].strip()
            found.append(Mutant(file, line, begin, end, before, after, context))
    return sorted(found, key=lambda one: (one.begin, one.after))


def _unread(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what no test could see change: annotations, documentation, what is raised."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom)):
            yield node
        if isinstance(node, (ast.AnnAssign, ast.arg)) and node.annotation:
            yield node.annotation
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.returns:
                yield node.returns
            yield from node.decorator_list
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node


def _changes(node: ast.AST, text: str, starts: list[int]) -> Iterator[tuple[int, int, str]]:
    def at(line: int, column: int) -> int:
        # Columns count bytes.
        source = text[starts[line - 1] : starts[line]].encode()
        return starts[line - 1] + len(source[:column].decode())

    def begin(one: ast.expr) -> int:
        return at(one.lineno, one.col_offset)

    def end(one: ast.expr) -> int:
        return at(one.end_lineno or one.lineno, one.end_col_offset or 0)

    def operator(left: ast.expr, right: ast.expr, kind: ast.AST) -> Iterator[tuple[int, int, str]]:
        symbol, other = OPERATORS.get(type(kind), ("", ""))
        index = text[end(left) : begin(right)].find(symbol)
        if symbol and index >= 0:
            yield end(left) + index, end(left) + index + len(symbol), other

    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from operator(node.left, node.comparators[0], node.ops[0])
    elif isinstance(node, ast.BinOp):
        yield from operator(node.left, node.right, node.op)
    elif isinstance(node, ast.BoolOp):
        yield from operator(node.values[0], node.values[1], node.op)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        changed = node.value + 1 if isinstance(node.value, int) else node.value * 2 + 0.5
        yield begin(node), end(node), repr(changed)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
        yield begin(node), begin(node.operand), ""
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name, value = node.func.attr, node.func.value
        if name in CALLED:
            yield end(node.func) - len(name), end(node.func), CALLED[name]
        if name in DROPPED:
            yield end(value), end(node), ""
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in CALLED:
        yield begin(node.func), end(node.func), CALLED[text[begin(node.func) : end(node.func)]]


def choose(files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Return mutants at random, of each file in proportion to how many it has."""
    every = [one for file in files for one in mutants_of(file)]
    return random.Random(seed).sample(every, min(count, len(every)))


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> str:
    """Return how the tests ended: `passed`, `failed` or `too long`."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               "-k", "not opcheck and not compiled", *tests]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "CI": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, timeout=limit,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "too long"
    return "passed" if done.returncode == 0 else "failed"


def harmless() -> dict[str, str]:
    """Return the mutants that cannot matter, each with the reason."""
    if not HARMLESS.exists():
        return {}
    blocks = HARMLESS.read_text(encoding="utf-8").strip().split("\n\n")
    return dict(block.split("\n    ", 1) for block in blocks if "\n    " in block)


def main(argv: Sequence[str] | None = None) -> int:
    """Try mutants, and print those that no test notices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=120, help="how many (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--only", action="append", metavar="FILE", help="of this file alone")
    parser.add_argument("--limit", type=float, default=900, help="seconds a mutant may take")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results; a run goes on there")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.only or ()) - set(TESTS))
    if unknown:
        parser.error(f"--only must be one of {', '.join(TESTS)}, got {', '.join(unknown)}")
    mutants = choose(args.only or tuple(TESTS), args.count, args.seed)
    if args.list:
        print(*mutants, sep="\n")
        return 0
    told = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    known = {_key(one) for one in told}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("src", "tests", "benchmarks", "docs", "training"):
            ignored = shutil.ignore_patterns("__pycache__", "results") if name != "tests" else None
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        for path in ROOT.glob("*.*"):
            if path.is_file():
                shutil.copy(path, tree)
        left = [one for one in mutants if _key(asdict(one)) not in known]
        needed = list(dict.fromkeys(test for one in left for test in TESTS[one.file]))
        if needed and run_tests(tree, needed, args.limit * len(needed)) != "passed":
            parser.error("the tests must pass before anything is changed: " + " ".join(needed))
        for number, mutant in enumerate(mutants, 1):
            if mutant not in left:
                continue
            path = tree / PACKAGE / mutant.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole[: mutant.begin] + mutant.after + whole[mutant.end :])
            began = time.monotonic()
            ended = run_tests(tree, TESTS[mutant.file], args.limit)
            path.write_text(whole, encoding="utf-8")
            told.append({**asdict(mutant), "tests": ended})
            seconds = time.monotonic() - began
            print(f"{number}/{len(mutants)} {ended}, {seconds:.0f} s: {mutant}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(told, indent=1) + "\n")
    return _show(told)


def _key(told: dict[str, Any]) -> tuple[Any, ...]:
    return told["file"], told["begin"], told["after"], told["context"]


def _show(told: Sequence[dict[str, object]]) -> int:
    """Print the survivors; return 1 if at least a twentieth survive without a reason."""
    reasons = harmless()
    survivors = [
        f"{one['file']}: {one['before']} -> {one['after']} in: {one['context']}"
        for one in told
        if one["tests"] == "passed"
    ]
    unexplained = [one for one in survivors if one not in reasons]
    print(f"{len(told)} mutants, {len(survivors)} survive, {len(unexplained)} without a reason")
    print(*unexplained, sep="\n")
    return int(20 * len(unexplained) >= max(len(told), 1))


if __name__ == "__main__":
    sys.exit(main())
