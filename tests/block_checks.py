"""What holds for sampling by blocks on every device: checks that the tests of each call."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from support import WITH_BOTH, Problem, kept_mask, make_problem, oracle, relative_error
from token_sparse_attention import Execution, KVSamplingConfig, token_sparse_attention
from token_sparse_attention.inputs import Chunk, PastProbes
from token_sparse_attention.results import SparseOutput

WHOLE = Chunk()


class On(NamedTuple):
    """Where and how exactly the operator runs.

    Attributes:
        device: of the tensors.
        impl: which code.
        dtype: of the tensors.
        tolerance: relative error that rounding may cause.
        exact: whether the kernels give a row the same bits whatever it is attended with.
    """

    device: str = "cpu"
    impl: str = "reference"
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    exact: bool = False

    def problem(self, **shape: int) -> Problem:
        """Random inputs."""
        return make_problem(**shape, device=self.device, dtype=self.dtype)

    def run(
        self,
        problem: Problem,
        config: KVSamplingConfig,
        mask: Tensor | None = None,
        chunk: Chunk = WHOLE,
    ) -> SparseOutput:
        """The operator's output, its selection and its log-sum-exp."""
        execution = Execution(self.impl)
        return token_sparse_attention(
            *problem, config, padding_mask=mask, chunk=chunk, execution=execution,
            return_aux=WITH_BOTH,
        )  # fmt: skip

    def assert_same(self, out: Tensor, expected: Tensor) -> None:
        """Raise unless two ways to the same numbers agree."""
        assert out.shape == expected.shape
        if self.exact:
            assert torch.equal(out, expected)
        elif out.numel():
            assert relative_error(out, expected) < self.tolerance


def past_probes(
    query: Tensor, config: KVSamplingConfig, until: int, starts: Sequence[int] = (0,)
) -> PastProbes:
    """What a caller keeps of the queries in slots before `until`, entry ``t % R`` for probe t.

    Args:
        query: ``[B, H, S, D]``, all queries of the prompts.
        config: the settings.
        until: the slot where the next call begins.
        starts: the slot of each sequence's first token.
    """
    stride, room = config.block_size // config.num_probes, 2 * config.num_probes
    kept = query.new_full((len(query), query.shape[1], room, query.shape[3]), torch.nan)
    position = torch.full((len(query), room), -1, device=query.device)
    for number, start in enumerate(starts):
        for at in range(stride - 1, until - start, stride):
            entry = at // stride % room
            kept[number, :, entry] = query[number, :, start + at]
            position[number, entry] = at
    return PastProbes(kept, position)


def check_oracle(on: On, config: KVSamplingConfig, shape: dict[str, int]) -> None:
    """The call, alone and with the probes of earlier calls, is the oracle's."""
    whole = on.problem(**shape | {"query_len": shape["kv_len"]})
    first = shape["kv_len"] - shape["query_len"]
    problem = whole._replace(query=whole.query[:, :, first:])
    for known in (False, True) if first else (False,):
        chunk = Chunk(past_probes(whole.query, config, first) if known else None)
        out, selection, lse = on.run(problem, config, chunk=chunk)
        past = whole.query[0, :, :first] if known else None
        expected, keep = oracle(problem, config, past_query=past)
        assert selection.ran_sparse.tolist() == [keep is not None]
        assert lse.isfinite().all()
        if keep is not None:
            assert torch.equal(kept_mask(selection.indices, shape["kv_len"])[0], keep)
        assert relative_error(out[0], expected) < on.tolerance


def check_chunks(
    on: On, config: KVSamplingConfig, length: int, cuts: Sequence[int], **shape: int
) -> None:
    """Calls that each continue the prompt give what one call gives."""
    problem = on.problem(query_len=length, **shape)
    expected = on.run(problem, config)
    parts: list[SparseOutput] = []
    edges = [0, *sorted(cuts), length]
    for begin, end in itertools.pairwise(edges):
        part = Problem(problem.query[:, :, begin:end], *(x[:, :, :end] for x in problem[1:]))
        chunk = Chunk(past_probes(problem.query, config, begin), ends_prompt=end == length)
        parts.append(on.run(part, config, chunk=chunk))
    whole = [torch.cat([part.output for part in parts], 2), torch.cat([p.lse for p in parts], 2)]
    # The prompt's last queries are those of the last call too, however few it has.
    last = min(config.dense_queries, length - edges[-2])
    rows = slice(0, max(length - config.dense_queries, 0))
    for some in (rows, slice(length - last, None)):
        on.assert_same(whole[0][:, :, some], expected.output[:, :, some])
        torch.testing.assert_close(whole[1][:, :, some], expected.lse[:, :, some])


def check_the_future_changes_nothing(
    on: On, config: KVSamplingConfig, length: int, position: int, **shape: int
) -> None:
    """Other tokens from a position on leave every output before it as it was, to the bit."""
    config = dataclasses.replace(config, dense_queries=0)
    problem = on.problem(query_len=length, **shape)
    other = on.problem(query_len=length, seed=7, **shape)
    expected = on.run(problem, config)
    for which in range(3):
        changed = [tensor.clone() for tensor in problem]
        changed[which][:, :, position:] = 3 * other[which][:, :, position:]
        out, _, lse = on.run(Problem(*changed), config)
        assert torch.equal(out[:, :, :position], expected.output[:, :, :position])
        assert torch.equal(lse[:, :, :position], expected.lse[:, :, :position])
        if which != 1:  # a key hidden from a query can be the one that it likes least
            assert not torch.equal(out[:, :, position:], expected.output[:, :, position:])


def check_padding(
    on: On,
    config: KVSamplingConfig,
    length: int,
    query_len: int,
    spans: Sequence[tuple[int, int]],
    *,
    known: bool,
    **shape: int,
) -> None:
    """A row of a padded batch gives what it gives alone, and padding may hold anything."""
    whole = on.problem(batch=len(spans), query_len=length, **shape)
    mask = torch.zeros(len(spans), length, dtype=torch.bool, device=on.device)
    for number, (start, end) in enumerate(spans):
        mask[number, start:end] = True
    for tensor in whole:
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    first = length - query_len
    starts = [start for start, _ in spans]
    past = past_probes(whole.query, config, first, starts) if known else None
    problem = whole._replace(query=whole.query[:, :, first:])
    result = on.run(problem, config, mask, Chunk(past))
    assert not result.output[~mask[:, first:][:, None].expand(result.output.shape[:3])].any()
    for number, (start, end) in enumerate(spans):
        queries = slice(max(start, first), end)
        if queries.start >= end:
            continue
        alone = Problem(
            whole.query[number : number + 1, :, queries],
            *(tensor[number : number + 1, :, start:end] for tensor in whole[1:]),
        )
        mine = past and PastProbes(*(tensor[number : number + 1] for tensor in past))
        expected = on.run(alone, config, chunk=Chunk(mine if start < first else None))
        rows = slice(queries.start - first, end - first)
        on.assert_same(result.output[number, :, rows], expected.output[0])
        torch.testing.assert_close(result.lse[number, :, rows], expected.lse[0])
        for name in ("lengths", "reasons", "ran_sparse"):
            one, other = (getattr(r.selection, name) for r in (result, expected))
            assert torch.equal(one[number], other[0]), name
