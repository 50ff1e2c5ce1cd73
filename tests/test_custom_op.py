"""The operator as one of PyTorch's: what compilers may assume of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support import SMALL, make_problem
from token_sparse_attention import token_sparse_attention

WANTS = [(selection, lse) for selection in (False, True, "lengths") for lse in (False, True)]


@pytest.mark.parametrize("wants", WANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(wants, padded):
    problem = make_problem(batch=2, query_len=90, kv_len=120)
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[1, :20] = False
    arguments = (
        *problem, mask if padded else None, 0.3, 16, 5, 24, "shared", True, 11, (), "window", 40,
        3, 4, 9, "off", 0.25, "auto", "auto", None, None,
        bool(wants[0]), wants[0] is True, wants[1],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.token_sparse_attention.prefill.default, arguments)


HEADS = dataclasses.replace(
    SMALL, drop_mass=None, select_queries=False, fallback="window", fallback_window=20,
    fallback_samples=15, dense_heads=(1, 2),
)  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, HEADS], ids=["selected", "dense heads"])
@pytest.mark.parametrize("wants", WANTS)
def test_traced_into_one_graph_it_gives_the_same(wants, config):
    torch.compiler.reset()
    problem = make_problem(query_len=120)
    options = {"return_selection": wants[0], "return_lse": wants[1]}

    def call(query, key, value):
        return token_sparse_attention(query * 1, key, value, config, **options)

    compiled = torch.compile(call, backend="eager", fullgraph=True)(*problem)
    eager = call(*problem)
    if not any(wants):
        compiled, eager = (compiled,), (eager,)
    assert torch.equal(compiled[0], eager[0])
    if wants[0]:
        kept = eager[1].indices.shape[2]
        assert torch.equal(compiled[1].indices[..., :kept], eager[1].indices)
        assert (compiled[1].indices[..., kept:] == -1).all(), "room for every slot"
        assert compiled[1].indices.shape[2] == (120 if wants[0] is True else 0)
        assert torch.equal(compiled[1].lengths, eager[1].lengths)
        assert torch.equal(compiled[1].ran_sparse, eager[1].ran_sparse)
    if wants[1]:
        assert torch.equal(compiled[-1], eager[-1])


def test_views_keep_their_layout():
    problem = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_problem(query_len=120)]
    out = token_sparse_attention(*problem, SMALL)
    assert out.stride() == problem[0].stride()
