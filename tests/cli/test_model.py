"""What the commands that run a model share: bad input is named and exits with 2 in each."""

from __future__ import annotations

import io
import json
import sys

import pytest

from cli.commands import run
from evaluation.small import save_model
from token_sparse_attention import bundled
from token_sparse_attention.cli import BAD_INPUT, main
from token_sparse_attention.cli.model import ModelOptions, read_text
from token_sparse_attention.errors import UsageError, loading

COMMANDS = {
    "run": ["run", "no/such/model", "--prompt-file", "FILE"],
    "calibrate": ["calibrate", "no/such/model", "--method", "drift", "--text", "FILE"],
    "capture": ["capture", "no/such/model", "--prompt-file", "FILE", "--out", "kept.json"],
    "eval": ["eval", "no/such/model", "--out", "result.jsonl"],
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A word.")
    return "text.txt"


def given(words: list[str], path: str) -> list[str]:
    return [path if word == "FILE" else word for word in words]


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_model_that_cannot_be_loaded(words, file, capsys):
    assert main(given(words, file)) == BAD_INPUT == 2
    assert "no/such/model cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_without_transformers(words, file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(given(words, file)) == 2
    assert "token-sparse-attention[transformers]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "calibrate", "capture"])
def test_texts_that_cannot_be_used(name, file, capsys):
    words = given(COMMANDS[name], file)
    option = words[words.index(file) - 1]
    assert main(given(COMMANDS[name], "absent.txt")) == 2
    assert f"{option} absent.txt cannot be read: " in capsys.readouterr().err
    with open(file, "w", encoding="utf-8") as empty:
        empty.write(" \n")
    assert main(words) == 2
    assert f"{option} {file} must hold text, but is empty" in capsys.readouterr().err


def test_text_comes_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A word.")))
    assert read_text("--prompt-file", "-") == "A word."


def test_only_what_loading_raises_is_bad_input():
    with pytest.raises(UsageError, match="it cannot be loaded: gone"), loading("it"):
        raise OSError("gone")
    with pytest.raises(ZeroDivisionError), loading("it"):
        raise ZeroDivisionError


def test_the_bundled_model_stands_in():
    assert ModelOptions().path == str(bundled.MODEL)
    assert ModelOptions(name="mine").path == "mine"


def test_a_folder_that_may_not_be_read_is_bad_input(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UsageError, match=r"cannot be loaded: .*Permission denied"):
        ModelOptions(name=str(tmp_path)).check()


@pytest.mark.parametrize("command", ["run", "capture"])
def test_a_prompt_of_one_token(tmp_path, command, capsys):
    save_model(tmp_path / "model")
    (tmp_path / "text").write_text("a")
    words = [command, tmp_path / "model", "--prompt-file", tmp_path / "text"]
    words += ["--max-new-tokens", 2]
    if command == "run":
        assert run(*words, "--json") == 0
        note = json.loads(capsys.readouterr().out)["note"]
        assert note == "'sparse' ran dense in every layer (the prompt has one token)"
    else:
        with pytest.raises(UsageError, match="a prompt of one token has no prefill"):
            run(*words, "--out", tmp_path / "kept.json")


@pytest.mark.parametrize("command", ["run", "capture", "calibrate"])
def test_empty_settings_are_no_settings_left_out(tmp_path, command):
    save_model(tmp_path / "model")
    (tmp_path / "text").write_text("a text")
    words = {
        "run": ["--prompt-file", tmp_path / "text"],
        "capture": ["--prompt-file", tmp_path / "text", "--out", tmp_path / "kept.json"],
        "calibrate": ["--method", "drift", "--text", tmp_path / "text"],
    }[command]
    with pytest.raises(UsageError, match="--config  cannot be used: there is no file ''"):
        run(command, tmp_path / "model", *words, "--config", "")
