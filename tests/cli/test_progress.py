"""Progress, one line that changes or lines now and then in a log; tables in narrow terminals."""

from __future__ import annotations

import time

import pytest

from token_sparse_attention.cli import command, main
from token_sparse_attention.cli import run as run_command
from token_sparse_attention.cli.command import counting, working
from token_sparse_attention.run import Answer


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_log_begins_at_once_and_holds_back_what_follows_too_soon(monkeypatch, capsys):
    monkeypatch.setattr(command, "_INTERVAL", 60.0)
    with working("loading") as progress:
        assert lines(capsys) == ["tsa: loading"]
        for number in range(5):
            progress.update(f"step {number}")
        assert lines(capsys) == []
    assert lines(capsys) == []


def test_the_newest_message_is_shown_when_the_interval_is_over(monkeypatch, capsys):
    monkeypatch.setattr(command, "_INTERVAL", 0.2)
    with working("loading") as progress:
        assert lines(capsys) == ["tsa: loading"]
        progress.update("step 1")
        progress.update("step 2")
        for _ in range(100):
            time.sleep(0.05)
            if found := lines(capsys)[-1:]:
                break
        assert found == ["tsa: step 2"]
        time.sleep(0.3)
        progress.update("step 3")
        assert lines(capsys) == ["tsa: step 3"]


def test_nothing_is_shown_after_the_end(monkeypatch, capsys):
    monkeypatch.setattr(command, "_INTERVAL", 0.1)

    def interrupted():
        with working("loading") as progress:
            progress.update("step 1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    time.sleep(0.3)
    assert lines(capsys) == ["tsa: loading"]


def test_a_log_says_how_many_are_done(monkeypatch, capsys):
    monkeypatch.setattr(command, "_INTERVAL", 0.0)
    with counting(3) as report:
        report("dense, niah", 1)
    assert lines(capsys) == ["tsa: 0 of 3: starting", "tsa: 1 of 3: dense, niah"]


def test_a_terminal_whose_lines_cannot_change_gets_lines(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    with working("loading"), counting(2):
        pass
    assert lines(capsys) == ["tsa: loading", "tsa: 0 of 2: starting"]


def test_a_table_in_a_narrow_terminal_keeps_its_content(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "token-sparse-attention" in shown
    assert "auto picks" in shown


def test_replies_and_paths_keep_their_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    name, reply = "a model/" * 20, "a line of many words, " * 9
    answers = {"sparse": Answer(reply, 9, 9, 0.1, 0.2)}
    run_command._show(name, "cpu", "defaults", answers, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{name} on cpu, 9 prompt tokens, settings: defaults"
    assert reply in lines
