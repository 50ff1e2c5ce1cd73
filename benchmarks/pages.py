"""Make the tables and figures of every page from the committed result files.

python -m benchmarks.pages           writes what is not up to date, and names it
python -m benchmarks.pages --check   only names it; exit code 1 if there is any
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from benchmarks import families, summary
from benchmarks.block_sparse import page as block_sparse
from benchmarks.command import make_parser, run_command
from benchmarks.fidelity import page as fidelity
from benchmarks.markdown import Page
from benchmarks.operator import page as operator
from benchmarks.released import page as released
from benchmarks.serving import page as serving


def every_page() -> Iterator[Page]:
    """Yield every page there is."""
    for study in (summary, families, operator, block_sparse, fidelity, released, serving):
        yield from study.pages()


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages."""
    parser = make_parser("benchmarks.pages", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    return run_command(parser, _run, argv)


def _run(args: Namespace) -> bool:
    stale = {
        path: text
        for page in every_page()
        for path, text in page.files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        print(path)
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return not (args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
