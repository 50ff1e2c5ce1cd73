"""The break-even: its arithmetic, and its constants against the committed measurements."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.operator.sampling_tables import dense_query_keys, sampling_keys

from token_sparse_attention import DenseReason, KVSamplingConfig, TokenSelectionConfig
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.crossover import (
    DENSE_QUERY_TOKENS,
    LEAST_DENSE_QUERY_TOKENS,
    MIN_LENGTH,
    MIN_SAMPLED_LENGTH,
    NEVER_DENSE,
    OVERHEAD_TOKENS,
    SAMPLED_TOKENS,
    WINDOW_TOKENS,
    BreakEven,
    effective_length,
)
from token_sparse_attention.gate import Gate
from token_sparse_attention.methods import method_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
STAGES = ("ours/score", "ours/select", "ours/gather", "ours/scatter")


def times(file, kind):
    records = json.loads((RESULTS / file).read_text())["records"]
    return {
        (record["name"], record["seq_len"], record["kept"]): record["median_ms"]
        for record in records
        if record["kind"] == kind
    }


def test_effective_length_is_the_length_of_a_whole_prompt_and_small_for_a_chunk():
    assert effective_length(1000, 1000) == 1000
    assert effective_length(100, 1000) == 190
    assert effective_length(1, 1000) < 2


def test_effective_length_does_not_depend_on_the_default_dtype():
    lengths = torch.tensor([131072, 24501])
    try:
        torch.set_default_dtype(torch.float16)
        found = effective_length(lengths, lengths)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.tolist() == [131072, 24501]


def break_even_of(config, device=CPU, num_heads=8, head_dim=64):
    return method_of(config).gate(device, num_heads, head_dim).break_even


def test_break_even():
    even = BreakEven(500, 1.0, 190.0)
    assert Gate(break_even=even).reason(499, 499) is DenseReason.CROSSOVER_LENGTH
    assert Gate(break_even=even).reason(500, 500) is None
    assert even.max_share(1000, 1000) == pytest.approx(0.9)
    assert even.max_share(190, 190) == 0
    assert even.max_share(100, 1000) == 0
    off = break_even_of(TokenSelectionConfig(crossover="off"))
    assert off == NEVER_DENSE
    assert Gate(break_even=off).reason(1, 1) is None
    assert off.max_share(1, 1) == 1
    auto = TokenSelectionConfig(crossover="auto")
    zero = break_even_of(auto)
    window = break_even_of(replace(auto, fallback="window"))
    assert window.fixed_tokens > zero.fixed_tokens
    assert break_even_of(replace(auto, sliding_window=4096)) == zero, "there is no window"
    assert break_even_of(replace(auto, keep_ratio=0.5)) == NEVER_DENSE
    alone, sinks, samples = (
        break_even_of(KVSamplingConfig(sink_size=sinks, num_samples=samples)).fixed_tokens
        for sinks, samples in ((0, 0), (4, 0), (4, 100))
    )
    assert alone < sinks < samples


def test_where_keys_are_sampled_lengths_decide():
    """No scoring is in vain, so shorter sequences may run sparse than with selected queries."""
    few, many = (KVSamplingConfig(num_samples=samples) for samples in (0, 100_000))
    assert break_even_of(few).min_length == MIN_SAMPLED_LENGTH["cpu"]
    even = break_even_of(many)
    assert even.min_length == even.fixed_tokens > MIN_SAMPLED_LENGTH["cpu"]
    assert MIN_SAMPLED_LENGTH["cuda"] < MIN_LENGTH["cuda"]


@pytest.mark.parametrize(
    ("device", "file", "kind", "dense"),
    [
        ("cuda", "op-h200.json", "graph", "dense/fa4"),
        ("cpu", "op-cpu.json", "eager", "dense/flash"),
    ],
)
def test_constants_cover_the_measured_overhead(device, file, kind, dense):
    """At every measured length that may run sparse, or the longest one there is."""
    measured = times(file, kind)
    lengths = sorted({length for name, length, _ in measured if name == "ours/whole"})
    checked = [length for length in lengths if length >= MIN_LENGTH[device]] or lengths[-1:]
    for length in checked:
        stages = [t for key, t in measured.items() if key[0] in STAGES and key[1] == length
                  and key[2] in (None, 0.5)]  # fmt: skip
        assert len(stages) == 4
        per_ms = length / measured[dense, length, None]
        overhead = sum(stages) * per_ms
        assert 0.4 * OVERHEAD_TOKENS[device] < overhead <= OVERHEAD_TOKENS[device]
        base, per_token = WINDOW_TOKENS[device]
        window = measured["ours/window", length, None] * per_ms
        assert 0.7 * (base + 512 * per_token) < window <= base + 512 * per_token


@pytest.mark.parametrize("num_heads", [8, 32])
def test_constants_cover_the_measured_samples_and_dense_queries(num_heads):
    """The costliest placement of sampled keys, at the start, is not far below them."""
    run = Run.load(RESULTS / f"far-h200-{num_heads}-heads.json")
    lengths = [n for n in run.lengths("far/score") if n >= MIN_SAMPLED_LENGTH["cuda"]]
    assert len(lengths) == 3
    base, per_token = SAMPLED_TOKENS["cuda"]
    dense_query = max(DENSE_QUERY_TOKENS["cuda"] / num_heads, LEAST_DENSE_QUERY_TOKENS["cuda"])
    each = []
    for length in lengths:
        shares = {}
        for name in run.names("far/draw/"):
            setting = name.removeprefix("far/draw/")
            count = int(re.search(r"\d+", setting)[0])
            shares[setting] = sampling_keys(run, length, setting) / (base + per_token * count)
        assert 0.85 < max(shares.values()) <= 1, shares
        each.append(dense_query_keys(run, length, 128))
    assert 0.75 < max(each) / dense_query <= 1, each


def test_fewer_heads_need_longer_prompts():
    """While the host starts the sparse kernels, dense attention of few heads is done."""
    config = KVSamplingConfig(num_samples=1024)
    least = [break_even_of(config, CUDA, heads, 128).min_length for heads in (64, 32, 16, 8, 4, 1)]
    assert least == sorted(least)
    assert least[:2] == [MIN_SAMPLED_LENGTH["cuda"]] * 2
    assert least[3] == break_even_of(config, CUDA, 16, 64).min_length
    assert least[5] == pytest.approx(2 * least[4])
    selecting = TokenSelectionConfig(crossover="auto")
    assert break_even_of(selecting, CUDA, 1, 128).min_length > MIN_LENGTH["cuda"]
    assert break_even_of(config, CPU, 1, 64) == break_even_of(config, CPU, 64, 128)


@pytest.mark.parametrize(
    "config", [KVSamplingConfig(num_samples=8192), TokenSelectionConfig(crossover="auto")]
)
def test_dense_heads_leave_less_to_gain(config):
    without = break_even_of(config, CUDA, 32, 128)
    quarter, all_of_them = (
        method_of(replace(config, dense_heads=tuple(range(count)))).gate(CUDA, 32, 128)
        for count in (8, 32)
    )
    assert quarter.break_even.fixed_tokens == without.fixed_tokens
    least = max(without.fixed_tokens / 0.75, without.min_length)
    assert quarter.break_even.min_length == pytest.approx(least)
    assert all_of_them.reason(10**7, 10**7) is DenseReason.CROSSOVER_LENGTH
    if isinstance(config, KVSamplingConfig):
        assert without.min_length == without.fixed_tokens > MIN_SAMPLED_LENGTH["cuda"]
        assert quarter.break_even.min_length == pytest.approx(without.min_length / 0.75)


@pytest.mark.parametrize("num_heads", [4, 8, 16, 32])
@pytest.mark.parametrize("samples", [1024, 4096])
def test_whole_prefills_get_faster_from_the_crossover_on_and_hardly_below(num_heads, samples):
    measured = times(f"prefill-h100-{num_heads}-heads.json", "eager")
    config = KVSamplingConfig(num_samples=samples)
    least = break_even_of(config, CUDA, num_heads, 128).min_length
    speed_ups = {
        length: measured["dense", length, None] / time
        for (name, length, _), time in measured.items()
        if name == f"samples-{samples}/all"
    }
    assert min(speed_ups) < least < max(speed_ups) or num_heads == 32
    for length, speed_up in speed_ups.items():
        if length >= least:
            assert speed_up > 1.05, (length, speed_up)
        else:
            assert speed_up < 1.35, (length, speed_up)


def test_where_the_method_decides_dense_it_costs_under_two_percent():
    measured = times("crossover-h200.json", "graph")
    for name, length, kept in list(measured):
        if name == "crossover/dense":
            dense, ours = measured[name, length, kept], measured["crossover/ours", length, kept]
            assert ours <= max(1.02 * dense, dense + 0.02)
    lengths = {length for name, length, _ in measured if name == "crossover/ours"}
    assert min(lengths) < MIN_LENGTH["cuda"] < max(lengths), "scored and unscored ones"
