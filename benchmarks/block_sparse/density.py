"""Which share of the causal blocks patterns attend over, layer by layer, on a model's own inputs.

    python -m benchmarks.block_sparse.density --samples samples.jsonl.gz --lengths 16384 \\
        --out density.json

The model reads each prompt densely. MInference is left out: it keeps a number of columns beside
its blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.block_sparse.layer_times import new_content, some_of_each_length
from benchmarks.block_sparse.observed import prefill_with
from benchmarks.command import make_parser, run_command
from rich.console import Console
from rich.progress import track
from torch import Tensor

from token_sparse_attention import bundled, run
from token_sparse_attention.attention.block_mask import BLOCK_SIZE, BlockMask
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.attention.patterns.flexprefill import (
    FlexPrefillConfig,
    flexprefill_mask,
)
from token_sparse_attention.attention.patterns.xattention import XAttentionConfig, xattention_mask
from token_sparse_attention.attention.resolve import causal_attention
from token_sparse_attention.evaluation import generate
from token_sparse_attention.evaluation.samples import SampleSet

MASKS: dict[str, tuple[Callable[..., BlockMask], PatternConfig]] = {
    "flexprefill": (flexprefill_mask, FlexPrefillConfig()),
    "xattention": (xattention_mask, XAttentionConfig()),
}


def densities(model: Any, ids: Tensor) -> dict[str, list[float]]:
    """Return each pattern's density in every layer, the mean over its heads.

    Args:
        model: a causal language model on transformers' attention interface.
        ids: ``[1, S]`` token ids.
    """
    found: dict[str, list[float]] = defaultdict(list)

    def observed(
        _module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        for name, (make, config) in MASKS.items():
            mask = make(query, key, config, scaling, BLOCK_SIZE)
            found[name].append(float(mask.density().mean()))
        return causal_attention(query, key, value, scale=scaling).transpose(1, 2), None

    prefill_with(observed, model, ids)
    return dict(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = make_parser("benchmarks.block_sparse.density", __doc__)
    parser.add_argument("--model", default=str(bundled.MODEL))
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--lengths", default="16384", help="LIST of lengths of the samples")
    parser.add_argument("--per-length", type=int, default=5, help="samples of each length")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    samples = SampleSet.load(args.samples)
    model, tokenizer = run.load_model(args.model, device=args.device)
    settings = {name: vars(config) for name, (_, config) in MASKS.items()}
    content = new_content(args.model, model, samples, settings=settings)
    lengths = [int(length) for length in args.lengths.split(",")]
    chosen = [s for s in some_of_each_length(samples, args.per_length) if s.length in lengths]
    for sample in track(chosen, console=Console(stderr=True)):
        ids = generate.encode(model, tokenizer, sample.prompt, sample.max_new_tokens)
        facts = {"task": sample.task, "length": sample.length, "index": sample.index}
        content["samples"].append({**facts, "density": densities(model, ids)})
        args.out.write_text(json.dumps(content), encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
