"""Change one thing at a time in the code of the methods, and see whether a test fails.

    python scripts/mutants.py --count 120 --out benchmarks/results/mutants/changes.json
    python scripts/mutants.py --only methods/sampling.py --count 20
    python scripts/mutants.py --again --out benchmarks/results/mutants/changes.json

Each mutant changes one comparison, sum, constant, bound or condition in a copy of the tree, and
runs the tests that are for its file until one fails. A survivor either lacks a test or cannot
matter: `scripts/mutants-harmless.txt` says which cannot, and why; these are not tried.

Every run of the tests is a fork of this process, which has imported what they need and nothing
of the package. The quickest tests go first, and those that failed for other mutants of the file.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/token_sparse_attention")
HARMLESS = ROOT / "scripts" / "mutants-harmless.txt"
SAMPLING = ("tests/methods/test_blocks.py", "tests/methods/test_sampling.py",
            "tests/methods/test_properties.py")  # fmt: skip
SELECTION = ("tests/methods/test_selection.py", "tests/test_golden.py", "tests/test_functional.py")
WORK = ("tests/methods/test_workspace.py", "tests/evaluation/test_summary.py")
OF_KERNELS = "tests/kernels/test_kernels.py::test_"
GATHERED = OF_KERNELS + "compress_and_decompress"
SELECTED = ("tests/kernels/test_selection.py", *(OF_KERNELS + name for name in (
    "selection_of_a_kept_share", "selection_of_ties_zeros_and_broken_sequences", "golden_indices",
    "selection", "selection_over_several_chunks", "crossover", "reference_agrees_on_defaults",
    "short_sequences_of_a_batch_run_dense",
)))  # fmt: skip
PAGES = "tests/test_docs_pages.py::test_the_crossovers_lengths_are_the_codes"
TESTS: dict[str, tuple[str, ...]] = {
    "blocks.py": (*SAMPLING, "tests/kernels/test_block_scoring.py"),
    "compression.py": ("tests/test_compression.py", *SELECTION, GATHERED),
    "crossover.py": ("tests/test_crossover.py", "tests/test_gate.py", PAGES,
                     "tests/methods/test_sampling.py"),
    "gate.py": ("tests/test_gate.py", "tests/test_crossover.py", *SAMPLING),
    "inputs.py": ("tests/test_gate.py", "tests/test_functional.py", *SAMPLING),
    "functional.py": ("tests/test_functional.py", "tests/test_custom_op.py"),
    "attention/sdpa.py": ("tests/attention/test_backend.py", *SAMPLING),
    "methods/local.py": SAMPLING,
    "methods/probes.py": (*SAMPLING, "tests/integrations/test_chunks.py"),
    "methods/sampling.py": (*SAMPLING, *WORK, "tests/test_tensor_parallel.py"),
    "methods/selection.py": (*SELECTION, *WORK, "tests/test_tensor_parallel.py"),
    "kernels/block_scoring.py": ("tests/kernels/test_block_scoring.py",),
    "kernels/budget.py": SELECTED,
    "kernels/sampled_attention.py": ("tests/kernels/test_sampled_attention.py",),
    "kernels/sampling.py": ("tests/kernels/test_sampling.py",),
    "kernels/selection.py": SELECTED,
    "integrations/past_probes.py": ("tests/integrations/test_chunks.py",
                                    "tests/integrations/test_continuous_batching.py",
                                    "tests/methods/test_workspace.py"),
}  # fmt: skip
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {  # how it is written, and what replaces it
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
CALLED = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin",
          "amin": "amax", "any": "all", "all": "any"}  # fmt: skip
LIMIT = 600  # seconds that the tests of a mutant may take
DROPPED = {"clamp", "masked_fill", "nan_to_num", "double", "round"}  # methods: x.f(...) becomes x


@dataclass(frozen=True)
class Mutant:
    """One change to a file.

    Attributes:
        file: in the package.
        begin: its first character in the file.
        end: the character after its last.
        before: what stands there.
        after: what replaces it.
        context: the whole line, without indentation.
        number: counts the changes of a file that read the same, from 1.
    """

    file: str
    begin: int
    end: int
    before: str
    after: str
    context: str
    number: int

    def __str__(self) -> str:
        which = f" ({self.number})" if self.number > 1 else ""
        return f"{self.file}: {self.before} -> {self.after}{which} in: {self.context}"


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
            found.append((begin, end, text[begin:end], after, lines[line - 1].strip()))
    alike: Counter[tuple[str, ...]] = Counter()
    mutants = []
    for begin, end, *words in sorted(found):
        alike[tuple(words)] += 1
        mutants.append(Mutant(file, begin, end, *words, alike[tuple(words)]))
    return mutants


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
    """Return as many mutants of each file, or all that it has; other changes change no choice."""

    def rank(one: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {one}".encode()).digest()

    waiting = [sorted(mutants_of(file), key=rank) for file in files]
    chosen: list[Mutant] = []
    while len(chosen) < count and any(waiting):
        for of_file in waiting:
            if of_file and len(chosen) < count:
                chosen.append(of_file.pop(0))
    return sorted(chosen, key=lambda one: (files.index(one.file), one.begin))


@dataclass
class Order:
    """A plugin for pytest: which tests go first, and what a run of them shows.

    Attributes:
        seconds: that tests took in other runs.
        failures: how often they failed there.
        took: seconds in this run.
        failed: in this run.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    took: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def rank(item: Any) -> tuple[str, float]:
            # Tests that share a fixture stay together, so that it is made once.
            of_items = item._fixtureinfo.name2fixturedefs.values()
            shares = any(one.scope == "module" for fixtures in of_items for one in fixtures)
            seconds = self.seconds.get(item.nodeid, 0.0) + 0.1
            return str(item.path) * shares, seconds / (1 + 9 * self.failures[item.nodeid])

        items.sort(key=rank)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def _child(tree: Path, tests: Sequence[str], order: Order, answer: Connection) -> None:
    """Run the tests in a process of their own."""
    import pytest

    os.setsid()
    os.chdir(tree)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.path[:0] = str(tree), str(tree / "src")  # as for `python -m pytest`, and processes of it
    os.environ["PYTHONPATH"] = str(tree / "src")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                 "-k", "not opcheck and not compiled"]  # fmt: skip
    code = pytest.main([*arguments, *tests], plugins=[order])
    answer.send((int(code), [*order.failed, ""][0], dict(order.took)))


def run_tests(tree: Path, tests: Sequence[str], order: Order) -> tuple[str, str, dict[str, float]]:
    """Return how the tests ended, which failed, and the seconds of each that ran.

    They end as `passed`, `failed` or `too long`; no name is that of a test if a file cannot be
    imported.
    """
    fork = multiprocessing.get_context("fork")
    receive, answer = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(tree, tests, order, answer))
    child.start()
    answer.close()
    try:
        if not receive.poll(LIMIT):
            return "too long", "", {}
        code, failed, seconds = receive.recv()
        return "failed" if code else "passed", failed, seconds
    except EOFError:  # it crashed
        return "failed", "", {}
    finally:
        if child.is_alive() and child.pid is not None:
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def _prepare(tree: Path) -> None:
    """Copy what the tests need, and import what they import."""
    for name in ("src", "tests", "benchmarks", "docs", "training", "scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    os.environ |= {"CI": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    runpy.run_path(str(tree / "tests" / "conftest.py"))
    for name in ("triton.language", "transformers", "hypothesis.strategies"):
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)


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
    parser.add_argument(
        "--without", action="append", default=[], metavar="FILE", help="none of it"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="results; a run goes on there")
    parser.add_argument("--again", action="store_true", help="only what survived without a reason")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    args = parser.parse_args(argv)
    unknown = sorted({*(args.only or ()), *args.without} - set(TESTS))
    if unknown:
        parser.error(f"a file must be one of {', '.join(TESTS)}, got {', '.join(unknown)}")
    files = [file for file in args.only or TESTS if file not in args.without]
    told = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    there = {str(one) for file in TESTS for one in mutants_of(file)}
    told = {one: ended for one, ended in told.items() if one in there}  # the code may have changed
    mutants = choose(files, args.count, args.seed)
    if args.again:
        mutants = [one for file in files for one in mutants_of(file)]
        mutants = [one for one in mutants if str(one) in _unexplained(told)]
    else:
        mutants = [one for one in mutants if str(one) not in told]
    if args.list:
        print(*mutants, sep="\n")
        return 0
    reasons = harmless()
    told |= {str(one): "harmless" for one in mutants if str(one) in reasons}
    mutants = [one for one in mutants if str(one) not in reasons]
    with tempfile.TemporaryDirectory() as folder:
        for ended in _try(mutants, Path(folder)):
            told |= ended
            if args.out:
                args.out.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    return _show(told)


def _try(mutants: Sequence[Mutant], tree: Path) -> Iterator[dict[str, str]]:
    """Yield what each mutant ended in: the test that failed, or how the tests ended."""
    _prepare(tree)
    orders: dict[str, Order] = {}
    sound: set[str] = set()  # tests that failed, and pass without the mutant
    for number, mutant in enumerate(mutants, 1):
        order, tests = orders.setdefault(mutant.file, Order()), TESTS[mutant.file]
        path = tree / PACKAGE / mutant.file
        whole = path.read_text(encoding="utf-8")
        path.write_text(whole[: mutant.begin] + mutant.after + whole[mutant.end :])
        began = time.monotonic()
        ended, failed, seconds = run_tests(tree, tests, order)
        path.write_text(whole, encoding="utf-8")
        order.seconds |= seconds
        if ended == "failed":
            again = failed or tests[0]
            if again not in sound and run_tests(tree, [again], Order())[0] != "passed":
                sys.exit(f"{again} must pass before anything is changed")
            sound.add(again)
            order.failures[failed] += 1
        took = time.monotonic() - began
        print(f"{number}/{len(mutants)} {ended} {failed} {took:.0f} s: {mutant}", flush=True)
        yield {str(mutant): failed or ended}


def _unexplained(told: dict[str, str]) -> list[str]:
    reasons = harmless()
    return [one for one, ended in told.items() if _survived(ended) and one not in reasons]


def _survived(ended: str) -> bool:
    return ended in ("passed", "harmless")


def _show(told: dict[str, str]) -> int:
    """Print the survivors; return 1 if at least a twentieth survive without a reason."""
    unexplained, survive = _unexplained(told), sum(map(_survived, told.values()))
    print(f"{len(told)} mutants, {survive} survive, {len(unexplained)} without a reason")
    print(*unexplained, sep="\n")
    return int(20 * len(unexplained) >= max(len(told), 1))


if __name__ == "__main__":
    sys.exit(main())
