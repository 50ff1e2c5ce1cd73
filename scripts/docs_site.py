"""What the documentation site needs beyond plain Markdown; mkdocs.yml names this file.

Pages that lie elsewhere in the repository become pages of the site. Links between files of the
repository become links between pages, so that the same links work in both places.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

from griffe import Docstring, Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "DESIGN.md": "design.md",
    "LICENSE": "license.md",
    "src/token_sparse_attention/bundled/model/README.md": "bundled-model.md",
}
"""Files outside the documentation's folder, and the names of their pages."""
_SOURCES = {page: source for source, page in ELSEWHERE.items()}
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside the documentation's folder."""
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if not path.endswith(".md"):
            text = f"# {path.capitalize()}\n\n```text\n{text}```\n"
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages.

    In the repository a bar in code in a table is escaped by a backslash; here it is not.
    """
    name = page.file.src_path
    folder = PurePosixPath(_SOURCES.get(name, f"docs/{name}")).parent

    def inside(link: re.Match[str]) -> str:
        path = os.path.normpath(folder / link[2])
        if path in ELSEWHERE:
            return link[1] + ELSEWHERE[path]
        if path.startswith("docs/"):
            return link[1] + path.removeprefix("docs/")
        raise PluginError(f"{folder / name} links to {path}, no page of the site")

    markdown = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), markdown)
    return _LINK.sub(inside, markdown)


class ExampleSections(Extension):
    """Reads `Example:` in a docstring, as this library writes it, as a section of examples."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section to what the parser knows."""
        if isinstance(obj.docstring, Docstring):
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text
