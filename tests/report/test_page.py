"""The page as text: what it shows, that nothing in it is loaded, and that texts stay texts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import sys

import pytest

from evaluation.results import SPARSE
from report.pages import (
    HOSTILE,
    KEPT,
    TOKENS,
    Page,
    all_inputs,
    evaluation,
    inputs_of,
    texts,
)
from report.test_charts import intervals_of, markers_of
from studies.synthetic import op_result
from token_sparse_attention import KVSamplingConfig
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.summary import summarise
from token_sparse_attention.report.accuracy import accuracy, mean_shares
from token_sparse_attention.report.load import Inputs
from token_sparse_attention.report.page import build_page


@pytest.fixture(scope="module")
def html():
    return build_page(all_inputs(), title=f"About {HOSTILE}")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)  # which checks that every element is closed


def table(page: Page, caption: str) -> list[list[str]]:
    """The cells of a table, row by row."""
    (_, text), *_ = [found for found in page.find("table") if found[1].startswith(caption)]
    start = next(
        i
        for i, (name, _, inside) in enumerate(page.elements)
        if name == "table" and "".join(inside) == text
    )
    rows: list[list[str]] = []
    for name, _, inside in page.elements[start + 1 :]:
        if name == "table":
            break
        if name == "tr":
            rows.append([])
        elif name in ("th", "td"):
            rows[-1].append("".join(inside))
    return rows


def test_nothing_is_loaded_and_only_its_own_script_may_run(html, page):
    for name, attributes, _ in page.elements:
        assert not {"src", "srcset", "action", "data"} & set(attributes), name
        assert name not in {"img", "link", "iframe", "object", "embed", "base", "image"}
        assert attributes.get("href", "#").startswith("#")
        assert "url" not in attributes.get("style", "")
        assert attributes.get("clip-path", "url(#").startswith("url(#")
        assert not [key for key in attributes if key.startswith("on")]
    style = "".join(texts(page, "style"))
    assert "url(" not in style
    assert "@import" not in style
    assert not re.findall(r"https?://", html)
    code = [text for attributes, text in page.find("script") if "type" not in attributes]
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert len(code) == 1
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_texts_come_out_as_they_went_in(page):
    data = json.loads(page.find("script", id="kept-0")[0][1])
    assert tuple(data["tokens"]) == TOKENS
    assert texts(page, "title")[0] == f"About {HOSTILE}"
    assert texts(page, "dd")[:3] == [HOSTILE, "default", HOSTILE]
    assert HOSTILE in {row[1] for row in table(page, "All tasks together")}
    assert "Times: <i>op</i>" in texts(page, "h2")


@pytest.mark.parametrize(
    "text", [HOSTILE, "{{ 7 * 7 }}{% raw %}", "$\\frac{$ _x", "\x00\ud800\n配置"]
)
def test_no_text_changes_what_the_page_is_made_of(text):
    """Texts of every kind stand where harmless ones do, and are no elements or attributes."""
    page, harmless = (Page(build_page(inputs_of(of), title=of)) for of in (text, "harmless"))
    for (name, attributes, _), (wanted, others, _) in zip(
        page.elements, harmless.elements, strict=True
    ):
        assert name == wanted
        assert attributes.keys() == others.keys()
    assert texts(page, "h1") == [text]
    assert texts(page, "a") == [link.replace("harmless", text) for link in texts(harmless, "a")]
    assert table(page, "Layers that ran dense")[1] == ["0", text]
    assert set(table(page, "Sources")[1][3:]) == {text[:12], f"{text} {text}"}


def test_what_a_page_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install 'token-sparse-attention\[report\]'"):
        build_page(all_inputs())


def test_the_same_inputs_give_the_same_page(html):
    assert build_page(all_inputs(), title=f"About {HOSTILE}") == html


def test_every_section_is_linked_and_every_chart_described(page):
    targets = {attributes["href"] for attributes, _ in page.find("a")}
    assert targets == {f"#{attributes['id']}" for attributes, _ in page.find("h2")}
    charts = page.find("svg")
    assert len(charts) == 4 + 2 + 1  # scatters, heat maps, the capture's
    for (attributes, _), description in zip(charts, texts(page, "desc"), strict=True):
        assert attributes["role"] == "img"
        assert attributes["aria-label"].endswith(f". {description}")
        assert len(attributes["aria-label"]) > 20
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_accuracy_table_holds_the_summary(page):
    header, *rows = table(page, "All tasks together")
    wanted = [r for r in summarise(evaluation()) if r.task is None and r.length is not None]
    assert len(rows) == len(wanted) == 4
    for cells, row in zip(rows, wanted):
        shown = dict(zip(header, cells))
        assert shown["configuration"] == row.configuration
        assert float(shown["score"]) == pytest.approx(row.score, abs=6e-4)
        assert float(shown["work"]) == pytest.approx(row.work, abs=6e-4)
        if row.difference is not None:
            low, high = map(float, shown["95% interval"].split(" to "))
            assert low == pytest.approx(row.difference_low, abs=6e-4)
            assert high == pytest.approx(row.difference_high, abs=6e-4)


def test_charts_plot_the_summary_with_intervals_from_the_dense_accuracy():
    charts = accuracy(evaluation())["charts"]
    rows = [r for r in summarise(evaluation()) if r.task is None and r.length is not None]
    # For each length its cost in work and in seconds; dense stands first.
    for number, chart in enumerate(charts):
        length, cost = (100, 2048)[number // 2], ("work", "seconds")[number % 2]
        chosen = [row for row in rows if row.length == length]
        assert markers_of(chart) == [(getattr(row, cost), row.score) for row in chosen]
    row = next(row for row in rows if row.length == 2048 and row.difference is not None)
    ((low, high),) = intervals_of(charts[2])
    assert row.score == 0.5
    assert low == (row.work, 1 + row.difference_low)
    assert high == (row.work, min(1 + row.difference_high, 1))


def test_mean_shares_take_dense_prompts_and_shared_budgets_for_all_heads():
    first = dataclasses.replace(SPARSE, kept=[[10, 20, 30, 40], None])
    second = dataclasses.replace(SPARSE, kept=[20, None], prompt_tokens=200)
    third = dataclasses.replace(SPARSE, kept=[None, None])
    assert mean_shares([first, second, third]) == [
        pytest.approx([(0.1 * n + 0.1 + 1) / 3 for n in (1, 2, 3, 4)]),
        None,
    ]
    assert mean_shares([second, third]) == [pytest.approx([0.55]), None]


def test_sources_tell_commits_and_whether_the_code_was_changed(page):
    changed = {**KEPT.provenance, "commit": "0123456789abcdef-dirty"}
    capture = dataclasses.replace(KEPT, provenance=changed)
    rows = table(Page(build_page(Inputs((), (("kept", capture),), ()))), "Sources")
    assert rows[1] == [
        "kept",
        f"kept text of {HOSTILE}",
        "a device",
        "0123456789ab-dirty",
        "torch 2",
    ]
    assert table(page, "Sources")[3][3] == "0123456789ab"


def test_unscored_results_say_so():
    results = evaluation()
    samples = tuple(dataclasses.replace(s, score=None) for s in results.samples)
    inputs = Inputs((("e", dataclasses.replace(results, samples=samples)),), (), ())
    page = Page(build_page(inputs))
    assert "2K tokens: nothing has a score yet." in texts(page, "p")
    assert not page.find("svg", role="img")[2:]  # the heat maps


def test_times_are_a_table_beside_dense_attentions(page):
    header, *rows = table(page, "Milliseconds")
    shown = {row[1]: dict(zip(header, row)) for row in rows if row[3] == "graph"}
    assert len(rows) == len(op_result().records)
    assert (shown["ours/whole"]["tokens"], shown["ours/whole"]["setting"]) == ("128K", "50% kept")
    assert (shown["dense/fa4"]["ms"], shown["ours/whole"]["ms"]) == ("217", "56")
    assert shown["ours/whole"]["dense / this"] == "3.88x"
    shape = "Batch 1, 32 heads, 8 KV heads, head size 128, bfloat16."
    assert texts(page, "p").count(shape) == 1


def test_a_failed_check_shows_no_time():
    result = op_result()
    records = tuple(
        dataclasses.replace(r, passed=False) if r.name == "ours/whole" and r.passed else r
        for r in result.records
    )
    run = Run("op", dataclasses.replace(result, records=records))
    page = Page(build_page(Inputs((), (), (run,))))
    whole = [row for row in table(page, "Milliseconds") if row[1] == "ours/whole"]
    assert [row[4:6] for row in whole if row[3] == "graph"] == [["check failed", "-"]]


def test_kept_shares_without_selected_queries_are_called_what_they_are():
    results = evaluation()
    names = [name for name in results.header.configurations if name != "dense"]
    every = KVSamplingConfig().to_dict()
    header = dataclasses.replace(
        results.header, configurations={"dense": None, **dict.fromkeys(names, every)}
    )
    before, after = (
        Page(build_page(Inputs((("e", of),), (), ())))
        for of in (results, dataclasses.replace(results, header=header))
    )
    for page, count in ((before, 0), (after, 1)):
        captions = [text for text in texts(page, "figcaption") if "samples" in text]
        assert captions
        beyond = "; keys beyond the sliding window)"
        assert {text.endswith(beyond) for text in captions} == {count == 1}
        assert sum("In layers that drop no query" in p for p in texts(page, "p")) == count


def test_without_captures_there_is_no_script():
    page = Page(build_page(Inputs((("e", evaluation()),), (), ())))
    assert not page.find("script")


def test_capture_lists_kept_shares_and_reasons(page):
    rows = table(page, "this prompt")
    assert rows[1:] == [
        ["0", "dense", "dense", "dense"],
        ["1", "40.0%", "40.0%", "40.0%"],
        ["2", "55.0%", "10.0%", "100.0%"],
    ]
    captions = texts(page, "figcaption")
    assert "this prompt (10 tokens; layers 2: keys beyond the sliding window)" in captions
    assert sum("In layers that drop no query" in text for text in texts(page, "p")) == 1
    assert table(page, "Layers that ran dense")[1:] == [["0", "too short & dense"]]
    assert KEPT.layers[2].kept() == [1, 10]
