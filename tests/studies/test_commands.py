"""The studies' commands say what they do, with an example, and what they cannot use."""

from __future__ import annotations

import importlib
from pathlib import Path

import benchmarks
import pytest

COMMANDS = (
    *("pages", "operator.sampling", "fidelity.__main__"),
    *("block_sparse.density", "block_sparse.layer_times", "block_sparse.speed"),
    *(
        "block_sparse.tune",
        "serving.chunks",
        "serving.first_token",
        "serving.loads",
        "serving.serve",
    ),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    called = f"python -m benchmarks.{name.removesuffix('.__main__')}"
    assert f"usage: {called}" in printed
    assert printed.count(called) >= 2, "an example"


def test_every_command_is_tested():
    folder = Path(benchmarks.__file__).parent
    runnable = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert runnable == set(COMMANDS)


def test_bad_input_exits_2_and_names_it(capsys):
    from benchmarks.block_sparse import speed

    assert speed.main(["--executors", "abacus", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m benchmarks.block_sparse.speed: --executors must be among")
    with pytest.raises(SystemExit) as stop:
        speed.main(["--lengths", "4K"])
    assert stop.value.code == 2
    assert "must be a whole number, got '4K'" in capsys.readouterr().err
