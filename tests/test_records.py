"""Files of any format: what is written is read back, and nothing harmful is."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention import records
from token_sparse_attention.errors import UsageError, did_you_mean
from token_sparse_attention.records import (
    Count,
    JsonFile,
    check_choice,
    check_keys,
    convert,
    encode,
    parse,
    parse_object,
    read_lines,
    read_text,
    save,
    save_lines,
)


@dataclass(frozen=True)
class Row:
    name: str
    tokens: Count
    share: float | None = None
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("name", self.name, ("a", "b"))


@dataclass(frozen=True)
class Table(JsonFile):
    VERSIONS: ClassVar = (2, 3)
    OPTIONAL: ClassVar = ("best",)
    ROWS: ClassVar = ("rows",)

    about: Mapping[str, Any]
    rows: tuple[Row, ...]
    best: Row | None = None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip
ROWS = st.builds(
    Row,
    name=st.sampled_from("ab"),
    tokens=st.integers(0, 2**40),
    share=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    places=st.lists(st.integers()).map(tuple),
)
TABLES = st.builds(
    Table,
    about=st.dictionaries(st.text(), JSON),
    rows=st.lists(ROWS).map(tuple),
    best=st.none() | ROWS,
)
TABLE = Table({"device": "a device"}, (Row("a", 1), Row("b", 2, 0.5, (3, 4))))


@given(TABLES)
def test_tables_survive_their_text(table):
    text = table.to_json()
    assert Table.from_json(text) == table
    assert Table.from_json(text).to_json() == text
    assert json.loads(text)["version"] == 3


@given(JSON)
def test_any_json_survives(value):
    assert parse("it", encode(value)) == value


@given(st.lists(JSON), st.booleans())
def test_lines_survive(tmp_path_factory, values, pack):
    path = tmp_path_factory.mktemp("lines") / "lines"
    save_lines(path, map(encode, values), pack=pack)
    assert [parse(*line) for line in read_lines(path, unfinished=True)] == values


@given(st.text() | st.text('[]{}":,0123456789eE.-+ntfaIN'))
def test_whatever_is_read_is_json_or_bad_input(text):
    error = ""
    try:
        value = parse("it", text)
    except UsageError as raised:
        error = str(raised)
    if error:
        assert error.startswith("it is ")
        assert "\n" not in error
    else:
        assert value == json.loads(text)
        json.dumps(value, allow_nan=False)


@given(JSON)
def test_whatever_fits_no_table_is_bad_input(content):
    for value in (content, [content], {"about": content}, {"version": 2, "rows": content}):
        with pytest.raises(UsageError) as caught:
            Table.from_json(encode(value), "it")
        assert str(caught.value).startswith("it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ("1" * 5000, "it is not valid JSON: .*5000 digits"),
        ("1e999", "it is not valid JSON: the number 1e999 is too large"),
        ("[-1e999]", "the number -1e999 is too large"),
        ("NaN", "it is not valid JSON: NaN is no JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON number"),
        ("", "it is not valid JSON"),
        ('{"a": 1,\n "b" 2}', r"not valid JSON: .*line 2 column 6"),
        ("{'a': 1}", "not valid JSON"),
        ("1 2", "Extra data"),
    ],
)
def test_hostile_text_is_refused(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse("it", text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=1), "it must have version 3, got 1$"),
        (lambda c: c.update(version=True), "it must have version 3, got True"),
        (lambda c: c.update(version=[3]), r"it must have version 3, got \[3\]"),
        (lambda c: c.pop("version"), "it must have version 3, got None"),
        (lambda c: c.pop("about"), "it has no entry 'about'$"),
        (lambda c: c.update(abuot=c.pop("about")), "no entry 'about'; did you mean 'abuot'"),
        (lambda c: c.update(row=1), "it has an unknown entry 'row'; did you mean 'rows'"),
        (lambda c: c.update(x=1), "it has an unknown entry 'x'; expected about, rows, best"),
        (lambda c: c.update(about=[1]), r"it: about must be object, got \[1\]"),
        (lambda c: c.update(rows={"a": 1}), "it: rows must be array, got {'a': 1}"),
        (lambda c: c["rows"].append(3), r"it: rows\[2\] must be object, got 3"),
        (lambda c: c["rows"][1].pop("tokens"), r"it: rows\[1\] has no entry 'tokens'"),
        (
            lambda c: c["rows"][1].update(token=c["rows"][1].pop("tokens")),
            r"it: rows\[1\] has an unknown entry 'token'; did you mean 'tokens'\?",
        ),
        (lambda c: c["rows"][1].update(tokens=1.5), r"rows\[1\].tokens must be int.*, got 1.5"),
        (lambda c: c["rows"][1].update(tokens=True), r"tokens must be int.*, got True"),
        (lambda c: c["rows"][1].update(tokens="1"), r"tokens must be int.*, got '1'"),
        (lambda c: c["rows"][1].update(tokens=-1), r"tokens must be int >= 0, got -1"),
        (lambda c: c["rows"][1].update(share="x"), "share must be float or null, got 'x'"),
        (lambda c: c["rows"][1].update(share=10**400), r"rows\[1\].share: Number out of range"),
        (lambda c: c["rows"][1].update(places=[1, None]), r"places\[1\] must be int, got None"),
        (lambda c: c["rows"][1].update(name="c"), r"rows\[1\]: name must be one of a, b; got 'c'"),
        (lambda c: c.update(best={"name": "a", "token": 1}), r"it: best has an unknown .*'token'"),
        (lambda c: c.update(best={}), r"it: best has no entry 'name'"),
    ],
)
def test_wrong_entries_are_named(change, message):
    content = json.loads(TABLE.to_json())
    change(content)
    with pytest.raises(UsageError, match=message) as caught:
        Table.from_json(json.dumps(content), "it")
    assert "\n" not in str(caught.value)


def test_values_in_messages_are_short():
    with pytest.raises(UsageError, match="rows must be array, got 'xxx") as caught:
        Table.from_dict({"version": 3, "about": {}, "rows": "x" * 10**6}, "it")
    assert len(str(caught.value)) < 150


def test_entries_of_mappings_are_checked_without_their_keys():
    with pytest.raises(UsageError, match=r"^it: \[\.\.\.\] must be int$"):
        convert({"a": 1, "b": "x"}, Mapping[str, int], "it")


def test_entries_that_older_versions_lack_may_be_absent():
    content = json.loads(TABLE.to_json())
    del content["best"]
    assert Table.from_dict({**content, "version": 2}) == TABLE


def test_objects_and_their_names():
    assert parse_object("config", '{"a": {"b": 1}}') == {"a": {"b": 1}}
    with pytest.raises(UsageError, match=r"config must be a JSON object, got \[1\]"):
        parse_object("config", "[1]")
    check_keys("config", {"num_samples": 1}, ("num_samples", "num_probes"))
    with pytest.raises(UsageError, match="config has an unknown entry 'num_sample'; did you mean"):
        check_keys("config", {"num_sample": 1}, ("num_samples", "num_probes"))
    assert did_you_mean("abacus", ("num_samples",)) == ""


def test_what_has_no_json_form_is_not_written():
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(ValueError, match="Out of range float"):
            encode(value)
    with pytest.raises(TypeError):
        encode(object())
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UsageError, match="nested too deeply"):
        encode(deep)


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes(b"\xef\xbb\xbf" + TABLE.to_json().encode())
    assert Table.load(path) == TABLE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00}\x00\n", "cannot be read: it is not UTF-8"),
        (b'{"a": "\xc3"}\n', "cannot be read: it is not UTF-8"),
        (gzip.compress(b"{}" * 20, mtime=0)[:-9], "cannot be read: Compressed file ended"),
        (gzip.compress(b"{}", mtime=0)[:-6] + b"\0" * 6, "cannot be read: CRC check failed"),
        (b"\x1f\x8bnothing of the kind", "cannot be read: Unknown compression"),
        (gzip.compress(bytes(70), mtime=0), "must have at most 64 bytes, but has more"),
        (bytes(70), "must have at most 64 bytes, but has more"),
    ],
)
def test_unreadable_content_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(records, "MAX_BYTES", 64)
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (read_text, lambda path: list(read_lines(path, unfinished=True))):
        with pytest.raises(UsageError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))


def test_files_that_cannot_be_opened_are_named(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError, match=f"^{path} cannot be read: "):
            Table.load(path)
    with pytest.raises(UsageError, match=r"^--prompts cannot be read: No such file"):
        read_text(tmp_path / "absent", "--prompts")


def test_long_files_of_short_lines_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_BYTES", 8)
    path = tmp_path / "lines.gz"
    save_lines(path, ["12345"] * 100, pack=True)
    assert [line for _, line in read_lines(path)] == ["12345\n"] * 100


def test_lines_have_names_and_a_last_one_may_be_cut_off(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"1\r\n2\n\xff")
    assert [(name, parse(name, line)) for name, line in read_lines(path, unfinished=True)] == [
        (f"{path}, line 1", 1),
        (f"{path}, line 2", 2),
    ]
    with pytest.raises(UsageError, match="it, line 3 cannot be read: it is not UTF-8"):
        list(read_lines(path, "it"))


def test_packed_lines_are_the_same_bytes_each_time(tmp_path):
    for name in ("first", "second"):
        save_lines(tmp_path / name, ["a", "b"], pack=True)
    first, second = ((tmp_path / name).read_bytes() for name in ("first", "second"))
    assert first == second
    assert gzip.decompress(first) == b"a\nb\n"


def test_saving_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    save(path, "before")

    def failing():
        yield "a line"
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        save_lines(path, failing())
    assert path.read_text() == "before"
    save(path, b"after")
    assert path.read_text() == "after"
    assert os.listdir(path.parent) == ["file"], "nothing else is left behind"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(_plain_file(tmp_path).stat().st_mode)


def _plain_file(folder):
    (folder / "plain").write_text("")
    return folder / "plain"


def test_links_stay_and_devices_are_not_replaced(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    save(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    save(pipe, "through it")
    assert reader.communicate()[0] == b"through it"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_unwritable_files_are_named(tmp_path):
    blocked = _plain_file(tmp_path) / "file"
    for path in (blocked, tmp_path):
        with pytest.raises(UsageError, match=f"^{path} cannot be written: "):
            save(path, "text")
    with pytest.raises(UsageError, match=r"^--out x cannot be written: "):
        TABLE.save(blocked, "--out x")


def test_halves_of_characters_do_not_stop_a_page(tmp_path):
    save(tmp_path / "page", "a \ud800 name")
    assert (tmp_path / "page").read_text() == "a ? name"
    assert parse("it", encode("a \ud800 name")) == "a \ud800 name"


def test_records_need_neither_torch_nor_transformers():
    code = """
import importlib.util, sys, types
for name in ("torch", "transformers", "numpy"):
    sys.modules[name] = None
package = types.ModuleType("token_sparse_attention")
package.__path__ = [sys.argv[1]]
sys.modules["token_sparse_attention"] = package
import token_sparse_attention.records
"""
    folder = os.path.dirname(records.__file__)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
