"""Why something runs dense: one answer, on the host and on the device, per sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import SAMPLING, SMALL, WITH_SELECTION, Problem, make_problem, with_selection
from token_sparse_attention import (
    DenseReason,
    Execution,
    KVSamplingConfig,
    TokenSelectionConfig,
    crossover,
    token_sparse_attention,
)
from token_sparse_attention.crossover import ALL_SPARSE, NEVER_DENSE, BreakEven, SparseFrom
from token_sparse_attention.gate import Gate, reason_of
from token_sparse_attention.methods import method_of
from token_sparse_attention.methods.base import Method

CPU = torch.device("cpu")


def gate_of(config):
    return method_of(config).gate(CPU, 8, 64)


def test_every_reason_has_a_code_of_its_own():
    codes = [reason.code for reason in DenseReason]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes
    assert reason_of(0) is None
    assert [reason_of(code) for code in codes] == list(DenseReason)
    assert str(DenseReason.DECODE) == "decode step"


def test_reasons_of_lengths_for_selection():
    gate = gate_of(TokenSelectionConfig(observation_window=8, min_tokens=20))
    assert gate.reason(7, 100) is DenseReason.SHORT_CHUNK
    assert gate.reason(28, 28) is DenseReason.SHORT_CONTEXT
    assert gate.reason(29, 29) is None
    zero = gate_of(TokenSelectionConfig(drop_mass=0))
    assert zero.reason(9000, 9000) is DenseReason.ZERO_DROP_MASS
    kept = gate_of(TokenSelectionConfig(observation_window=8, drop_mass=0, keep_ratio=0.5))
    assert kept.reason(8, 9) is None
    assert kept.reason(8, 8) is DenseReason.SHORT_CONTEXT


def test_reasons_of_lengths_for_sampling():
    config = dataclasses.replace(SAMPLING, sliding_window=20, sink_size=4)
    gate = gate_of(config)
    assert gate.reason(1, 100) is None
    assert gate.reason(16, 16) is DenseReason.SHORT_CONTEXT
    assert gate.reason(17, 17) is None, "block 1 leaves the keys 4 to 11 behind"
    wide = gate_of(dataclasses.replace(config, sink_size=12))
    assert wide.reason(32, 32) is DenseReason.SHORT_CONTEXT, "block 1 leaves sinks behind alone"
    assert wide.reason(33, 33) is None
    auto = gate_of(dataclasses.replace(config, crossover="auto"))
    assert auto.sparse.position % 16 == 0
    assert auto.reason(1000, 1000) is DenseReason.CROSSOVER_LENGTH
    assert auto.reason(auto.sparse.position, auto.sparse.position) is DenseReason.CROSSOVER_LENGTH
    assert auto.reason(10**6, 10**6) is None
    assert auto.reason(1, 10**5) is DenseReason.SHORT_CHUNK
    assert auto.reason(512, 10**5) is None
    assert auto.shortest_prompt > auto.sparse.position
    assert auto.reason(auto.shortest_prompt, auto.shortest_prompt) is None


gates = st.builds(
    Gate,
    st.integers(0, 200) | st.just(10**25),
    st.integers(0, 400) | st.just(10**25),
    st.none() | st.just(DenseReason.ZERO_DROP_MASS),
    st.just(NEVER_DENSE)
    | st.builds(BreakEven, st.floats(0, 800), st.just(1.0), st.floats(0, 100)),
    st.just(ALL_SPARSE)
    | st.builds(
        SparseFrom, st.integers(0, 400), st.floats(0, 400), st.floats(0, 1e5), st.integers(0, 90)
    )
    | st.just(SparseFrom(10**25, 1.5e25)),
)
lengths = st.tuples(st.integers(0, 500), st.integers(0, 500)).map(
    lambda pair: (pair[0], pair[0] + pair[1] or 1)
)


@given(gates, st.lists(lengths, min_size=1, max_size=20), st.sampled_from(["int32", "int64"]))
def test_host_and_device_give_one_reason(gate, pairs, dtype):
    query_lens, kv_lens = torch.tensor(pairs, dtype=getattr(torch, dtype)).unbind(-1)
    codes = gate.codes(query_lens, kv_lens)
    assert codes.dtype == torch.int32
    assert [reason_of(code) for code in codes.tolist()] == [gate.reason(*pair) for pair in pairs]


@given(
    st.sampled_from(
        [
            TokenSelectionConfig(observation_window=9, min_tokens=30),
            TokenSelectionConfig(crossover="auto", fallback="window"),
            KVSamplingConfig(block_size=32, sliding_window=50, crossover="off"),
            KVSamplingConfig(num_samples=1000),
        ]
    ),
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 200_000)), min_size=1, max_size=20),
)
def test_the_gates_of_the_methods_agree_with_themselves(config, pairs):
    pairs = [(queries, queries + past or 1) for queries, past in pairs]
    gate = gate_of(config)
    codes = gate.codes(*torch.tensor(pairs, dtype=torch.int32).unbind(-1))
    assert [reason_of(code) for code in codes.tolist()] == [gate.reason(*pair) for pair in pairs]


def test_codes_do_not_depend_on_the_default_dtype():
    gate = Gate(break_even=BreakEven(131071.0, 1.0, 0.0))
    lens = torch.tensor([131070, 131071, 131072], dtype=torch.int32)
    torch.set_default_dtype(torch.float16)
    try:
        codes = gate.codes(lens, lens)
    finally:
        torch.set_default_dtype(torch.float32)
    short = DenseReason.CROSSOVER_LENGTH.code
    assert codes.tolist() == [short, 0, 0]


IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


@IMPLS
@pytest.mark.parametrize("query_len", [150, 90])
@pytest.mark.parametrize("config", [SMALL, SAMPLING], ids=["selection", "sampling"])
def test_each_sequence_of_a_batch_says_why_as_it_does_alone(monkeypatch, config, query_len, impl):
    """The crossover too decides for each sequence by its own lengths."""
    monkeypatch.setitem(crossover.MIN_LENGTH, "cpu", 90)
    sparse_from = crossover.SparseFrom(90, 45.0, 300.0, config.dense_queries)
    monkeypatch.setattr(crossover, "sparse_from", lambda *_: sparse_from)
    monkeypatch.setitem(crossover.WINDOW_TOKENS, "cpu", (0.0, 0.0))
    monkeypatch.setitem(crossover.OVERHEAD_TOKENS, "cpu", 1.0)
    config = dataclasses.replace(config, crossover="auto")
    problem = make_problem(batch=5, heads=2, kv_heads=1, query_len=query_len, kv_len=150)
    mask = torch.zeros(5, 150, dtype=torch.bool)
    spans = [(0, 150), (80, 150), (0, 62), (0, 140), (142, 150)]
    for number, (start, end) in enumerate(spans):
        mask[number, start:end] = True
    execution = Execution(impl)
    out, selection = with_selection(problem, config, padding_mask=mask, execution=execution)
    for number, (start, end) in enumerate(spans):
        begin = max(start, 150 - query_len)
        if begin >= end:
            continue
        queries = slice(begin - (150 - query_len), end - (150 - query_len))
        alone = Problem(
            problem.query[number : number + 1, :, queries],
            problem.key[number : number + 1, :, start:end],
            problem.value[number : number + 1, :, start:end],
        )
        expected, theirs = with_selection(alone, config, execution=execution)
        assert selection.reasons[number] == theirs.reasons[0]
        assert selection.ran_sparse[number] == theirs.ran_sparse[0]
        assert torch.equal(selection.lengths[number], theirs.lengths[0])
        torch.testing.assert_close(out[number, :, queries], expected[0], rtol=1e-5, atol=1e-5)
    if query_len == 150:
        reasons = [reason_of(code) for code in selection.reasons.tolist()]
        assert reasons[0] is reasons[3] is None
        assert reasons[1] is reasons[2] is DenseReason.CROSSOVER_LENGTH
        sampling = isinstance(config, KVSamplingConfig)  # says first that a prompt is short
        assert reasons[4] is (DenseReason.SHORT_CONTEXT if sampling else DenseReason.SHORT_CHUNK)


@IMPLS
def test_reasons_that_scores_give(impl):
    problem = make_problem(batch=3, heads=2, kv_heads=1, query_len=150)
    problem.query[1] = 0  # uniform attention: every token has the same mass
    problem.query[2, 0, -3] = torch.nan
    config = dataclasses.replace(SMALL, drop_mass=0.004)
    result = token_sparse_attention(
        *problem, config, execution=Execution(impl), return_aux=WITH_SELECTION
    )
    reasons = [reason_of(code) for code in result.selection.reasons.tolist()]
    assert reasons == [None, DenseReason.NOTHING_TO_DROP, DenseReason.SCORES_NOT_FINITE]
    _, sampled = with_selection(problem, SAMPLING, execution=Execution(impl))
    assert not sampled.reasons.any(), "blocks, and no sequences, lack finite scores"


def test_the_base_methods_gate_runs_everything_sparse():
    assert Method.gate(method_of(SAMPLING), CPU, 8, 64).reason(1, 1) is None
