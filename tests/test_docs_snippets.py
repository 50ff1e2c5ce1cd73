"""The snippets of README.md and docs/ run, and their commands exist.

Python blocks of a page run in order in one namespace, in an empty folder. A block whose first
line is `# Not run: REASON` is only compiled. Lines of shell blocks that call `tsa` must parse;
those of the quick start run.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from integrations.models import CONFIG, WORDS, make_model, make_tokenizer
from token_sparse_attention import bundled
from token_sparse_attention.cli import main
from token_sparse_attention.cli.commands import build_parser
from token_sparse_attention.profile import settings_from_json
from token_sparse_attention.settings import LEADING_PATTERN

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHELLS = ("", "bash", "console", "sh", "shell")
NOT_RUN = re.compile(r"# Not run: \w+")
# Sizes that run in seconds: what a page says, and what runs in its place.
CHARACTERS = 5000  # of the demo's document: enough tokens for the rule to act
SMALLER = {"calibration.md": ("length=32768, count=4", "length=90, count=1")}


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[2], textwrap.dedent(match[3]), text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `tsa` in a page's shell blocks."""
    for block in blocks(page):
        if block.language not in SHELLS:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith("tsa "):
                yield shlex.split(line, comments=True)[1:]


WITH_PYTHON = [page for page in PAGES if python_blocks(page)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = tmp_path / "document.txt"
    short.write_text(bundled.DEMO_DOCUMENT.read_text(encoding="utf-8")[:CHARACTERS])
    monkeypatch.setattr(bundled, "DEMO_DOCUMENT", short)
    names = {"__name__": __name__, **given(page, tmp_path)}
    for block in python_blocks(page):
        text = block.text.replace(*SMALLER.get(page.name, ("", "")))
        # Blank lines before, so that an error has the page's line number.
        code = compile("\n" * (block.line - 1) + text, page.name, "exec", dont_inherit=True)
        if not NOT_RUN.match(text):
            exec(code, names)
    if page.name == "patterns.md":
        check_streaming(names)
    if page.stem in ("README", "quick-start"):
        paths = [path for record in names["report"] for path in record.paths]
        assert "sparse" in paths, "the page shows what does not happen"


def given(page: Path, folder: Path) -> dict[str, object]:
    """Names and files that a page's reader has before its first block."""
    if page.name == "fidelity.md":
        words = ["--lengths", "256", "--pieces", "1", "--shapes", "continue"]
        assert main(["fidelity", *words, "--out", str(folder / "fidelity.jsonl")]) == 0
    if page.name != "calibration.md":
        return {}
    from token_sparse_attention.calibration.job import calibrate
    from token_sparse_attention.calibration.options import CalibrationOptions
    from token_sparse_attention.calibration.prompts import text_prompts

    known = {"model": make_model(), "tokenizer": make_tokenizer(), "config": CONFIG}
    known["text"] = " ".join(WORDS)
    prompts = text_prompts(known["tokenizer"], [known["text"]], length=90, count=1)
    options = CalibrationOptions(
        method="sensitivity", base=CONFIG, values=(0.1,), divergence_budget=1.0
    )
    measured = calibrate(known["model"], prompts, options)
    (folder / "profile.measured.json").write_text(measured.to_json())
    return known


def check_streaming(names: dict[str, object]) -> None:
    """The pattern that the page writes out is the one there is."""
    from token_sparse_attention.attention.patterns.streaming import StreamingConfig, streaming_mask

    query, key = torch.randn(1, 4, 700, 8), torch.randn(1, 2, 900, 8)
    theirs = names["streaming_mask"](query, key, names["StreamingConfig"](9, 200), 1.0)
    mine = streaming_mask(query, key, StreamingConfig(9, 200), 1.0)
    assert torch.equal(theirs.dense_view(), mine.dense_view())


def test_blocks_that_do_not_run_are_few():
    every = [block for page in PAGES for block in python_blocks(page)]
    skipped = [block for block in every if NOT_RUN.match(block.text)]
    assert len(skipped) * 3 <= len(every)


ASKED = [(page.stem, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    "words", [words for _, words in ASKED], ids=[f"{stem}: {' '.join(w)}" for stem, w in ASKED]
)
def test_commands_parse(words):
    """Commands, options and choices exist, and settings can be read."""
    config = vars(build_parser().parse_args(words)).get("config")
    for value in [config] if isinstance(config, str) else config or ():
        if "{" in value and not LEADING_PATTERN.match(value.partition("=")[2] or value):
            settings_from_json(value[value.index("{") :])


def test_the_quick_start_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    needle = bundled.demo_needles()[0]
    (tmp_path / "contract.txt").write_text(f"The grass is green.\n{needle.line}\n" * 20)
    ran = [words for words in commands(ROOT / "docs" / "quick-start.md") if words != ["demo"]]
    assert [words[0] for words in ran] == ["info", "run", "capture", "report"]
    for words in ran:
        assert main(words) == 0, words
    assert "auto picks" in capsys.readouterr().out.replace("\n", " ")
    assert "<html" in (tmp_path / "report.html").read_text()


def test_extras_exist():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for page in PAGES:
        for extras in re.findall(r"token-sparse-attention\[([\w,]+)\]", page.read_text()):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"{page}: {extra}"
