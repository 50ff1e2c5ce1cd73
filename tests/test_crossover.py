"""The break-even: its arithmetic, and its constants against the committed measurements."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from token_sparse_attention import DenseReason, KVSamplingConfig, TokenSelectionConfig
from token_sparse_attention.crossover import (
    HOST_WORK,
    LEAST_SAVED,
    MIN_LENGTH,
    NEVER_DENSE,
    OVERHEAD_TOKENS,
    SPARSE_COST,
    SPARSE_FROM,
    BreakEven,
    SparseFrom,
    effective_length,
    window_overhead,
)
from token_sparse_attention.gate import Gate
from token_sparse_attention.methods import method_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
STAGES = ("ours/score", "ours/select", "ours/gather", "ours/scatter")


def times(file, kind, heads=None):
    records = json.loads((RESULTS / file).read_text())["records"]
    return {
        (record["name"], record["seq_len"], record["kept"]): record["median_ms"]
        for record in records
        if record["kind"] == kind and heads in (None, record["num_heads"])
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
        window = measured["ours/window", length, None] * per_ms
        assert 0.7 * window_overhead(device, 512) < window <= window_overhead(device, 512)


@pytest.mark.parametrize("heads", [32, 14, 8])
def test_dense_queries_cost_what_was_measured(heads):
    """In keys per query of dense time, at the lengths that run sparse."""
    measured = times("sampling-h200.json", "graph", heads)
    costs = []
    for length in (16384, 32768, 65536, 131072):
        dense, whole, without = (
            measured[name, length, None]
            for name in ("dense", "whole", "whole without dense queries")
        )
        costs.append((whole - without) * length / dense / 128)
    config = TokenSelectionConfig(crossover="auto")
    more = break_even_of(replace(config, dense_queries=128), CUDA, heads, 128).fixed_tokens
    each = (more - break_even_of(config, CUDA, heads, 128).fixed_tokens) / 128
    assert 0.6 < each / statistics.median(costs) < 1.6


def sparse_from_of(config, device=CUDA, num_heads=32, head_dim=128):
    return method_of(config).gate(device, num_heads, head_dim).sparse.position


def test_positions_decide_where_keys_are_sampled():
    """A prompt's length has no say, so that its split into calls has none."""
    config = KVSamplingConfig()
    gate = method_of(config).gate(CUDA, 128, 256)
    assert gate.sparse.position == SPARSE_FROM
    assert gate.break_even == NEVER_DENSE
    off = method_of(replace(config, crossover="off")).gate(CUDA, 32, 128)
    assert (off.sparse.position, off.sparse.least_saved) == (2048, 0)
    for size in (16, 64, 4096, 65536):
        blocks = replace(config, block_size=size, num_probes=16, sliding_window=65536)
        position = sparse_from_of(blocks)
        assert position % size == 0
        assert position >= SPARSE_FROM


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_queries_that_see_more_keys_begin_later(device):
    """Sparse attention of as many keys as dense attention sees is never faster."""
    config = KVSamplingConfig()
    more = [
        sparse_from_of(changed, device, num_heads=256)
        for changed in (
            config,
            replace(config, num_samples=32768),
            replace(config, sliding_window=32768),
        )
    ]
    assert more[0] == SPARSE_FROM
    assert more[1] == more[2] == 2 * (32768 + 2048)


def test_on_a_cpu_queries_behind_the_crossover_save_time():
    """What a longer prompt adds is less where its further queries attend sparsely."""
    measured, first = times("sampling-cpu.json", "eager"), SPARSE_FROM
    for longer in (12288, 16384):
        dense, whole = (
            measured[name, longer, None] - measured[name, first, None]
            for name in ("dense", "whole")
        )
        assert 1.2 * whole < dense


def shortest_of(config, device=CUDA, num_heads=32, head_dim=128):
    return method_of(config).gate(device, num_heads, head_dim).shortest_prompt


def test_calls_run_sparse_where_they_save_enough():
    """Counted query by query: the keys before it, less what a sparse query costs."""
    config = KVSamplingConfig()
    gate = method_of(config).gate(CUDA, 32, 128)
    least, cost = LEAST_SAVED["cuda"] / (32 * 128), SPARSE_COST * (2048 + 2048)
    for kv_len in (9000, 12000, 13000, 20000, 131072):
        for query_len in (1, 600, 2048, 8192, kv_len):
            places = range(max(kv_len - query_len, SPARSE_FROM), kv_len - config.dense_queries)
            enough = sum(place + 0.5 - cost for place in places) >= least
            early = kv_len < gate.shortest_prompt
            reason = DenseReason.CROSSOVER_LENGTH if early else DenseReason.SHORT_CHUNK
            assert gate.reason(query_len, kv_len) is (None if enough else reason)
    assert gate.reason(gate.shortest_prompt, gate.shortest_prompt) is None
    before = gate.shortest_prompt - 1
    assert gate.reason(before, before) is DenseReason.CROSSOVER_LENGTH


def test_pairs_saved_are_counted_query_by_query():
    sparse = SparseFrom(100, 30.0, 1.0, 9)
    for query_len, kv_len in ((50, 200), (150, 200), (200, 200), (5, 200), (60, 90)):
        places = range(max(kv_len - query_len, 100), kv_len - 9)
        saved = sum(place + 0.5 - 30 for place in places)
        assert sparse.saved(query_len, kv_len) == saved
        assert sparse.saved(torch.tensor(query_len), torch.tensor(kv_len)) == saved
    assert SparseFrom(100).shortest_prompt == 101
    exactly = Gate(sparse=sparse._replace(least_saved=sparse.saved(50, 200)))
    assert exactly.reason(50, 200) is None
    assert exactly.reason(49, 200) is DenseReason.SHORT_CHUNK


def test_fewer_heads_need_longer_prompts():
    """While the host starts the sparse kernels, dense attention of few heads is done."""
    config = KVSamplingConfig(num_samples=1024)
    least = [shortest_of(config, num_heads=heads) for heads in (256, 32, 16, 8, 4, 1)]
    assert least == sorted(set(least))
    assert least[3] == shortest_of(config, num_heads=16, head_dim=64)
    assert least[5] == pytest.approx(2 * least[3], rel=0.3)
    selecting = TokenSelectionConfig(crossover="auto")
    longest = break_even_of(selecting, CUDA, 1, 128).min_length
    assert longest > MIN_LENGTH["cuda"]
    assert longest**2 * 128 == pytest.approx(HOST_WORK["cuda"])
    assert sparse_from_of(config, num_heads=1) == sparse_from_of(config, num_heads=256)


def test_dense_heads_leave_less_to_gain():
    config = TokenSelectionConfig(crossover="auto")
    without = break_even_of(config, CUDA, 32, 128)
    quarter, all_of_them = (
        method_of(replace(config, dense_heads=tuple(range(count)))).gate(CUDA, 32, 128)
        for count in (8, 32)
    )
    assert quarter.break_even.fixed_tokens == without.fixed_tokens
    least = max(without.fixed_tokens / 0.75, without.min_length)
    assert quarter.break_even.min_length == pytest.approx(least)
    assert all_of_them.reason(10**7, 10**7) is DenseReason.CROSSOVER_LENGTH


def test_where_the_method_decides_dense_it_costs_under_two_percent():
    measured = times("crossover-h200.json", "graph")
    for name, length, kept in list(measured):
        if name == "crossover/dense":
            dense, ours = measured[name, length, kept], measured["crossover/ours", length, kept]
            assert ours <= max(1.02 * dense, dense + 0.02)
    lengths = {length for name, length, _ in measured if name == "crossover/ours"}
    assert min(lengths) < MIN_LENGTH["cuda"] < max(lengths), "scored and unscored ones"
