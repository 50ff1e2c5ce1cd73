"""The operator as one of PyTorch's: what compilers may assume of it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from support import SAMPLING, SMALL, make_problem
from token_sparse_attention import AuxRequest, Execution, functional, token_sparse_attention
from token_sparse_attention.custom_op import aux_text, settings_text
from token_sparse_attention.inputs import Chunk

WANTS = [
    AuxRequest(selection, indices, lse)
    for selection, indices, lse in itertools.product((False, True), repeat=3)
    if selection or indices
]
WINDOWED = dataclasses.replace(
    SMALL, fallback="window", sliding_window=40, dense_queries=11, keep_ratio=0.25
)
HEADS = dataclasses.replace(SAMPLING, sliding_window=20, sink_size=3, dense_heads=(1, 2))
CONFIGS = pytest.mark.parametrize(
    "config", [SMALL, WINDOWED, HEADS], ids=["selected", "windowed", "dense heads"]
)


@pytest.mark.parametrize("wants", WANTS)
@pytest.mark.parametrize("padded", [False, True])
@CONFIGS
def test_opcheck(wants, padded, config):
    problem = make_problem(batch=2, query_len=90, kv_len=120)
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[1, :20] = False
    settings = settings_text(Execution().text, config.text)
    aux = aux_text(wants, Chunk())
    arguments = (*problem, mask if padded else None, [], settings, 0.3, aux)
    torch.library.opcheck(torch.ops.token_sparse_attention.prefill.default, arguments)


@pytest.mark.parametrize("backend", ["auto", "flexprefill"])
def test_settings_travel_as_one_line(backend):
    """Generated code holds them between quotes."""
    text = settings_text(Execution("auto", backend).text, HEADS.text)
    assert text.isprintable()


def test_an_eager_call_takes_no_way_around_by_the_dispatcher(monkeypatch):
    monkeypatch.setattr(functional, "call_operator", None)
    token_sparse_attention(*make_problem(), SMALL)


@CONFIGS
@pytest.mark.parametrize("wants", WANTS)
def test_traced_into_one_graph_it_gives_the_same(wants, config):
    torch.compiler.reset()
    problem = make_problem(query_len=120)

    def call(query, key, value):
        return token_sparse_attention(query * 1, key, value, config, return_aux=wants)

    compiled = torch.compile(call, backend="eager", fullgraph=True)(*problem)
    eager = call(*problem)
    assert torch.equal(compiled.output, eager.output)
    if wants.selection:
        mine, theirs = compiled.selection, eager.selection
        kept = theirs.indices.shape[2]
        assert torch.equal(mine.indices[..., :kept], theirs.indices)
        assert (mine.indices[..., kept:] == -1).all(), "room for every slot"
        assert mine.indices.shape[2] == (120 if wants.indices else 0)
        assert torch.equal(mine.lengths, theirs.lengths)
        assert torch.equal(mine.ran_sparse, theirs.ran_sparse)
        assert torch.equal(mine.reasons, theirs.reasons)
        assert mine.kv_len == theirs.kv_len
    else:
        assert compiled.selection is None
    if wants.lse:
        assert torch.equal(compiled.lse, eager.lse)
    else:
        assert compiled.lse is None


def test_traced_without_anything_more_it_gives_the_output():
    torch.compiler.reset()
    problem = make_problem(query_len=120)

    def call(query, key, value):
        return token_sparse_attention(query * 1, key, value, HEADS)

    compiled = torch.compile(call, backend="eager", fullgraph=True)(*problem)
    assert torch.equal(compiled, call(*problem))


def test_views_keep_their_layout():
    problem = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_problem(query_len=120)]
    out = token_sparse_attention(*problem, SMALL)
    assert out.stride() == problem[0].stride()


@CONFIGS
def test_tensors_without_data_have_an_output_without_data(config):
    problem = [tensor.to("meta") for tensor in make_problem(query_len=90, kv_len=120)]
    out = token_sparse_attention(*problem, config, return_aux=AuxRequest(lse=True))
    assert out.output.is_meta
    assert out.output.shape == problem[0].shape
    assert out.lse.shape == problem[0].shape[:3]


@pytest.mark.filterwarnings("ignore")
@CONFIGS
def test_a_trace_holds_the_operator(config):
    problem = make_problem(query_len=90, kv_len=120)

    def call(*tensors):
        return token_sparse_attention(*tensors, config)

    traced = torch.jit.trace(call, problem, check_trace=False)
    assert torch.equal(traced(*problem), call(*problem))
