"""The page in a real browser: no error, the right text marked, and a phone's width is enough."""

from __future__ import annotations

import html
import json
import shutil
import subprocess

import pytest

from report.pages import HEADS, TOKENS, Page, all_inputs
from token_sparse_attention.report.page import build_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser found: none of {', '.join(BROWSERS)} is in PATH"
)
# The page in a frame as wide as a phone, and a script outside it that uses it like a reader:
# the page's own policy would not let another script run.
DRIVER = """<!doctype html>
<iframe style="width: 390px; height: 800px" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
onload = () => {{
  const inside = document.querySelector("iframe").contentDocument;
  const box = (name) => inside.querySelector(name);
  const found = [];
  for (const [layer, head] of {choices}) {{
    for (const [name, value] of [[".layer", layer], [".head", head]]) {{
      box(name).value = value;
      box(name).dispatchEvent(new Event("change"));
    }}
    const runs = [...box(".prompt").children].map((run) => [run.localName, run.textContent]);
    found.push({{ runs, status: box(".status").textContent, disabled: box(".head").disabled }});
  }}
  document.getElementById("found").textContent = JSON.stringify({{
    found,
    title: inside.title,
    bold: inside.querySelectorAll(".prompt b, .prompt img, .prompt script").length,
    width: inside.documentElement.scrollWidth,
  }});
}};
</script>
"""


def open_page(text: str, choices: list[tuple[int, int]], folder) -> tuple[dict, list[str]]:
    """What the driver found, and what the browser complained about."""
    path = folder / "driver.html"
    page = html.escape(text)
    path.write_text(DRIVER.format(page=page, choices=json.dumps(choices)), encoding="utf-8")
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--enable-logging=stderr", "--dump-dom"),
            *(f"--user-data-dir={folder / 'profile'}", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    written = Page(done.stdout).find("pre", id="found")[0][1]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(written or "{}"), complaints


def marked(found: dict) -> str:
    return "".join(text for name, text in found["runs"] if name == "mark")


def kept_text(kept: set[int]) -> str:
    return "".join(TOKENS[i] for i in sorted(kept))


def test_page_marks_what_was_kept_and_runs_no_text(tmp_path):
    choices = [(1, -1), (1, 0), (1, 1), (2, 0), (0, -1)]
    found, complaints = open_page(build_page(all_inputs()), choices, tmp_path)
    assert not complaints
    all_heads, first, second, last_only, dense = found["found"]
    assert marked(all_heads) == kept_text(HEADS[0] | HEADS[1])
    assert marked(first) == kept_text(HEADS[0])
    assert marked(second) == kept_text(HEADS[1])
    assert marked(last_only) == TOKENS[9]
    for state in found["found"]:
        assert "".join(text for _, text in state["runs"]) == "".join(TOKENS)
    assert all_heads["status"] == "6 of 10 tokens (60.0%) kept by at least one head."
    assert second["status"] == "4 of 10 tokens (40.0%) kept by head 1."
    words = "attended to beyond the sliding window by every query of head 0."
    assert last_only["status"] == f"1 of 10 tokens (10.0%) {words}"
    assert len(first["runs"]) == 3  # neighbours share an element
    assert dense["status"] == "This layer ran dense, over all tokens: too short & dense."
    assert [state["disabled"] for state in found["found"]] == [False] * 4 + [True]
    assert found["bold"] == 0
    assert found["title"] == "Token sparse attention: report"
    assert found["width"] <= 390


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"layers":[{', '"absent":[{'),
        ("<main>", "<main><script>document.title = 'another'</script>"),
        ("<main>", '<main><img src="https://example.invalid/x.png">'),
    ],
    ids=["error", "foreign script", "request"],
)
def test_browser_would_complain(tmp_path, old, new):
    """The check above sees errors, and the policy stops what gets into the page."""
    page = build_page(all_inputs()).replace(old, new, 1)
    found, complaints = open_page(page, [], tmp_path)
    assert complaints
    assert found["title"] == "Token sparse attention: report"
