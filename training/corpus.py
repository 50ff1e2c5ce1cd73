"""Debian documentation packages to clean prose."""

from __future__ import annotations

import gzip
import html.parser
import json
import re
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from . import packages
from .packages import Package

DEMO_PAGE = ("sqlite3-doc", "howtocorrupt.html")
"""The page that the bundled demo document is made of; never trained on."""

_SKIPPED = frozenset(
    ("script", "style", "pre", "nav", "head", "footer", "form", "svg", "select", "button")
)
_INLINE = frozenset(
    (
        *("a", "abbr", "acronym", "b", "big", "br", "cite", "code", "del", "dfn", "em", "font"),
        *("i", "img", "ins", "kbd", "label", "mark", "nobr", "q", "s", "samp", "small", "span"),
        *("strong", "sub", "sup", "tt", "u", "var", "wbr"),
    )
)
_HELD_OUT_SHARE = 30


@dataclass(frozen=True)
class Document:
    """One page of prose."""

    package: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the page is kept out of training (the demo page and about 1 in 30)."""
        if (self.package, self.name) == DEMO_PAGE:
            return True
        return zlib.crc32(f"{self.package}/{self.name}".encode()) % _HELD_OUT_SHARE == 0


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of a page, one string per block element."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._parts: list[str] = []
        self._skipping: list[str] = []

    def flush(self) -> None:
        """End the current block."""
        text = " ".join("".join(self._parts).split())
        if text:
            self.blocks.append(text)
        self._parts = []

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        """Start a block, or start skipping."""
        if tag in _SKIPPED:
            self.flush()
            self._skipping.append(tag)
        elif tag == "br":
            self._parts.append(" ")
        elif tag not in _INLINE:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        """End a block, or stop skipping."""
        if self._skipping:
            if tag == self._skipping[-1]:
                self._skipping.pop()
        elif tag not in _INLINE:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Keep the text of the current block."""
        if not self._skipping:
            self._parts.append(data)


def clean(text: str) -> str:
    """Plain characters: ASCII punctuation, no headline marks, no control characters."""
    for old, new in (
        ("\u2018", "'"),
        ("\u2019", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2013", "-"),
        ("\u2014", " - "),
        ("\u2026", "..."),
        ("\u00a0", " "),
        ("\u00b6", ""),
        ("\uf0c1", ""),
    ):
        text = text.replace(old, new)
    text = text.encode("ascii", "ignore").decode()
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", " ", text)
    return re.sub(r" +", " ", text).strip()


def paragraphs(page: str) -> list[str]:
    """The paragraphs and headings of an HTML page."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    parser.flush()
    return [block for block in map(clean, parser.blocks) if re.search(r"[A-Za-z]{2}", block)]


def _is_prose(block: str) -> bool:
    return len(block.split()) >= 6 and block[-1] in ".:!?)"


def fetch(folder: Path) -> None:
    """Download and unpack the packages that ``folder`` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages.ALL:
        target = folder / package.name
        if target.is_dir():
            continue
        subprocess.run(["apt-get", "download", "-q", package.name], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package.name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)


def versions(folder: Path) -> list[dict[str, str]]:
    """Name, version and licence of each package whose content is learnt."""
    rows = []
    for package in packages.LEARNT:
        (archive,) = folder.glob(f"{package.name}_*.deb")
        command = ["dpkg-deb", "-f", str(archive), "Version"]
        version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = {"package": package.name, "version": version.strip(), "licence": package.licence}
        rows.append(row)
    return rows


def read_page(folder: Path, package_name: str, page_name: str) -> list[str]:
    """All paragraphs and headings of one page."""
    (package,) = (p for p in packages.PROSE if p.name == package_name)
    path = folder / package.name / package.folder / page_name
    return paragraphs(path.read_text(encoding="utf-8", errors="replace"))


def _pages(folder: Path, package: Package) -> list[Document]:
    root = folder / package.name / package.folder
    paths = sorted({path for pattern in package.patterns for path in root.glob(pattern)})
    documents = []
    for path in paths:
        if not path.is_file():
            continue
        blocks = paragraphs(path.read_text(encoding="utf-8", errors="replace"))
        text = "\n\n".join(filter(_is_prose, blocks))
        if len(text) >= 800:
            documents.append(Document(package.name, str(path.relative_to(root)), text))
    return documents


def _bible(folder: Path) -> list[Document]:
    reader = folder / packages.BIBLE_READER.name / packages.BIBLE_READER.folder / "bible"
    data = folder / packages.BIBLE.name / packages.BIBLE.folder
    command = [str(reader), "-p", str(data), "Gen1:1-Rev22:21"]
    done = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    chapters: dict[str, list[str]] = {}
    chapter = ""
    for line in done.stdout.decode("ascii", "ignore").splitlines():
        if line and not line.startswith(" "):
            chapter = line.strip()
        elif line.strip():
            chapters.setdefault(chapter, []).append(re.sub(r"^\s+\d+ ", "", line).strip())
    return [
        Document(packages.BIBLE.name, name, clean(" ".join(lines)))
        for name, lines in chapters.items()
    ]


def _jargon(folder: Path) -> list[Document]:
    path = folder / packages.JARGON.name / packages.JARGON.folder / "jargon.dict.dz"
    raw = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    blocks = [clean(" ".join(block.split())) for block in re.split(r"\n\s*\n", raw)]
    blocks = [block.replace("{", "").replace("}", "") for block in blocks if _is_prose(block)]
    return [
        Document(packages.JARGON.name, f"part {start}", "\n\n".join(blocks[start : start + 60]))
        for start in range(0, len(blocks), 60)
    ]


def load(folder: Path) -> list[Document]:
    """Every page of prose of the packages unpacked in ``folder``."""
    documents = [page for package in packages.PROSE for page in _pages(folder, package)]
    return documents + _bible(folder) + _jargon(folder)


def load_words(folder: Path) -> tuple[list[str], list[str]]:
    """Adjectives and nouns for the keys: single common-case words of 3 to 10 letters."""
    words = folder / packages.WORDS.name / packages.WORDS.folder / "american-english"
    known = set(words.read_text(encoding="utf-8").split())
    lists = []
    for part in ("adj", "noun"):
        path = folder / packages.WORDNET.name / packages.WORDNET.folder / f"index.{part}"
        entries = (line.split(" ", 1)[0] for line in path.read_text("utf-8").splitlines())
        lists.append(sorted({w for w in entries if re.fullmatch("[a-z]{3,10}", w) and w in known}))
    return lists[0], lists[1]


def save_sources(folder: Path, path: Path) -> None:
    """Write package names, versions and licences as JSON."""
    path.write_text(json.dumps(versions(folder), indent=2) + "\n", encoding="utf-8")
