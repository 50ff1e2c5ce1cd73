"""Sampling by blocks on a CUDA device: the checks of tests/methods/test_blocks.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from block_checks import On, check_chunks, check_padding, check_the_future_changes_nothing
from token_sparse_attention import KVSamplingConfig

CONFIG = KVSamplingConfig(
    block_size=64, num_probes=8, sliding_window=80, sink_size=3, num_samples=96, dense_queries=0,
    crossover="off",
)  # fmt: skip
CONFIGS = pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, budget="per_head"),
        dataclasses.replace(CONFIG, num_samples=0),
        dataclasses.replace(CONFIG, block_size=128, sliding_window=128, dense_queries=50),
    ],
    ids=["shared", "per head", "window", "dense queries"],
)
# Scores that round otherwise in another call may sample a neighbour: float64 does not.
DEVICES = pytest.mark.parametrize(
    "on",
    [
        On("cuda", "triton", torch.bfloat16, 1e-2),
        On("cuda", "triton", torch.float32, 1e-4),
        On("cuda", "reference", torch.float64, 1e-11),
    ],
    ids=["bfloat16", "float32", "float64"],
)
SHAPE = {"heads": 8, "kv_heads": 2, "head_dim": 64}


@DEVICES
@CONFIGS
@pytest.mark.parametrize("cuts", [(512,), (100, 333, 640), (1, 65, 900)])
def test_any_split_into_calls_gives_what_one_call_gives(on, config, cuts):
    check_chunks(on, config, 1000, cuts, **SHAPE)


@DEVICES
@CONFIGS
@pytest.mark.parametrize("position", [64, 500, 999])
def test_later_tokens_change_no_output_before_them(on, config, position):
    check_the_future_changes_nothing(on, config, 1000, position, **SHAPE)


@DEVICES
@CONFIGS
@pytest.mark.parametrize("query_len", [700, 260])
def test_companions_and_padding_change_nothing(on, config, query_len):
    spans = [(0, 700), (133, 700), (0, 600), (500, 560)]
    for known in (False, True):
        check_padding(on, config, 700, query_len, spans, known=known, **SHAPE)
