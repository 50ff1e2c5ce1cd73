"""`tsa fidelity` from end to end, on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from evaluation.small import save_model
from token_sparse_attention import bundled
from token_sparse_attention.cli import main
from token_sparse_attention.fidelity import measure
from token_sparse_attention.fidelity.record import load_results
from token_sparse_attention.fidelity.summary import Row
from token_sparse_attention.records import read_text

SMALL = (
    'small={"block_size": 16, "num_probes": 8, "sliding_window": 16, "num_samples": 16, '
    '"dense_queries": 4}'
)
WIDE = 'wide={"sliding_window": 4096}'
SHORT = ("--lengths", "256", "--shapes", "continue,second-turn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text(read_text(bundled.SAMPLE[0])[:9000])
    return str(path)


def tsa(*words: object) -> int:
    return main(["fidelity", *map(str, words)])


def test_json_has_a_row_for_each_shape_and_configuration(model, text, tmp_path, capsys):
    out, plot = tmp_path / "r.jsonl", tmp_path / "plot.svg"
    words = (model, "--text", text, *SHORT, "--config", SMALL, "--config", WIDE, "--json")
    assert tsa(*words, "--out", out, "--plot", plot) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"provenance", "arguments", "rows"}
    assert shown["arguments"]["shapes"] == ["continue", "second-turn"]
    assert [(row["shape"], row["configuration"]) for row in shown["rows"]] == [
        (shape, name) for shape in (None, "continue", "second-turn") for name in ("small", "wide")
    ]
    for row in shown["rows"]:
        assert set(row) == {field.name for field in fields(Row)}
    small, wide = shown["rows"][:2]
    assert small["divergence"] > 1e-7
    assert small["divergence_interval"][0] <= small["divergence"] <= small["worst"]
    assert small["ratio"] == 1
    assert wide["divergence"] == pytest.approx(0, abs=1e-9)
    assert (wide["work"], wide["agreement"]) == (1, 1)
    assert small["work"] < 0.5
    results = load_results(out)
    assert len(results.answers) == 2 * 2 * 3, "pieces, shapes, configurations"
    assert results.header.texts.keys() == {text}
    assert "small" in plot.read_text()


def test_tables_are_plain_text_and_say_what_ran_dense(model, text, capsys):
    assert tsa(model, "--text", text, *SHORT, "--config", WIDE, "--pieces", 1) == 0
    shown = capsys.readouterr().out
    assert "256 tokens, second-turn: another one, asked on the cache after that" in shown
    assert "note: 'wide' left nothing out of prompts of 256 tokens" in shown
    assert max(map(len, shown.splitlines())) <= 210


def test_a_run_goes_on_where_it_was_cut_off(model, text, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    words = (model, "--text", text, *SHORT, "--config", SMALL, "--out")
    assert tsa(*words, whole) == 0
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:5]) + lines[5][:40])
    ran = []
    prefill = measure._prefill
    monkeypatch.setattr(
        measure, "_prefill", lambda *given: (ran.append(given[2]), prefill(*given))[1]
    )
    assert tsa(*words, cut) == 0
    assert ran == ["dense", "small"] * 2, "the first piece's two prompts were done"
    mended, expected = load_results(cut).answers, load_results(whole).answers
    assert [(a.key, a.divergence) for a in mended] == [(a.key, a.divergence) for a in expected]
    ran.clear()
    assert tsa(*words, cut) == 0
    assert ran == []
    capsys.readouterr()
    assert tsa(*words, cut, "--seed", 1) == 2
    assert "holds another run of tsa fidelity: its arguments.seed is 0" in capsys.readouterr().err


BAD = {
    "absent text": (("--text", "absent.txt"), "--text absent.txt cannot be read"),
    "short text": (("--lengths", "99999"), "--text must hold at least"),
    "short prompt": (("--lengths", "64"), "must be at least 256, got 64"),
    "shape": (("--shapes", "continu"), "--shapes must be one of continue, recall"),
    "settings": (("--config", "defualt"), "did you mean 'default'?"),
    "only dense": (("--config", "dense"), "--config must name a sparse configuration"),
    "plot": (("--plot", "plot.pdf"), "--plot must end in .svg or .png"),
    "out": (("--out", "r.jsonl.gz"), "--out must not end in .gz"),
    "one file": (("--out", "r.svg", "--plot", "r.svg"), "--plot r.svg must be another file: this"),
    "no place for a plot": (("--plot", "/dev/null/plot.svg"), "--plot /dev/null/plot.svg cannot"),
    "no lengths": (("--lengths", ","), "--lengths: must hold at least one value, got ','"),
    "pieces": (("--lengths", "256", "--pieces", "99999"), "--pieces must be at most "),
    "settings twice": (("--config", 'a={"sink_size": 1, "sink_size": 2}'), "'sink_size' is there"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_2_in_one_line(name, model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, message = BAD[name]
    given = () if "--text" in words else ("--text", text)
    try:
        code = tsa(model, *given, *words)
    except SystemExit as stop:
        code = stop.code
    said = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert code == 2
    assert len(said) == 1, said
    assert message in said[0]


def test_lengths_and_shapes_count_once(model, text, tmp_path):
    words = ("--lengths", "256,256", "--shapes", "continue,continue", "--pieces", 1)
    for _ in range(2):  # the file can be gone on with
        assert tsa(model, "--text", text, *words, "--out", tmp_path / "r.jsonl") == 0
    assert len(load_results(tmp_path / "r.jsonl").answers) == 2


def test_prompts_longer_than_the_model_was_made_for_are_told_once(model, text, capsys):
    words = ("--lengths", "2048", "--shapes", "continue", "--pieces", 3)
    assert tsa(model, "--text", text, "--text", bundled.SAMPLE[1], *words) == 0
    said = capsys.readouterr().err.splitlines()
    warning = "tsa: warning: 2048 prompt tokens and 256 new ones exceed the 2048 positions"
    assert sum(line.startswith(warning) for line in said) == 1


@pytest.mark.parametrize("broken", ["dense", "sparse"])
def test_what_is_no_number_is_a_failed_job(broken, model, text, tmp_path, monkeypatch, capsys):
    def predict(model, read, follow):
        found = predictions(model, read, follow)
        return found * float("nan") if (read.kept is None) == (broken == "dense") else found

    predictions = measure.predictions
    monkeypatch.setattr(measure, "predictions", predict)
    out = tmp_path / "r.jsonl"
    assert tsa(model, "--text", text, *SHORT, "--config", SMALL, "--out", out) == 1
    name = "dense" if broken == "dense" else "small"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"tsa: '{name}' on 256 tokens, continue 1: the ")
    assert len(load_results(out).answers) == (0 if broken == "dense" else 1)


def test_it_needs_neither_rich_nor_lm_eval_nor_matplotlib(model, text):
    absent = ("rich", "lm_eval", "matplotlib", "jinja2", "accelerate", "datasets")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "from token_sparse_attention.cli import main\n"
        f"sys.exit(main({['fidelity', model, '--text', text, *SHORT, '--pieces', '1']}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "256 tokens, all shapes" in done.stdout


def test_the_sample_is_small_and_its_licence_is_there():
    folder = bundled.SAMPLE[0].parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (folder / "LICENSE.txt").read_text()
