"""The result file: what is written comes back, a cut-off run goes on, the rest is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest

from evaluation.results import DENSE, HEADER, SPARSE, results
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.record import (
    load_results,
    open_results,
    save_results,
)
from token_sparse_attention.records import encode

BOTH = results(DENSE, dataclasses.replace(SPARSE, kept=[50, [1, 2, 3, 100]]))


def to_line(entry) -> str:
    return encode(entry) + "\n"


def write(path, *samples, header=HEADER):
    path.write_text("".join(map(to_line, (header, *samples))))
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "r.jsonl"
    save_results(path, BOTH)
    assert load_results(path) == BOTH
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_cut_off_line_is_left_out_and_written_again(tmp_path, cut):
    path = write(tmp_path / "r.jsonl", DENSE)
    with path.open("a") as file:
        file.write(to_line(dataclasses.replace(SPARSE, reply="a longer reply"))[:cut])
    assert load_results(path).samples == (DENSE,)
    found, file = open_results(path, HEADER)
    assert found == [DENSE]
    with file:
        file.write(SPARSE)
    assert load_results(path) == results(DENSE, SPARSE)
    assert path.read_text() == "".join(map(to_line, (HEADER, DENSE, SPARSE)))


@pytest.mark.parametrize("begun", [None, "", '{"version": 1, "prov'])
def test_a_run_begins_with_its_header(tmp_path, begun):
    path = tmp_path / "new" / "r.jsonl"
    if begun is not None:
        path.parent.mkdir()
        path.write_text(begun)
    found, file = open_results(path, HEADER)
    file.close()
    assert found == []
    assert load_results(path) == results()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arguments": {"model": "bundled", "seed": 1}}, "arguments.seed is 0.*would be 1"),
        ({"arguments": {"model": "bundled", "seed": 0, "new": 1}}, "arguments.new is None"),
        ({"provenance": HEADER.provenance | {"commit": "x"}}, "provenance.commit is 'abc'"),
        ({"configurations": {"dense": None}}, "configurations.sparse"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path, changes, named):
    path = write(tmp_path / "r.jsonl", DENSE)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=named):
        open_results(path, dataclasses.replace(HEADER, **changes))
    assert path.read_bytes() == before


def changed(line: str, **entries) -> str:
    content = json.loads(line) | entries
    return json.dumps({name: value for name, value in content.items() if value != "drop"}) + "\n"


def test_a_layer_may_see_no_token_besides_its_window(tmp_path):
    sample = dataclasses.replace(SPARSE, kept=[0, [0, 1, 2, 3]])
    assert load_results(write(tmp_path / "r.jsonl", sample)).samples == (sample,)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"score": 1.5}, "score must be float <= 1.0, got 1.5"),
        ({"score": "1"}, "score must be float or null, got '1'"),
        ({"length": True}, "length must be int, got True"),
        ({"index": -1}, "index must be int >= 0, got -1"),
        ({"kept": [50]}, "kept must have 2 entries"),
        ({"kept": [50, [1, 2, 3]]}, r"kept\[1\].*4 of them"),
        ({"kept": [101, None]}, r"kept\[0\].*0 to 100"),
        ({"kept": [-1, None]}, r"kept\[0\].*0 to 100"),
        ({"task": "other"}, "task 'other' is not in the header"),
        ({"configuration": "other"}, "configuration 'other' is not in the header"),
        ({"seconds": float("nan")}, "NaN is no JSON number"),
        ({"extra": 1}, "has an unknown entry 'extra'"),
        ({"reply": "drop"}, "has no entry 'reply'"),
    ],
)
def test_wrong_samples_are_named(tmp_path, entries, message):
    path = write(tmp_path / "r.jsonl", DENSE)
    with path.open("a") as file:
        file.write(changed(to_line(SPARSE), **entries))
    with pytest.raises(UsageError, match=f"r.jsonl, line 3.*{message}"):
        load_results(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 2}, "must have version 1, got 2"),
        ({"model": {"num_layers": 2}}, "model has no entry 'num_heads'"),
        ({"configurations": {}}, "configurations must have 'dense'"),
        ({"configurations": {"dense": None, "a": 3}}, "'a'.* must be an object"),
    ],
)
def test_wrong_headers_are_named(tmp_path, entries, message):
    path = tmp_path / "r.jsonl"
    path.write_text(changed(to_line(HEADER), **entries))
    with pytest.raises(UsageError, match=message):
        load_results(path)


def test_a_finished_file_may_be_compressed(tmp_path):
    path = write(tmp_path / "r.jsonl", DENSE, SPARSE)
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_results(packed) == load_results(path)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UsageError, match="cannot be read"):
        load_results(packed)
    packed.write_bytes(b"no gzip")
    with pytest.raises(UsageError, match="cannot be read"):
        load_results(packed)
    with pytest.raises(UsageError, match=r"--out must not end in \.gz"):
        open_results(packed, HEADER)


def test_what_is_no_result_file_is_refused(tmp_path):
    path = write(tmp_path / "r.jsonl", DENSE, DENSE)
    with pytest.raises(UsageError, match="line 3 repeats"):
        load_results(path)
    path.write_text("[]\n")
    with pytest.raises(UsageError, match="JSON object"):
        load_results(path)
    path.write_text("")
    with pytest.raises(UsageError, match="empty"):
        load_results(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_results(tmp_path / "absent")
