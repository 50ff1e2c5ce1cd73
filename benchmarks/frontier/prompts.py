"""Turn samples of `tsa eval` into prompts for `tsa calibrate`, with the right answers as replies.

    tsa eval --prepare-only --tasks niah_multikey_2,niah_multikey_3,ruler_vt --lengths 131072 \\
        --limit 4 --seed 31 --samples samples.jsonl.gz
    python -m benchmarks.frontier.prompts --samples samples.jsonl.gz --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import make_parser, run_command

from token_sparse_attention.evaluation.samples import SampleSet


def main(argv: Sequence[str] | None = None) -> int:
    """Write the prompts, the tasks taking turns."""
    parser = make_parser("benchmarks.frontier.prompts", __doc__)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    samples = sorted(SampleSet.load(args.samples).samples, key=lambda one: (one.index, one.task))
    with args.out.open("w", encoding="utf-8") as file:
        for sample in samples:
            answer = " " + " ".join(sample.doc["outputs"])
            file.write(json.dumps({"prompt": sample.prompt, "continuation": answer}) + "\n")
    print(f"{len(samples)} prompts in {args.out}")
    return True


if __name__ == "__main__":
    sys.exit(main())
