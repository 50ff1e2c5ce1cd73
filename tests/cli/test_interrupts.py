"""Ctrl-C, SIGTERM and closed pipes: the usual exit code, at most one line, whole files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from evaluation.small import save_model
from token_sparse_attention import bundled
from token_sparse_attention.cli import BROKEN_PIPE, main
from token_sparse_attention.fidelity.record import load_results
from token_sparse_attention.records import read_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX's signals")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = "tsa: interrupted\n"


def start(*command, **more):
    """Start a process, in which SIGINT is not ignored even where the tests run behind a shell."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def tsa(*words, **more):
    return start(sys.executable, "-m", "token_sparse_attention.cli", *map(str, words), **more)


def info_that(does, **more):
    """Start `tsa info`, which runs these lines instead."""
    lines = "\n".join(f"    {line}" for line in does.splitlines())
    code = (
        "import sys, time\n"
        "from token_sparse_attention import cli\n"
        "from token_sparse_attention.cli.info import Info\n"
        f"def run(self):\n{lines}\n    return True\n"
        "Info.run = run\n"
        "sys.argv = ['tsa', 'info']\n"
        "cli.script()"
    )
    return start(sys.executable, "-c", code, **more)


def signalled(process, number, said=SAID):
    """Send a signal when the process says that it is ready; check how it ends."""
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.wait(60)
        assert process.stdout.read() == ""
        assert (process.returncode, process.stderr.read()) == (CODES[number], said)


READY = "print('ready', flush=True)\n"
MOMENTS = {
    "waiting": READY + "time.sleep(60)",
    "behind a library that turns it into its own error": (
        "try:\n    " + READY + "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise RuntimeError('it failed') from None"
    ),
    "in a finalizer, from where nothing can be raised": (
        "class Slow:\n    def __del__(self):\n        " + READY + "        time.sleep(60)\n"
        "Slow()\n"
        "time.sleep(60)"
    ),
}


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_signals_end_a_command_in_one_line(moment, number):
    signalled(info_that(MOMENTS[moment]), number)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_an_interrupted_import_is_no_missing_library(tmp_path, number):
    (tmp_path / "transformers.py").write_text(
        "import time\n"
        + READY
        + "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('lost')\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    first = "tsa: importing PyTorch and transformers\n"
    process = tsa("demo", env=os.environ | {"PYTHONPATH": path})
    signalled(process, number, first + SAID)


def test_a_second_interrupt_does_not_wait():
    process = info_that(
        "try:\n    " + READY + "    time.sleep(60)\n"
        "finally:\n    print('cleaning', file=sys.stderr, flush=True)\n    time.sleep(60)"
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == SAID


def test_an_ignored_interrupt_stays_ignored():
    process = info_that(READY + "sys.stdin.readline()\nprint('done')", stdin=subprocess.PIPE)
    ignoring = process.args[-1].replace(
        "cli.script()", "import signal; signal.signal(2, signal.SIG_IGN); cli.script()"
    )
    process.kill()
    process.communicate()
    with start(*process.args[:-1], ignoring, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate("go on\n", timeout=60) == ("done\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_files_are_whole_or_as_before(tmp_path, number):
    (tmp_path / "out").write_text("before")
    signalled(
        info_that(
            "from pathlib import Path\n"
            "from token_sparse_attention.records import save_lines\n"
            "def lines():\n"
            "    yield 'a line'\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(60)\n"
            "save_lines(Path('out'), lines())",
            cwd=tmp_path,
        ),
        number,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary file is left"
    assert (tmp_path / "out").read_text() == "before"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The words of a measurement, and what comes out."""
    folder = tmp_path_factory.mktemp("fidelity")
    (folder / "text").write_text(read_text(bundled.SAMPLE[0])[:9000])
    model = save_model(folder / "model")
    small = '{"block_size": 16, "num_probes": 8, "sliding_window": 16, "num_samples": 16}'
    words = ["fidelity", model, "--text", folder / "text", "--lengths", "256", "--pieces", "8"]
    words += ["--shapes", "continue,second-turn", "--config", f"small={small}", "--out"]
    words = [*map(str, words)]
    assert main([*words, str(folder / "whole")]) == 0
    return words, load_results(folder / "whole").answers


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_an_interrupted_measurement_goes_on_to_the_same_numbers(measured, tmp_path, number):
    words, whole = measured
    out = tmp_path / "cut"
    with tsa(*words, out) as process:
        while not out.is_file() or out.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].splitlines()
    keeps = f"{out} keeps what was finished, and the same command goes on from there"
    assert (process.returncode, said[-1]) == (CODES[number], f"tsa: interrupted; {keeps}")
    assert 2 <= len(load_results(out).answers) < len(whole)
    assert main([*words, str(out)]) == 0
    mended = load_results(out).answers
    assert [(a.key, a.divergence, a.loss) for a in mended] == [
        (a.key, a.divergence, a.loss) for a in whole
    ]


@pytest.mark.parametrize("delay", [0.2, 1.0, 2.5, 6.0])
def test_interrupts_at_any_moment(measured, tmp_path, delay):
    """While torch and transformers are imported, a model is loaded, and it runs."""
    words, _ = measured
    plot = tmp_path / "plot.svg"
    with tsa(*words, tmp_path / "out", "--plot", plot) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 130, -signal.SIGINT), said  # it may be done, or just ending
    assert "Traceback" not in said
    if process.returncode == 130:
        assert said.splitlines()[-1].startswith("tsa: interrupted")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "plot.svg"}
    assert not plot.exists() or plot.read_text().endswith("</svg>\n")


READERS = {
    "print": "print('facts\\n' * 99999)",
    "print, told at the end": "print('facts')",
    "rich": "from rich.console import Console\nConsole().print('facts\\n' * 99999)",
    "progress": (
        "from token_sparse_attention.cli.command import working\n"
        "from token_sparse_attention.errors import running\n"
        "with running('it', 'run'), working('loading'): pass"
    ),
    "a file": (
        "from pathlib import Path\n"
        "from token_sparse_attention.records import save\n"
        "save(Path('/dev/stdout'), 'facts\\n' * 99999)"
    ),
}


@pytest.mark.parametrize("writes", READERS)
def test_whoever_stops_reading_ends_a_command_quietly(writes):
    process = info_that(READERS[writes])
    closed, other = process.stdout, process.stderr
    if writes == "progress":
        closed, other = other, closed
    closed.close()
    with process:
        assert other.read() == ""
        assert process.wait(60) == BROKEN_PIPE == 141
