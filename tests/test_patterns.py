"""Token sparsity and a block-sparse pattern together: the pattern on the compressed order."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attention.by_hand import HEADS, LITTLE, by_hand
from support import (
    SAMPLING,
    SMALL,
    WITH_LSE,
    Problem,
    kept_mask,
    make_problem,
    relative_error,
    with_selection,
)
from token_sparse_attention import Execution, token_sparse_attention
from token_sparse_attention.attention.names import parse_backend
from token_sparse_attention.attention.patterns import (
    FlexPrefillConfig,
    MInferenceConfig,
    StreamingConfig,
    XAttentionConfig,
)
from token_sparse_attention.attention.resolve import resolve_backend

EVERYTHING = {
    "flexprefill": FlexPrefillConfig(gamma=1.0),
    "minference": MInferenceConfig(vertical_size=5000, slash_size=5000),
    "xattention": XAttentionConfig(threshold=1.0),
    "streaming": StreamingConfig(local_size=5000),
}
SCALE = 0.25
PER_HEAD = dataclasses.replace(SMALL, budget="per_head")
WINDOW = {"fallback": "window", "sliding_window": 20}


def by(pattern):
    return Execution(attention_backend=pattern)


@pytest.mark.parametrize("fallback", [{}, WINDOW], ids=["zero", "window"])
@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("past", [0, 333])
@pytest.mark.parametrize("pattern", LITTLE.values(), ids=LITTLE)
def test_a_pattern_acts_on_the_compressed_order(pattern, past, budget, fallback):
    settings = dataclasses.replace(SMALL, budget=budget, **fallback)
    problem = make_problem(query_len=1000 - past, kv_len=1000)
    plain, dense = with_selection(problem, settings)
    out, selection = with_selection(problem, settings, execution=by(pattern))
    assert selection.ran_sparse.all()
    assert torch.equal(selection.indices, dense.indices), "patterns do not select tokens"
    if budget == "per_head":
        assert len(set(selection.lengths[0].tolist())) > 1
    kept = kept_mask(selection.indices, 1000)[0]
    expected = by_hand(problem, kept, pattern, plain, SCALE)
    assert relative_error(out[0], expected) < 1e-6
    assert relative_error(out[0], plain[0]) > 1e-2, "the pattern must leave something out"


def test_heads_keep_their_own_settings():
    problem = make_problem(heads=2, kv_heads=1, query_len=600)
    for settings in (SMALL, PER_HEAD):
        plain, selection = with_selection(problem, settings)
        out = token_sparse_attention(*problem, settings, execution=by(HEADS))
        kept = kept_mask(selection.indices, 600)[0]
        assert relative_error(out[0], by_hand(problem, kept, HEADS, plain, SCALE)) < 1e-6
        twice = [tensor.expand(2, -1, -1, -1) for tensor in problem]
        both = token_sparse_attention(*twice, settings, execution=by(HEADS))
        torch.testing.assert_close(both, out.expand(2, -1, -1, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [SMALL, PER_HEAD, SAMPLING], ids=["shared", "per_head", "sampling"]
)
@pytest.mark.parametrize("query_len", [700, 401, 90, 17])
@pytest.mark.parametrize("pattern", EVERYTHING.values(), ids=EVERYTHING)
def test_a_pattern_that_keeps_everything_changes_nothing(pattern, query_len, settings):
    problem = make_problem(query_len=query_len, kv_len=max(query_len, 401))
    plain, _, plain_lse = token_sparse_attention(*problem, settings, return_aux=WITH_LSE)
    out, _, lse = token_sparse_attention(
        *problem, settings, execution=by(pattern), return_aux=WITH_LSE
    )
    assert relative_error(out, plain) < 1e-6
    torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", LITTLE.values(), ids=LITTLE)
def test_sequences_that_run_dense_go_through_the_pattern(pattern):
    problem = make_problem(query_len=500)
    settings = dataclasses.replace(SMALL, drop_mass=0.0)
    out = token_sparse_attention(*problem, settings, execution=by(pattern))
    everything = torch.ones(4, 500, dtype=torch.bool)
    expected = by_hand(problem, everything, pattern, out, SCALE)
    assert relative_error(out[0], expected) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [dataclasses.replace(SMALL, **WINDOW), dataclasses.replace(SAMPLING, sliding_window=20)],
    ids=["selection", "sampling"],
)
@pytest.mark.parametrize("pattern", LITTLE.values(), ids=LITTLE)
def test_last_queries_are_dense_with_a_pattern(pattern, settings):
    problem = make_problem(query_len=500, kv_len=600)
    without = token_sparse_attention(*problem, settings, execution=by(pattern))
    settings = dataclasses.replace(settings, dense_queries=40)
    out = token_sparse_attention(*problem, settings, execution=by(pattern))
    dense = resolve_backend("auto", problem.query, problem.key).attend(*problem, scale=SCALE).out
    assert relative_error(out[:, :, -40:], dense[:, :, -40:]) < 1e-6
    assert relative_error(without[:, :, -40:], dense[:, :, -40:]) > 1e-2
    assert torch.equal(out[:, :, :-40], without[:, :, :-40])


@pytest.mark.parametrize("settings", [SMALL, dataclasses.replace(PER_HEAD, **WINDOW)])
@pytest.mark.parametrize("pattern", LITTLE.values(), ids=LITTLE)
def test_a_sequence_of_a_padded_batch_gives_what_it_gives_alone(pattern, settings):
    settings = dataclasses.replace(settings, min_tokens=430)
    problem = make_problem(batch=4, query_len=550, kv_len=700)
    mask = torch.ones(4, 700, dtype=torch.bool)
    mask[1, :33] = False
    mask[2, 671:] = False
    mask[3, :260] = False  # too short to run sparse, long enough to leave blocks out
    for tensor, first in zip(problem, (150, 0, 0)):
        tensor.masked_fill_(~mask[:, None, first:, None], torch.nan)
    out, selection = with_selection(problem, settings, padding_mask=mask, execution=by(pattern))
    assert selection.ran_sparse.tolist() == [True, True, True, False]
    for number in range(4):
        first, last = mask[number].nonzero().flatten()[[0, -1]].tolist()
        begin, end = max(first - 150, 0), last + 1 - 150
        alone = Problem(
            problem.query[number : number + 1, :, begin:end],
            problem.key[number : number + 1, :, first : last + 1],
            problem.value[number : number + 1, :, first : last + 1],
        )
        expected = token_sparse_attention(*alone, settings, execution=by(pattern))[0]
        torch.testing.assert_close(out[number, :, begin:end], expected, rtol=1e-5, atol=1e-6)
        assert not out[number, :, :begin].any()
        assert not out[number, :, end:].any()


@pytest.mark.parametrize("pattern", [*LITTLE.values(), HEADS])
def test_traced_into_one_graph_it_gives_the_same(pattern):
    problem = make_problem(heads=2, kv_heads=1, query_len=300)
    backend = parse_backend(pattern)

    def call(query, key, value):
        return token_sparse_attention(query * 1, key, value, SMALL, execution=by(backend))

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*problem), call(*problem))


def test_what_cannot_be_traced_or_run_is_named():
    problem = make_problem(query_len=300)

    def call(backend):
        return token_sparse_attention(*problem, SMALL, execution=by(backend))

    traced = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"must be text where torch\.compile traces it"):
        traced(FlexPrefillConfig(gamma=0.9))
    with pytest.raises(ValueError, match="did you mean 'flexprefill'"):
        traced("flexprefil")
    with pytest.raises(ValueError, match="did you mean 'flexprefill'"):
        call("flexprefil")
    with pytest.raises(ValueError, match="each of the 4 query heads, got 2"):
        call(HEADS)
