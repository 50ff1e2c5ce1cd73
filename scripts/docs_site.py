"""What the documentation site does besides plain Markdown; mkdocs.yml names this file.

Pages that live elsewhere in the repository become pages of the site, and links that leave
`docs/` for them lead there, so that the same links work where the repository is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Docstring, Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "DESIGN.md": "design.md",
    "src/token_sparse_attention/bundled/model/README.md": "bundled-model.md",
}
_CODE = re.compile(r"`[^`\n]+`")
_LINK_OUT = re.compile(r"(\]\()\.\./([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside the documentation's folder."""
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links that leave the folder at the site's own copy of what they lead to.

    A bar in code in a table has a backslash where the repository is read, none here.
    """

    def inside(link: re.Match[str]) -> str:
        if link[2] not in ELSEWHERE:
            raise PluginError(f"{page.file.src_path} links to ../{link[2]}, no page of the site")
        return link[1] + ELSEWHERE[link[2]]

    markdown = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), markdown)
    return _LINK_OUT.sub(inside, markdown)


class ExampleSections(Extension):
    """Reads `Example:` in a docstring, as this library writes it, as a section of examples."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section to what the parser knows."""
        if isinstance(obj.docstring, Docstring):
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text
