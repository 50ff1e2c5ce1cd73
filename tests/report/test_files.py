"""Which files are read as what, and which are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.pages import HEADS, KEPT, bitmap, evaluation
from studies.synthetic import op_result
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import save_results
from token_sparse_attention.records import encode
from token_sparse_attention.report.kept_text import KeptLayer, KeptText
from token_sparse_attention.report.load import load


@pytest.fixture
def folder(tmp_path):
    save_results(tmp_path / "eval.jsonl", evaluation())
    (tmp_path / "kept.json").write_text(KEPT.to_json(), encoding="utf-8")
    op_result().save(tmp_path / "op.json")
    return tmp_path


def test_kinds_are_told_by_content(folder):
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".txt"))
    inputs = load(sorted(folder.iterdir()))
    assert inputs.evaluations == (("eval", evaluation()),)
    assert inputs.captures == (("kept", KEPT),)
    assert [run.name for run in inputs.runs] == ["op"]
    assert inputs.runs[0].result.records == op_result().records


def test_unfinished_evaluations_are_read(folder):
    path = folder / "eval.jsonl"
    path.write_text(encode(evaluation().header) + "\n", encoding="utf-8")
    assert load([path]).evaluations[0][1].samples == ()
    save_results(path, evaluation())
    path.write_bytes(path.read_bytes()[:-20])
    assert load([path]).evaluations[0][1].samples == evaluation().samples[:-1]


def test_files_of_one_name_go_by_their_paths(folder):
    (folder / "other").mkdir()
    other = folder / "other" / "op.json"
    op_result().save(other)
    runs = load([folder / "op.json", other]).runs
    assert [run.name for run in runs] == [str(folder / "op.json"), str(other)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a result of tsa eval, tsa capture or tsa bench"),
        ("[1, 2]", "must be a result of"),
        ('{"drop_mass": 0.1}', "must be a result of"),
        ("\x00\xff", "must be a result of"),
        ("[" * 100_000, "must be a result of"),
        ('{"records": []}', "must have version 1, got None"),
        ('{"configurations": {}}', "must begin with the header"),
        ('{"configurations": {}}\n{}', "line 1 must have version 1"),
        ('{"tokens": []}', "must have version 1"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        load([path])
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.json cannot be read"):
        load([tmp_path / "absent.json"])


def test_captures_survive_the_file():
    assert KeptText.from_dict(json.loads(KEPT.to_json()), "file") == KEPT


def test_captures_without_far_tokens_are_read_too():
    content = json.loads(KEPT.to_json())
    for layer in content["layers"]:
        del layer["beyond_window"]
    assert not any(layer.beyond_window for layer in KeptText.from_dict(content, "file").layers)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_kept_tokens_are_counted(kept):
    mask = bitmap({i for i, is_kept in enumerate(kept) if is_kept}, len(kept))
    assert KeptLayer((mask,), None).kept() == [sum(kept)]


def change(**entries):
    return {**json.loads(KEPT.to_json()), **entries}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(version=2), "must have version 1, got 2"),
        (change(tokens=[]), "tokens must be array of length >= 1"),
        (change(tokens=[1]), r"tokens\[0\] must be str, got 1"),
        (change(tokens="text"), "tokens must be array"),
        (change(extra=1), "unknown entry 'extra'"),
        (change(layers=[3]), r"layers\[0\] must be object, got 3"),
        (change(layers=[{"masks": [], "dense_reason": None}]), "either masks or a dense_reason"),
        (change(layers=[{"masks": ["!"], "dense_reason": None}]), r"masks\[0\] is not base64"),
        (change(layers=[{"masks": [7], "dense_reason": None}]), r"masks\[0\] must be str, got 7"),
        (change(layers=[{"masks": [bitmap({1}, 17)], "dense_reason": None}]), "each of 10 tokens"),
        (change(layers=[{"masks": [bitmap({12}, 16)], "dense_reason": None}]), "of 10 tokens"),
    ],
)
def test_broken_captures_are_refused(content, message):
    with pytest.raises(UsageError, match=message):
        KeptText.from_dict(content, "file")


def test_bitmaps_count_from_the_lowest_bit():
    assert bitmap(HEADS[0]) == "BwI="  # bytes 7 and 2: tokens 0, 1, 2 and 8 + 1
