"""What README.md and docs/ say of settings, names, files and numbers is what there is."""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
from pathlib import Path

import pytest
import torch

import token_sparse_attention
from token_sparse_attention import TokenSparseConfig, crossover
from token_sparse_attention.attention.patterns import PATTERNS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHOOSING = DOCS / "choosing-a-configuration.md"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
CARD = ROOT / "src" / "token_sparse_attention" / "bundled" / "model" / "README.md"
DOCUMENTED = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_settings_are_all_there_is():
    defaults = {f.name: f.default for f in dataclasses.fields(TokenSparseConfig)}
    section = read(README).split("## Settings")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(defaults)
    section = read(DOCS / "choosing-a-configuration.md").split("## Every field")[1].split("## ")[0]
    listed = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows(section)[2:]}
    assert listed == defaults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, _ = link.partition("#")
        assert not file or (page.parent / file).exists(), link


@pytest.mark.parametrize("name", ["index.md", "choosing-a-configuration.md"])
def test_numbers_are_measured_ones(name):
    """Each is in a generated table or the model's card, as it is written here."""
    pages = [DOCS / page for page in ("benchmarks.md", "frontier.md", "vllm.md")]
    text, measured = read(DOCS / name), "".join(map(read, [*pages, CARD]))
    numbers = re.findall(r"\d+\.\d\dx|[+-]\d\.\d{3}|\b0\.\d{3}\b|\d+(?:\.\d+)? ms", text)
    assert numbers
    for number in numbers:
        if number != f"{TokenSparseConfig.published().drop_mass}":
            assert number.removesuffix(" ms") in measured, number


def test_rows_about_the_bundled_model_are_the_cards():
    names = {
        "published: zeros, `drop_mass=0.005`": "published",
        "window, `drop_mass=0.2`": "window-0.2",
        "window, `drop_mass=0.4`": "window-0.4",
    }
    _, other_settings = read(CARD).split("Other settings of all layers")
    card = {tuple(row[:2]): row for row in rows(other_settings)}
    section = read(DOCS / "choosing-a-configuration.md").split("## What do dropped")[1]
    listed = [row for row in rows(section.split("\n## ")[0])[2:] if len(row) == 5]
    assert len(listed) == 7
    for length, settings, difference, kept, work in listed:
        row = card[length, names[settings]]
        assert (row[4].split()[0], row[5], row[6]) == (difference, kept, work)


def test_the_crossovers_lengths_are_the_codes():
    for page in (README, DOCS / "choosing-a-configuration.md"):
        for length in (*crossover.MIN_LENGTH.values(), *crossover.MIN_KEYS_ONLY.values()):
            assert re.search(rf"\b{length // 1024}K\b", read(page)), (page, length)


def test_from_where_on_prompts_run_sparse_is_the_codes():
    """By default, and with few heads of 128 on a GPU; in thousands of tokens."""
    wanted = {("cuda", 32): (README, CHOOSING), ("cpu", 32): (README, CHOOSING)}
    wanted |= {("cuda", 8): (README, CHOOSING), ("cuda", 4): (CHOOSING,)}
    for (device, heads), pages in wanted.items():
        even = crossover.break_even(TokenSparseConfig(), torch.device(device), heads, 128)
        unit = 1024 if even.min_length in crossover.MIN_KEYS_ONLY.values() else 1000
        length = f"{even.min_length / unit:.0f}K"
        for page in pages:
            assert re.search(rf"\b{length}\b", read(page)), (page, device, heads, length)


def test_the_patterns_are_all_there_are():
    found = re.findall(r"^\| `(\w+)` .*\| `(\w+)` \|$", read(DOCS / "patterns.md"), re.MULTILINE)
    assert found == [(name, pattern.config.__name__) for name, pattern in PATTERNS.items()]


def test_public_names_are_in_the_reference():
    for name in token_sparse_attention.__all__:
        assert f"token_sparse_attention.{name}" in DOCUMENTED
    transformers = pytest.importorskip("token_sparse_attention.integrations.transformers")
    for name in transformers.__all__:
        assert f"{transformers.__name__}.{name}" in DOCUMENTED


def test_names_that_snippets_import_are_in_the_reference():
    used = set()
    for page in PAGES:
        for snippet in re.findall(
            r"```python\n(.*?)^ *```$", read(page), re.MULTILINE | re.DOTALL
        ):
            for node in ast.walk(ast.parse(textwrap.dedent(snippet))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    used |= {f"{node.module}.{alias.name}" for alias in node.names}
    used = {name for name in used if name.startswith("token_sparse_attention.")}
    internal = {"token_sparse_attention.attention.block_mask.BLOCK_SIZE"}
    missing = {
        name
        for name in used - internal - DOCUMENTED
        if name.rpartition(".")[0] not in DOCUMENTED  # a module that is documented whole
    }
    assert not missing


def test_every_page_is_in_the_menu():
    menu = read(ROOT / "mkdocs.yml").split("nav:")[1].split("\n\n")[0]
    assert set(re.findall(r"([\w-]+\.md)$", menu, re.MULTILINE)) >= {
        p.name for p in DOCS.glob("*.md")
    }
