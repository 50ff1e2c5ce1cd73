"""Heads split over processes: every rank decides as one process with all heads does."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from support import SAMPLING, SMALL, WITH_SELECTION, Problem, make_problem
from token_sparse_attention import (
    Execution,
    SparseConfig,
    score_tokens,
    select_tokens,
    token_sparse_attention,
)

RANKS = 2
PER_HEAD = dataclasses.replace(SMALL, budget="per_head")
SAMPLED = dataclasses.replace(SAMPLING, budget="per_head", num_samples=20)


class Case(NamedTuple):
    """A problem of all heads, and how it is called."""

    config: SparseConfig = SMALL
    batch: int = 1
    query_len: int = 111
    kv_len: int | None = None
    padded: bool = False
    broken: int | None = None  # this query head is NaN in the last sequence
    uniform: int | None = None  # these first heads attend evenly, so they drop little
    on_device: bool = False  # the kernels, slow without a GPU, select as well

    def problem(self) -> Problem:
        problem = make_problem(
            batch=self.batch, heads=8, kv_heads=4, query_len=self.query_len, kv_len=self.kv_len
        )
        if self.uniform is not None:
            problem.query[:, : self.uniform] *= 0.001
        if self.broken is not None:
            problem.query[-1, self.broken] = torch.nan
        return problem

    def options(self) -> dict:
        mask = None
        if self.padded:
            mask = torch.ones(self.batch, self.kv_len or self.query_len, dtype=torch.bool)
            mask[0, :30] = False
        return {"padding_mask": mask, "return_aux": WITH_SELECTION}


CASES = {
    "shared": Case(on_device=True),
    "per head": Case(PER_HEAD),
    "windowed": Case(dataclasses.replace(PER_HEAD, fallback="window", sliding_window=9)),
    "sampling": Case(SAMPLED, batch=2, padded=True),
    "sampling, one rank's heads are not finite": Case(SAMPLED, batch=2, broken=6),
    "padded": Case(batch=2, padded=True, on_device=True),
    "padded, per head": Case(PER_HEAD, batch=2, padded=True),
    "chunk": Case(query_len=40, kv_len=130),
    "short chunk": Case(query_len=9, kv_len=130),
    "kept": Case(dataclasses.replace(SMALL, keep_ratio=0.4)),
    "one rank's heads are not finite": Case(batch=2, broken=6, on_device=True),
    "one rank's heads are not finite, per head": Case(PER_HEAD, batch=2, broken=6),
    "one rank drops nothing": Case(
        dataclasses.replace(PER_HEAD, drop_mass=0.002), uniform=4, query_len=240, on_device=True
    ),
    "one rank drops much": Case(uniform=4),
}


def select(case: Case, query, key, impl: str, tp_group=None):
    """The stages that decide, alone."""
    options = {"padding_mask": case.options()["padding_mask"]}
    window = case.config.observation_window
    scores = score_tokens(query, key, window, impl="reference", **options)
    return select_tokens(scores, case.config, impl=impl, tp_group=tp_group, **options)


def run_rank(rank: int, folder: str) -> None:
    """Run every case on this rank's heads, and save what came out."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    execution = Execution(tp_group=dist.group.WORLD)
    results = {}
    for name, case in CASES.items():
        query, key, value = (
            tensor.chunk(RANKS, dim=1)[rank].contiguous() for tensor in case.problem()
        )
        results[name] = token_sparse_attention(
            query, key, value, case.config, execution=execution, **case.options()
        )
        if case.on_device:
            results[name, "triton"] = select(case, query, key, "triton", dist.group.WORLD)
    scores = torch.rand(1, 8, 90, generator=torch.Generator().manual_seed(0))
    results["select_tokens"] = select_tokens(
        scores.chunk(RANKS, dim=1)[rank], SMALL, tp_group=dist.group.WORLD
    )

    @torch.compile(backend="eager")
    def compiled(query, key, value):
        out = token_sparse_attention(query, key, value, SMALL, execution=execution)
        return out + 1

    problem = (
        tensor.chunk(RANKS, dim=1)[rank].contiguous() for tensor in CASES["shared"].problem()
    )
    results["compiled"] = compiled(*problem)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(run_rank, (folder,), nprocs=RANKS)
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def joined(parts):
    return torch.cat(parts, dim=1)


def assert_same_decisions(parts, expected):
    for mine in parts:
        assert torch.equal(mine.ran_sparse, expected.ran_sparse)
        assert torch.equal(mine.reasons, expected.reasons)
    assert torch.equal(joined([mine.lengths for mine in parts]), expected.lengths)


@pytest.mark.parametrize("name", CASES)
def test_ranks_select_as_one_process_does(ranks, name):
    case = CASES[name]
    out, selection, _ = token_sparse_attention(*case.problem(), case.config, **case.options())
    outs, selections, _ = zip(*(rank[name] for rank in ranks))
    assert_same_decisions(selections, selection)
    torch.testing.assert_close(joined(outs), out, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on_device])
def test_kernels_on_ranks_select_as_one_process_does(ranks, name):
    case = CASES[name]
    expected = select(case, *case.problem()[:2], "reference")
    parts = [rank[name, "triton"] for rank in ranks]
    assert_same_decisions(parts, expected)
    length = int(expected.lengths.max())
    indices = joined([part.indices for part in parts])
    assert torch.equal(indices[..., :length], expected.indices[..., :length])


def test_the_cases_tell_ranks_apart():
    """Without an exchange, the ranks would decide otherwise than one process."""

    def alone(case: Case) -> list:
        parts = zip(*(tensor.chunk(RANKS, dim=1) for tensor in case.problem()))
        return [
            token_sparse_attention(*(x.contiguous() for x in part), case.config, **case.options())[
                1
            ]
            for part in parts
        ]

    kept = [
        selection.lengths.unique().tolist() for selection in alone(CASES["one rank drops much"])
    ]
    assert kept[0] != kept[1]
    for name in ("one rank's heads are not finite", "one rank drops nothing"):
        first, second = (selection.ran_sparse for selection in alone(CASES[name]))
        assert not torch.equal(first, second), name


def test_scores_split_over_ranks_are_selected_from_alike(ranks):
    scores = torch.rand(1, 8, 90, generator=torch.Generator().manual_seed(0))
    selection = select_tokens(scores, SMALL)
    mine = [rank["select_tokens"] for rank in ranks]
    assert torch.equal(joined([part.lengths for part in mine]), selection.lengths)
    indices = joined([part.indices for part in mine])
    assert torch.equal(indices, selection.indices)


def test_a_compiled_function_may_call_it(ranks):
    expected = [rank["shared"][0] + 1 for rank in ranks]
    assert all(torch.equal(rank["compiled"], one) for rank, one in zip(ranks, expected))


def test_a_tp_group_is_a_process_group():
    with pytest.raises(TypeError, match="tp_group must be a"):
        Execution(tp_group=2)
    with pytest.raises(TypeError, match="tp_group must be a"):
        select_tokens(torch.rand(1, 8, 90), SMALL, tp_group=2)
