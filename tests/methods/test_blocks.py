"""Blocks of queries that sample keys by their past: against the oracle, in chunks and batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from block_checks import (
    On,
    check_chunks,
    check_oracle,
    check_padding,
    check_the_future_changes_nothing,
    past_probes,
)
from support import Problem, causal_attention, checked, make_problem, relative_error
from token_sparse_attention import DenseReason, KVSamplingConfig, token_sparse_attention
from token_sparse_attention.custom_op import aux_text, settings_text
from token_sparse_attention.execution import Execution
from token_sparse_attention.gate import reason_of
from token_sparse_attention.inputs import AuxRequest, Chunk, PastProbes
from token_sparse_attention.methods.probes import blocks_of, find_probes

SMALL = KVSamplingConfig(
    block_size=16, num_probes=4, sliding_window=20, sink_size=2, num_samples=24, dense_queries=0,
    crossover="off",
)  # fmt: skip
CPU, DOUBLE = On(), On(dtype=torch.float64, tolerance=1e-12)


@st.composite
def configs(draw, *, heads=4, crossover="off"):
    size = draw(st.sampled_from([16, 32, 64]))
    return KVSamplingConfig(
        block_size=size,
        num_probes=draw(st.sampled_from([1, 2, 4, 8, 16])),
        sliding_window=size + draw(st.sampled_from([0, 1, 7, size, 3 * size])),
        sink_size=draw(st.sampled_from([0, 1, 3, 40])),
        num_samples=draw(st.sampled_from([0, 1, 7, 20, 64, 400])),
        budget=draw(st.sampled_from(["shared", "per_head"])),
        dense_queries=draw(st.sampled_from([0, 1, 5, 40, 500])),
        dense_heads=tuple(draw(st.sets(st.integers(0, heads - 1), max_size=2))),
        crossover=crossover,
    )


@st.composite
def spans(draw, length):
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


HEADS = st.sampled_from([(1, 1), (3, 1), (4, 1), (4, 2), (7, 1)])


@given(st.data(), st.integers(1, 330), st.floats(0, 1), HEADS, st.integers(0, 99))
def test_the_operator_equals_the_oracle(data, kv_len, share, heads, seed):
    config = data.draw(configs(heads=heads[0]))
    shape = {"heads": heads[0], "kv_heads": heads[1], "kv_len": kv_len, "seed": seed}
    check_oracle(CPU, config, shape | {"query_len": max(round(share * kv_len), 1)})


@example(dataclasses.replace(SMALL, dense_queries=9), 200, {40, 199}, (4, 2))
@given(configs(), st.integers(2, 330), st.sets(st.integers(1, 329), max_size=4), HEADS)
def test_any_split_into_calls_gives_what_one_call_gives(config, length, cuts, heads):
    config = dataclasses.replace(config, dense_heads=())
    cuts = [cut for cut in cuts if cut < length]
    check_chunks(DOUBLE, config, length, cuts, heads=heads[0], kv_heads=heads[1])


@given(configs(), st.integers(2, 330), st.floats(0, 1))
def test_later_tokens_change_no_output_before_them(config, length, share):
    position = min(int(share * length), length - 1)
    check_the_future_changes_nothing(CPU, config, length, position)


@given(st.data(), configs(), st.integers(1, 250), st.floats(0, 1), st.booleans())
def test_companions_and_padding_change_nothing(data, config, length, share, known):
    rows = data.draw(st.lists(spans(length), min_size=1, max_size=4))
    query_len = max(round(share * length), 1)
    on = DOUBLE._replace(tolerance=1e-11)
    check_padding(on, config, length, query_len, rows, known=known)


@pytest.mark.parametrize("sides", [((0, 250), (37, 250)), ((0, 250), (0, 171)), ((9, 240),) * 2])
@pytest.mark.parametrize("query_len", [250, 130])
@pytest.mark.parametrize("known", [False, True])
def test_padded_batches_run_sparse(sides, query_len, known):
    check_padding(DOUBLE, SMALL, 250, query_len, sides, known=known)


def dense_of(problem):
    return causal_attention(*problem, scale=problem.query.shape[-1] ** -0.5)


@pytest.mark.parametrize("block", [2, 5])
@pytest.mark.parametrize("offset", range(16))
def test_half_of_the_probes_is_enough(block, offset):
    """Probes stand at the positions 3, 7, 11 and 15 of a block, and score the next block."""
    first = block * 16 + offset
    problem = make_problem(query_len=160 - first, kv_len=160)
    out, selection, _ = CPU.run(problem, SMALL)
    assert selection.ran_sparse.all()
    dense = dense_of(problem)
    until = 16 * (block + (1 if offset < 12 and (4 - offset // 4) >= 2 else 2))
    error = (out - dense)[0].norm(dim=-1).amax(0)
    assert (error[: until - first] < 1e-5).all(), "the first block runs dense"
    assert (error[until - first + 4 : until - first + 16] > 1e-4).all(), "the next does not"
    assert selection.num_blocks.tolist() == [(160 - until) // 16]


@pytest.mark.parametrize(("first", "end"), [(96, 112), (99, 112), (108, 128), (110, 111)])
def test_a_call_within_its_first_blocks_says_that_probes_are_not_known(first, end):
    problem = make_problem(query_len=end - first, kv_len=end)
    out, selection, _ = CPU.run(problem, SMALL)
    assert reason_of(int(selection.reasons[0])) is DenseReason.NO_PROBES
    assert torch.equal(out, dense_of(problem))
    assert (selection.lengths == end).all()


def test_a_sequence_within_its_first_block_says_so_in_a_batch():
    problem = make_problem(batch=2, query_len=14, kv_len=112)
    mask = torch.ones(2, 112, dtype=torch.bool)
    mask[1, :2] = False  # its queries begin at 96, and its block's probes at 83
    past = past_probes(make_problem(batch=2, query_len=112).query, SMALL, 98, (0, 2))
    past.position[0] = -1
    out, selection, _ = CPU.run(problem, SMALL, mask, Chunk(past))
    assert selection.ran_sparse.tolist() == [False, True]
    assert selection.num_blocks.tolist() == [0, 1]
    assert reason_of(int(selection.reasons[0])) is DenseReason.NO_PROBES
    torch.testing.assert_close(out[0], dense_of(problem)[0])


@pytest.mark.parametrize("known", range(5))
def test_past_probes_that_are_missing_make_a_block_dense(known):
    whole = make_problem(query_len=112)
    problem = whole._replace(query=whole.query[:, :, 96:])
    past = past_probes(whole.query, SMALL, 96)
    of_block = (past.position >= 80).nonzero()[:, 1]
    past.position[:, of_block[known:]] = -1
    out, selection, _ = CPU.run(problem, SMALL, chunk=Chunk(past))
    assert selection.ran_sparse.tolist() == [known >= 2]
    if known == 4:
        expected = CPU.run(whole, SMALL).output[:, :, 96:]
        assert relative_error(out, expected) < 1e-6
    if known < 2:
        assert torch.equal(out, dense_of(problem))


def test_stale_probes_are_not_taken_for_those_of_the_block_before():
    """A caller whose ring was not written since, as after a rewind, has other positions there."""
    whole = make_problem(query_len=160)
    problem = whole._replace(query=whole.query[:, :, 144:])
    stale = past_probes(whole.query, SMALL, 112)
    _, selection, _ = CPU.run(problem, SMALL, chunk=Chunk(stale))
    assert reason_of(int(selection.reasons[0])) is DenseReason.NO_PROBES


def test_rings_of_more_entries_serve_as_well():
    whole = make_problem(query_len=200)
    problem = whole._replace(query=whole.query[:, :, 131:])
    small = past_probes(whole.query, SMALL, 131)
    positions = torch.arange(3, 131, 4)
    large = PastProbes(whole.query[:, :, positions], positions[None])
    runs = [CPU.run(problem, SMALL, chunk=Chunk(past)).output for past in (small, large)]
    assert torch.equal(*runs)
    assert relative_error(runs[0], CPU.run(whole, SMALL).output[:, :, 131:]) < 1e-6


@pytest.mark.parametrize(
    ("first_query", "known", "first"),
    [(131, True, 8), (131, False, 9), (139, False, 9), (140, False, 10)],
)
def test_no_block_lies_before_the_first_query_or_is_known_to_lack_probes(
    first_query, known, first
):
    whole = make_problem(query_len=190)
    chunk = Chunk(past_probes(whole.query, SMALL, first_query) if known else None)
    problem = checked(whole._replace(query=whole.query[:, :, first_query:]))
    blocks = blocks_of(SMALL, problem._replace(chunk=chunk), 32)
    assert (blocks.first, blocks.num_blocks) == (first, 12 - first)


@pytest.mark.parametrize("num_probes", [4, 16])
def test_every_block_has_as_many_probes(num_probes):
    config = dataclasses.replace(SMALL, num_probes=num_probes)
    problem = checked(make_problem(query_len=100))
    blocks = blocks_of(config, problem, 32)
    query, _ = find_probes(problem, blocks)
    positions = [(probe + 1) * blocks.stride + 15 for probe in range(5 * num_probes)]
    assert torch.equal(query, problem.query[:, :, positions])


def test_only_the_end_of_a_prompt_has_dense_queries():
    config = dataclasses.replace(SMALL, dense_queries=21)
    problem = make_problem(query_len=200)
    ends, goes_on = (CPU.run(problem, config, chunk=Chunk(None, end)) for end in (True, False))
    without = CPU.run(problem, SMALL)
    assert torch.equal(goes_on.output, without.output)
    assert torch.equal(goes_on.lse, without.lse)
    dense = dense_of(problem)
    torch.testing.assert_close(ends.output[:, :, -21:], dense[:, :, -21:])
    assert relative_error(goes_on.output[:, :, -21:], dense[:, :, -21:]) > 1e-3
    assert torch.equal(ends.output[:, :, :-21], without.output[:, :, :-21])


@pytest.mark.parametrize("position", [32, 33, 48, 100])
def test_each_row_of_a_padded_batch_begins_to_sample_where_it_does_alone(monkeypatch, position):
    """The crossover counts each row's own tokens."""
    from token_sparse_attention import crossover

    monkeypatch.setattr(crossover, "sparse_from", lambda *_: crossover.SparseFrom(position))
    rows = [(0, 180), (70, 180), (100, 180), (3, 130), (170, 180), (147, 180)]
    problem = make_problem(batch=len(rows), query_len=180)
    mask = torch.zeros(len(rows), 180, dtype=torch.bool)
    for number, (start, end) in enumerate(rows):
        mask[number, start:end] = True
    begin = -(-position // 16) * 16
    dense = make_problem(batch=len(rows), query_len=180)
    out, selection, _ = CPU.run(problem, SMALL, mask)
    reasons = [reason_of(int(code)) for code in selection.reasons]
    for number, (start, end) in enumerate(rows):
        alone = Problem(*(x[number : number + 1, :, start:end] for x in dense))
        error = (out[number, :, start:end] - dense_of(alone)[0]).norm(dim=-1).amax(0)
        assert (error[:begin] < 1e-5).all()
        if end - start <= begin:
            few = end - start < 20
            short = DenseReason.SHORT_CHUNK if few else DenseReason.CROSSOVER_LENGTH
            assert reasons[number] in (short, DenseReason.SHORT_CONTEXT)
            assert not selection.ran_sparse[number]
        else:
            assert reasons[number] is None
            assert (error[begin + 8 : begin + 16] > 1e-4).all()
    check_padding(DOUBLE, SMALL, 180, 180, rows, known=False)
    check_padding(DOUBLE, SMALL, 180, 90, rows, known=True)


def a_chunk():
    whole = make_problem(batch=2, query_len=150)
    past = past_probes(whole.query, SMALL, 90, (0, 0))
    past = past._replace(query=past.query.nan_to_num())
    return whole._replace(query=whole.query[:, :, 90:]), past


@pytest.mark.parametrize("ends_prompt", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_chunk_is_traced_into_one_graph(ends_prompt, padded):
    torch.compiler.reset()
    config = dataclasses.replace(SMALL, dense_queries=9)
    problem, past = a_chunk()
    mask = torch.ones(2, 150, dtype=torch.bool) if padded else None

    def call(query, key, value, probes, position):
        chunk = Chunk(PastProbes(probes * 1, position), ends_prompt)
        return token_sparse_attention(
            query * 1, key, value, config, chunk=chunk, padding_mask=mask
        )

    compiled = torch.compile(call, backend="eager", fullgraph=True)(*problem, *past)
    assert torch.equal(compiled, call(*problem, *past))


@pytest.mark.parametrize("ends_prompt", [False, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_opcheck_of_a_chunk(ends_prompt, impl):
    problem, past = a_chunk()
    settings = settings_text(Execution(impl).text, SMALL.text)
    aux = aux_text(AuxRequest(True, True, True), Chunk(None, ends_prompt))
    arguments = (*problem, None, list(past), settings, 0.25, aux)
    torch.library.opcheck(torch.ops.token_sparse_attention.prefill.default, arguments)


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (None, TypeError, "chunk must be a Chunk, got NoneType"),
        (Chunk((1, 2)), TypeError, "past_probes must be a PastProbes or None, got tuple"),
        (
            Chunk(PastProbes(torch.zeros(1, 4, 8, 16), torch.zeros(1, 7).long())),
            ValueError,
            r"past_probes.query must be torch.float32 of shape .* = \[1, 4, 7, 16\], R at",
        ),
        (
            Chunk(PastProbes(torch.zeros(1, 4, 8, 16), torch.zeros(1, 8).int())),
            ValueError,
            r"past_probes.position must be int64 of shape \[B, R\] = \[1, R\], got torch.int32",
        ),
        (
            Chunk(PastProbes(torch.zeros(1, 4, 8, 16).half(), torch.zeros(1, 8).long())),
            ValueError,
            "past_probes.query must be torch.float32 of shape .* got torch.float16",
        ),
        (
            Chunk(PastProbes(torch.zeros(1, 4, 0, 16), torch.zeros(1, 0).long())),
            ValueError,
            "R at least 1",
        ),
    ],
)
def test_bad_chunks_are_named(chunk, error, message):
    with pytest.raises(error, match=message):
        token_sparse_attention(*make_problem(query_len=60), SMALL, chunk=chunk)
