"""Prefill a model with an attention function of one's own, to see what its layers attend to.

And what the commands share that do so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.command import make_parser
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from token_sparse_attention import bundled
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.evaluation.samples import SampleSet
from token_sparse_attention.info import provenance

_NAME = "observed_attention"


@contextmanager
def attending(attention: Callable[..., tuple[Tensor, None]], model: Any) -> Iterator[None]:
    """Let a model's layers attend by `attention` meanwhile.

    Args:
        attention: on transformers' attention interface.
        model: a causal language model on that interface.
    """
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def prefill_with(attention: Callable[..., tuple[Tensor, None]], model: Any, ids: Tensor) -> None:
    """Run a model's prefill of ``[1, S]`` token ids, its layers attending by `attention`."""
    with attending(attention, model), torch.no_grad():
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)


def probabilities(query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Iterator[Tensor]:
    """Yield what each head's queries give to all keys ``[N, S]``, float32.

    Args:
        query: ``[H, N, D]`` some queries.
        key: ``[H_kv, S, D]`` all keys.
        positions: ``[N]`` where the queries stand.
        scale: of the logits.
    """
    group = query.shape[0] // key.shape[0]
    hidden = torch.arange(key.shape[1], device=key.device) > positions[:, None]
    for head, queries in enumerate(query):
        logits = (queries @ key[head // group].T).float() * scale
        yield logits.masked_fill(hidden, -torch.inf).softmax(-1)


def examination_parser(name: str, doc: str | None, num_samples: int) -> argparse.ArgumentParser:
    """Return a parser of what every examination needs: a model, samples and an output."""
    parser = make_parser(name, doc)
    parser.add_argument("--model", default=str(bundled.MODEL))
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--num-samples", type=int, default=num_samples)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def header(
    kind: str, model: Any, name: str, samples: SampleSet, config: SparseConfig
) -> dict[str, Any]:
    """Return what a result file of an examination begins with.

    Args:
        kind: of the file.
        model: what was examined.
        name: its folder or hub id.
        samples: the prompts.
        config: what is sparse in it.
    """
    return {
        "kind": kind,
        "provenance": provenance(str(model.device)),
        "model": "bundled" if name == str(bundled.MODEL) else name,
        "seed": samples.seed,
        "samples_sha256": samples.digest(),
        "config": config.to_dict(),
    }
