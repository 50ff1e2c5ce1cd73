"""Make every page's tables and figures anew from the committed result files.

python -m benchmarks.pages
"""

from __future__ import annotations

import sys
from argparse import Namespace

from benchmarks.command import make_parser, run
from benchmarks.operator import page as operator


def write(_: Namespace) -> bool:
    """Write the pages and name each file that changed."""
    for page in operator.PAGES:
        for path, text in operator.make_page(page).items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(path)
    return True


if __name__ == "__main__":
    sys.exit(run(make_parser("benchmarks.pages", __doc__), write))
