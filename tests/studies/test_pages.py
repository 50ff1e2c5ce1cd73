"""Every page is what the committed result files give."""

from __future__ import annotations

import pytest
from benchmarks import pages, summary
from benchmarks.markdown import Page

PAGES = {page.path.relative_to(summary.ROOT).as_posix(): page for page in pages.every_page()}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_it_is_up_to_date(page):
    for path, text in page.files().items():
        assert path.read_text(encoding="utf-8") == text, "run python -m benchmarks.pages"


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_table_and_figure_has_its_place_and_no_file_is_left(page):
    assert sorted(page.markers()) == sorted(page.tables)
    text = page.path.read_text(encoding="utf-8")
    for name in page.figures:
        assert f"(figures/{name}.svg)" in text
    folder = page.path.parent / "figures"
    of_folder = [one for one in PAGES.values() if one.path.parent == page.path.parent]
    drawn = {f"{name}.svg" for one in of_folder for name in one.figures}
    assert {path.name for path in folder.glob("*")} == drawn


def test_stale_pages_are_named_and_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin one -->\n<!-- end one -->\n")
    monkeypatch.setattr(pages, "every_page", lambda: [Page(page, {"one": "| 1 |\n"})])
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().out == f"{page}\n"
    assert "| 1 |" not in page.read_text()
    assert pages.main([]) == 0
    assert "| 1 |" in page.read_text()
    capsys.readouterr()
    assert pages.main(["--check"]) == 0
    assert not capsys.readouterr().out
