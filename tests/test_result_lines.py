"""Result files that a run goes on with: whole lines, of one run at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from token_sparse_attention.errors import JobFailedError, UsageError
from token_sparse_attention.records import Versioned, encode
from token_sparse_attention.result_lines import LineFile, ResultLines


@dataclass(frozen=True)
class Header(Versioned):
    seed: int


@dataclass(frozen=True)
class Entry:
    key: int


FILES = ResultLines("a run", Header, Entry, lambda *_: None)


def test_a_run_goes_on_after_the_last_whole_line(tmp_path):
    path = tmp_path / "new" / "lines"
    found, file = FILES.open(path, Header(1))
    with file:
        file.write(Entry(1))
        lines = [encode(Header(1)), encode(Entry(1))]
        assert path.read_text().splitlines() == lines, "a line is there at once"
    assert found == []
    with path.open("a") as cut_off:
        cut_off.write('{"key": 2')
    found, file = FILES.open(path, Header(1))
    with file:
        file.write(Entry(3))
    assert found == [Entry(1)]
    assert FILES.load(path) == (Header(1), (Entry(1), Entry(3)))


def test_a_file_of_another_run_stays_as_it_is(tmp_path):
    path = tmp_path / "lines"
    path.write_text(encode(Header(1)) + '\n{"key": ')
    for header in (Header(2), Header(3)):  # the first one has closed the file
        with pytest.raises(UsageError, match="holds another run: its seed is 1, now it would be"):
            FILES.open(path, header)
    assert path.read_text() == encode(Header(1)) + '\n{"key": '


def test_two_runs_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "lines"
    _, file = FILES.open(path, Header(1))
    with file:
        file.write(Entry(1))
        for attempt in (
            lambda: FILES.check_file(path),
            lambda: FILES.open(path, Header(1)),
            lambda: LineFile(path),
        ):
            with pytest.raises(UsageError, match="another run is writing it"):
                attempt()
        file.write(Entry(2))
    FILES.check_file(path)
    assert FILES.load(path)[1] == (Entry(1), Entry(2))


def test_a_file_that_cannot_be_opened_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/below cannot be written: "):
        LineFile(tmp_path / "file" / "below")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_failed_job():
    full = pytest.raises(JobFailedError, match="/dev/full cannot be written: No space left")
    with LineFile(Path("/dev/full")) as file, full:
        file.write(1)


def test_results_may_go_to_a_device():
    FILES.check_file(Path(os.devnull))
    for _ in range(2):
        found, file = FILES.open(Path(os.devnull), Header(1))
        with file:
            file.write(Entry(1))
        assert found == []
