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
from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig, crossover
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.methods import method_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "token_sparse_attention"
DOCS = ROOT / "docs"
CHOOSING = DOCS / "choosing-a-configuration.md"
README = ROOT / "README.md"
IN_ROOT = [ROOT / f"{name}.md" for name in ("README", "DESIGN", "CONTRIBUTING", "CHANGELOG")]
PAGES = [*IN_ROOT, *sorted(DOCS.glob("*.md"))]
CARD = PACKAGE / "bundled" / "model" / "README.md"
MEASURED = [DOCS / "results.md", CARD, *sorted((ROOT / "benchmarks").rglob("*.md"))]
DOCUMENTED = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


@pytest.mark.parametrize("config", [KVSamplingConfig, TokenSelectionConfig])
def test_settings_are_all_there_is(config):
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    section = read(CHOOSING).split(f"### {config.__name__}\n")[1].split("\n#")[0]
    listed = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows(section)[2:]}
    assert listed == defaults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, _ = link.partition("#")
        assert not file or (page.parent / file).exists(), link


def test_numbers_are_measured_ones():
    """Each speed-up, score and time is in a generated table, as it is written on the page."""
    measured = "".join(map(read, MEASURED))
    for page in PAGES:
        if page in MEASURED:
            continue
        text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
        for number in re.findall(r"\d+\.\d\dx|[+-]\d\.\d{3}|\b0\.\d{3}\b|\d+(?:\.\d+)? ms", text):
            if number != f"{TokenSelectionConfig().drop_mass}":
                assert number.removesuffix(" ms") in measured, f"{page.name}: {number}"


def test_the_crossovers_lengths_are_the_codes():
    for length in crossover.MIN_LENGTH.values():
        assert re.search(rf"\b{length // 1024}K\b", read(CHOOSING)), length


@pytest.mark.parametrize(
    ("device", "heads"), [("cuda", 32), ("cuda", 8), ("cuda", 4), ("cpu", 32)]
)
def test_from_where_on_queries_attend_sparsely_is_the_codes(device, heads):
    """By default, for heads of 128; in units of 1,024 tokens."""
    gate = method_of(KVSamplingConfig()).gate(torch.device(device), heads, 128)
    assert f"from position {gate.sparse.position // 1024}K on" in read(CHOOSING)
    least = -(-gate.shortest_prompt // 1024)
    assert re.search(rf"\b{least}K\b", read(CHOOSING)), (device, heads, least)
    assert f"less {crossover.SPARSE_COST:g} times those that it sees" in read(CHOOSING)


def test_the_quick_starts_sizes_are_the_defaults():
    config, text = KVSamplingConfig(), " ".join(read(DOCS / "quick-start.md").split())
    assert f"sees the last {config.sliding_window:,} keys" in text
    assert f"up to {config.num_samples:,} sampled keys" in text


def test_the_layout_names_what_there_is():
    package, outside = read(DOCS / "layout.md").split("## Outside the package")
    for text, root in ((package, PACKAGE), (outside, ROOT)):
        for path in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE):
            assert (root / path).exists(), path
    for path in re.findall(r"`([\w/-]+/[\w./-]*)`", outside):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path


def test_the_layout_names_all_that_there_is():
    named = set(re.findall(r"^\| `([^`]+)` \|", read(DOCS / "layout.md"), re.MULTILINE))
    there = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    missing = [path for path in there if not any(path.startswith(name) for name in named)]
    assert not missing, "add to docs/layout.md: " + ", ".join(sorted(missing))


def test_files_that_design_cites_are_there():
    for path in re.findall(
        r"`((?:benchmarks|scripts|tests|docs)/[\w./-]+)`", read(ROOT / "DESIGN.md")
    ):
        assert (ROOT / path).exists(), path


OLD_NAMES = r"fallback|far token|drawing|drawn|landmark"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_old_names_are_gone(page):
    """`fallback` is a field of the paper's method; DESIGN says what was removed."""
    text = read(page).split("## What was removed")[0]
    for line in text.splitlines():
        mine = re.sub(r"`?\"?\bfallback(=|`|\":| must have shape)", "", line)
        assert not re.search(OLD_NAMES, mine, re.IGNORECASE), line


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
