"""The package as a whole: imports, layering, and the examples in its documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import token_sparse_attention

ROOT = Path(token_sparse_attention.__file__).parent
PUBLIC = sorted(
    module.name
    for module in pkgutil.walk_packages([str(ROOT)], "token_sparse_attention.")
    if not module.name.endswith("__main__")
)
NEED_VLLM = {f"token_sparse_attention.integrations.vllm.{name}" for name in ("cpu", "cuda")}
# A module may import those of its own level's parts and of the levels before it.
LEVELS = [
    {"errors", "options", "device"},
    {"records", "checks", "plots"},
    {"result_lines"},
    {"blocks", "bundled", "config", "impls", "tensor_parallel"},
    {"inputs", "crossover", "reference", "profile", "kernels"},
    {"gate", "results", "settings"},
    {"attention", "scoring", "compression"},
    {"methods", "execution"},
    {"prefill"},
    {"custom_op"},
    {"functional"},
    {"integrations", "info"},
    {"run", "benchmark"},
    {"demo", "calibration", "evaluation"},
    {"fidelity"},
    {"report"},
    {"cli"},
]


def part_of(module: str) -> str:
    return module.removeprefix("token_sparse_attention.").split(".")[0]


def level_of(part: str) -> int:
    return next(index for index, parts in enumerate(LEVELS) if part in parts)


def imported_parts(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "token_sparse_attention":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {part_of(name) for name in names if name.startswith("token_sparse_attention.")}
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_imports_flow_one_way(module):
    spec = importlib.util.find_spec(module)
    mine = part_of(module)
    for other in imported_parts(Path(spec.origin)) - {mine, "__version__"}:
        assert level_of(other) < level_of(mine), f"{module} imports {other}"


def test_only_dispatchers_import_the_reference():
    users = {
        file.relative_to(ROOT).as_posix()
        for file in ROOT.rglob("*.py")
        if "reference" in imported_parts(file)
    }
    assert users == {"scoring.py", "methods/sampling.py", "methods/selection.py"}


def in_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_neither_triton_nor_transformers():
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None
import torch, token_sparse_attention as tsa
q = torch.randn(1, 2, 300, 16)
for config in (
    tsa.TokenSelectionConfig(drop_mass=0.2, observation_window=16, min_tokens=32),
    tsa.KVSamplingConfig(block_size=32, sliding_window=32, num_samples=20, crossover="off"),
):
    aux = tsa.AuxRequest(selection=True)
    out, selection, _ = tsa.token_sparse_attention(q, q, q, config, return_aux=aux)
    print(bool(selection.ran_sparse))
"""
    assert in_fresh_process(code) == "True\nTrue"


def test_importing_has_no_side_effects():
    code = """
import sys, torch
before = set(torch.ops.__dict__)
import token_sparse_attention
print([name for name in ("transformers", "rich", "vllm") if name in sys.modules])
"""
    assert in_fresh_process(code) == "[]"


def test_public_names_exist_and_are_typed():
    for name in token_sparse_attention.__all__:
        assert getattr(token_sparse_attention, name).__doc__, name
    assert (ROOT / "py.typed").exists()


def test_docstring_examples_run():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    public = {
        name: getattr(token_sparse_attention, name) for name in token_sparse_attention.__all__
    }
    ran = set()
    for name in PUBLIC:
        if name in NEED_VLLM:
            continue
        module = importlib.import_module(name)
        for test in finder.find(module, globs={**public, **vars(module), "torch": torch}):
            if test.examples:
                torch.manual_seed(0)
                runner.run(test)
                ran.add(test.name.removeprefix("token_sparse_attention."))
    assert runner.summarize(verbose=False).failed == 0
    operations = {
        "scoring.score_tokens",
        "methods.selection.select_tokens",
        "compression.compress",
        "compression.decompress",
        "functional.token_sparse_attention",
        "config.KVSamplingConfig",
        "config.TokenSelectionConfig",
        "config.config_from_json",
        "execution.Execution",
        "profile.LayerProfile",
        "profile.convert_settings",
        "integrations.transformers.apply",
    }
    assert operations <= ran, "these have no example"
