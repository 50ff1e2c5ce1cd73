"""Helps and errors in arguments come at once, and say what they should."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from token_sparse_attention.attention.names import BACKENDS
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.benchmark.contenders import DENSE
from token_sparse_attention.cli import main
from token_sparse_attention.cli.commands import BENCHMARKS, COMMANDS
from token_sparse_attention.cli.model import DenseKernel, ModelOptions
from token_sparse_attention.impls import IMPLS
from token_sparse_attention.settings import PATTERN_NAMES

HEAVY = ("torch", "transformers", "triton", "matplotlib", "lm_eval", "jinja2")
WORDS = [
    [], *([command.name] for command in COMMANDS), ["bench"],
    *(["bench", command.name] for command in BENCHMARKS),
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys, time\n"
        "from token_sparse_attention.cli import main\n"
        f"try: main({[*words, '--help']})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(loaded, time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, seconds = done.stderr.rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 0.5, "0.15 s of CPU time, the interpreter's start included"
    assert f"usage: {' '.join(['tsa', *words])} [-h]" in done.stdout


def test_the_package_imports_names_when_they_are_asked_for():
    code = (
        "import sys, token_sparse_attention as tsa\n"
        "assert 'torch' not in sys.modules\n"
        "assert tsa.KVSamplingConfig.__name__ in dir(tsa)\n"
        "assert 'torch' not in sys.modules\n"
        "from token_sparse_attention import token_sparse_attention as operator\n"
        "import torch; torch.ops.token_sparse_attention.prefill\n"
        "assert tsa.token_sparse_attention is operator\n"
        "tsa.absent"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == (
        "AttributeError: module 'token_sparse_attention' has no attribute 'absent'"
    )


def test_what_helps_name_is_what_there_is(capsys):
    """Names that helps hold as text, because where they are defined torch is imported."""
    assert get_args(DenseKernel) == BACKENDS
    assert tuple(PATTERNS) == PATTERN_NAMES
    assert get_args(get_type_hints(ModelOptions)["impl"]) == IMPLS
    for command in ("run", "capture", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"dense kernel: {', '.join(BACKENDS)}" in text
        assert ", ".join(PATTERNS) in text
    with pytest.raises(SystemExit):
        main(["bench", "op", "--help"])
    named = re.search(r"default: ([\w,]+); off CUDA ([\w,]+)\)", capsys.readouterr().out)
    assert {name for names in named.groups() for name in names.split(",")} <= set(DENSE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rnu", "did you mean 'run'?"),
        ("bench ops", "did you mean 'op'?"),
        ("fidelty", "did you mean 'fidelity'?"),
        ("fidelity --pices 2", "did you mean '--pieces'?"),
        ("run --prompt-file a --qestion b", "did you mean '--question'?"),
        ("run --prompt-file a --impl tritn", "--impl: must be one of .*; did you mean 'triton'?"),
        ("run", "the following arguments are required: --prompt-file"),
        ("calibrate --out a", "the following arguments are required: --method"),
    ],
)
def test_errors_are_one_line_with_the_nearest_name(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message.replace("?", r"\?"), error)
    assert re.search(r"\(usage: tsa .*--help\)$", error.strip())
