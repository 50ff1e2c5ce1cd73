"""Result files: what is written is read again, and nothing else is."""

from __future__ import annotations

import json

import pytest

from studies.synthetic import op_result, prefill_result
from token_sparse_attention.benchmark.record import ResultFile
from token_sparse_attention.errors import UsageError


@pytest.mark.parametrize("result", [op_result(), prefill_result()], ids=["op", "prefill"])
def test_files_keep_everything(result, tmp_path):
    path = tmp_path / "new" / "result.json"
    result.save(path)
    assert ResultFile.load(path) == result
    assert len(path.read_text().splitlines()) < len(result.records) + 30, "a record a line"


def test_a_run_without_records_is_a_file_too():
    empty = ResultFile({}, {}, ())
    assert ResultFile.from_json(empty.to_json()) == empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("records"), "has no entry 'records'"),
        (lambda content: content.update(version=2), "must have version 1, got 2"),
        (lambda content: content.update(records={}), "records must be array, got {}"),
        (lambda content: content.update(provenance=[]), r"provenance must be object, got \[\]"),
        (lambda content: content["records"].append(3), r"records\[20\] must be object, got 3"),
        (lambda content: content["records"][1].pop("kind"), r"records\[1\] has no entry 'kind'"),
        (lambda content: content["records"][1].update(speed=3), "unknown entry 'speed'"),
        (lambda content: content["records"][2].update(kind="felt"), "one of graph, events"),
        (
            lambda content: content["records"][2].update(suite="x"),
            "one of op, prefill, block, sampling; got 'x'",
        ),
        (lambda content: content["records"][2].update(seq_len=1.5), "seq_len must be int, got 1"),
        (lambda content: content["records"][2].update(seq_len=True), "must be int, got True"),
        (lambda content: content["records"][2].update(passed=1), "must be bool or null, got 1"),
        (
            lambda content: content["records"][2].update(median_ms="3"),
            "median_ms must be float or null",
        ),
        (
            lambda content: content["records"][2].update(median_ms=float("inf")),
            "Infinity is no JSON number",
        ),
    ],
)
def test_other_content_is_refused(change, message):
    content = json.loads(op_result().to_json())
    change(content)
    with pytest.raises(UsageError, match=message):
        ResultFile.from_json(json.dumps(content))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent.json cannot be read"):
        ResultFile.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match=r"broken.json is not valid JSON"):
        ResultFile.load(tmp_path / "broken.json")


def test_infinite_figures_are_not_written():
    from studies.synthetic import record

    with pytest.raises(ValueError, match="Out of range float"):
        ResultFile({}, {}, (record("x", ms=float("inf")),)).to_json()
