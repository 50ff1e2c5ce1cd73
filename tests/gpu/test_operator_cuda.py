"""The operator on a CUDA device: golden files, float64 oracle, backends, large lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support import (
    GOLDEN_CASES,
    SAMPLING,
    SMALL,
    WITH_LSE,
    Problem,
    causal_attention,
    counts_behind,
    golden_case,
    kept_mask,
    make_problem,
    oracle,
    relative_error,
    with_selection,
)
from token_sparse_attention import (
    KVSamplingConfig,
    TokenSelectionConfig,
    select_tokens,
    token_sparse_attention,
)
from token_sparse_attention.attention.flash import FlashBackend
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.reference import masked_attention

DEVICE = "cuda"


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden(case):
    tensors, config, selected = golden_case(case)
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    query = tensors["query"]
    problem = Problem(query, tensors["key"], tensors["value"])
    out, selection = with_selection(problem, config)
    published = tensors["output"].view(1, query.shape[2], query.shape[1], -1).transpose(1, 2)
    if selected is not None:
        assert (selection.lengths == selected).all()
        assert torch.equal(selection.indices[..., :selected], tensors["indices"])
    torch.testing.assert_close(out, published, rtol=1e-4, atol=1e-5)


def given_selection_truth(problem, config, selection):
    """The exact output for the selection that was made, in float64."""
    query_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    slot = torch.arange(kv_len, device=DEVICE)
    position = slot[kv_len - query_len :, None]
    keep = kept_mask(selection.indices, kv_len)[0]
    causal = slot <= position
    exact = [tensor[0].double() for tensor in problem]
    scale = exact[0].shape[-1] ** -0.5
    dense = masked_attention(*exact, causal[None], scale)
    rest = torch.zeros_like(dense)
    near = slot > position - config.sliding_window
    if isinstance(config, KVSamplingConfig):
        counts = torch.where(near, 1.0, counts_behind(problem, config, "triton"))
        rest = masked_attention(*exact, causal * counts, scale)
    elif config.fallback == "window":
        rest = masked_attention(*exact, (causal & near)[None], scale)
    if isinstance(config, TokenSelectionConfig):
        allowed = causal & (keep[:, None] | (slot == position))
        sparse = masked_attention(*exact, allowed, scale)
        rest = torch.where(keep[:, kv_len - query_len :, None], sparse, rest)
    if config.dense_queries:
        rest[:, -config.dense_queries :] = dense[:, -config.dense_queries :]
    heads = list(config.dense_heads)
    rest[heads] = dense[heads]
    return rest


WINDOW = {"fallback": "window", "sliding_window": 40}
CONFIGS = {
    "zero": SMALL,
    "window": dataclasses.replace(SMALL, **WINDOW),
    "window, dense queries and heads": dataclasses.replace(
        SMALL, **WINDOW, dense_queries=40, dense_heads=(1,)
    ),
    "sinks": dataclasses.replace(SAMPLING, sliding_window=40, sink_size=5, num_samples=0),
    "sinks and samples": dataclasses.replace(
        SAMPLING, sliding_window=40, sink_size=2, num_samples=50
    ),
    "samples, dense queries": dataclasses.replace(
        SAMPLING, sliding_window=40, num_samples=50, dense_queries=40
    ),
    "samples, dense heads": dataclasses.replace(
        SAMPLING, sliding_window=40, num_samples=50, dense_heads=(1,)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize(("query_len", "kv_len"), [(257, 257), (1111, 1111), (140, 501)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_operator(dtype, head_dim, heads, kv_heads, query_len, kv_len, config):
    problem = make_problem(
        heads=heads,
        kv_heads=kv_heads,
        query_len=query_len,
        kv_len=kv_len,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    out, selection = with_selection(problem, config)
    assert selection.ran_sparse.all()
    truth = given_selection_truth(problem, config, selection)
    causal = torch.ones(1, query_len, kv_len, dtype=torch.bool, device=DEVICE)
    causal = causal.tril(kv_len - query_len)
    exact = [tensor[0].double() for tensor in problem]
    scale = head_dim**-0.5
    eager = masked_attention(*(tensor[0] for tensor in problem), causal, scale)
    eager_error = relative_error(eager, masked_attention(*exact, causal, scale))
    assert relative_error(out[0], truth) <= 2 * eager_error + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("heads", "splits"), [(8, True), (64, False)])
def test_few_last_queries_split_their_keys(heads, splits, monkeypatch):
    problem = make_problem(
        heads=heads, query_len=3000, head_dim=64, dtype=torch.bfloat16, device=DEVICE
    )
    if resolve_backend("auto", problem.query, problem.key).name != "fa4":
        pytest.skip("flash-attn-4 on Hopper alone leaves multiprocessors idle")
    used, real = [], FlashBackend.attend

    def spy(backend, query, *rest, **named):
        used.append((backend.name, query.shape[2]))
        return real(backend, query, *rest, **named)

    monkeypatch.setattr(FlashBackend, "attend", spy)
    config = KVSamplingConfig(block_size=256, sliding_window=256, num_samples=64, crossover="off")
    out, _, lse = token_sparse_attention(*problem, config, return_aux=WITH_LSE)
    assert used == ([("flash", 128)] if splits else [])
    group = heads // problem.key.shape[1]
    exact = [problem.query[0].double()]
    exact += [tensor[0].repeat_interleave(group, 0).double() for tensor in problem[1:]]
    logits = exact[0][:, -128:] @ exact[1].transpose(1, 2) / 8
    logits.masked_fill_(~torch.ones_like(logits, dtype=torch.bool).tril(3000 - 128), -torch.inf)
    assert relative_error(out[0, :, -128:], logits.softmax(-1) @ exact[2]) < 1e-2
    torch.testing.assert_close(lse[0, :, -128:].double(), logits.logsumexp(-1), rtol=0, atol=1e-3)


def test_scores_that_are_not_finite_make_their_block_nan():
    problem = make_problem(query_len=3000, head_dim=64, dtype=torch.bfloat16, device=DEVICE)
    config = KVSamplingConfig(block_size=256, sliding_window=256, num_samples=64, crossover="off")
    expected = token_sparse_attention(*problem, config)
    problem.query[0, 1, 1023, 0] = torch.nan  # a probe of the fifth block
    out = token_sparse_attention(*problem, config)
    hidden = torch.zeros(4, 3000, dtype=torch.bool, device=DEVICE)
    hidden[1, 1023:1280] = True
    assert torch.equal(out[0].isnan().any(-1), hidden)
    assert torch.equal(out[0][~hidden], expected[0][~hidden])


def test_float64_equals_the_oracle():
    problem = make_problem(query_len=300, dtype=torch.float64, device=DEVICE)
    for budget in ("shared", "per_head"):
        config = dataclasses.replace(SMALL, budget=budget)
        out, selection = with_selection(problem, config)
        expected, keep = oracle(problem, config)
        assert torch.equal(kept_mask(selection.indices, 300)[0], keep)
        assert relative_error(out[0], expected) < 1e-12


PER_HEAD = {"budget": "per_head", "sliding_window": 40}


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, **PER_HEAD),
        dataclasses.replace(SMALL, **PER_HEAD, fallback="window", dense_queries=40),
        dataclasses.replace(SMALL, **PER_HEAD, dense_heads=(0, 1, 3)),
        dataclasses.replace(SAMPLING, **PER_HEAD, dense_queries=40, num_samples=50),
        dataclasses.replace(SAMPLING, **PER_HEAD, num_samples=0, dense_heads=(0, 1, 3)),
    ],
    ids=["zero", "window", "selection-dense-heads", "sampling", "dense-heads"],
)
def test_padded_batches_equal_their_sequences(config):
    problem = make_problem(batch=4, query_len=333, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.ones(4, 333, dtype=torch.bool, device=DEVICE)
    mask[1, :77] = False
    mask[2, 250:] = False
    mask[3, 15:] = False  # runs dense, as it is too short
    for tensor in problem:
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    out, selection = with_selection(problem, config, padding_mask=mask)
    assert selection.ran_sparse.tolist() == [True, True, True, False]
    for number in range(4):
        real = mask[number].nonzero().flatten()
        alone = Problem(*(tensor[number : number + 1, :, real] for tensor in problem))
        expected = token_sparse_attention(*alone, config)[0]
        torch.testing.assert_close(out[number][:, real], expected, rtol=1e-2, atol=1e-2)
        assert not out[number][:, ~mask[number]].any()


@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn", "efficient", "math"])
@pytest.mark.parametrize(
    ("query_len", "kv_len", "window"),
    [(300, 300, None), (100, 300, None), (1, 300, None), (300, 300, 50), (100, 300, 50)],
)
def test_backends_are_right(backend, query_len, kv_len, window):
    problem = make_problem(
        heads=8,
        query_len=query_len,
        kv_len=kv_len,
        head_dim=64,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    slot = torch.arange(kv_len, device=DEVICE)
    position = slot[kv_len - query_len :, None]
    allowed = ((slot <= position) & (slot > position - (window or kv_len)))[None]
    exact = masked_attention(*(tensor[0].double() for tensor in problem), allowed, 0.125)
    out = causal_attention(*problem, scale=0.125, backend=backend, window=window)
    assert relative_error(out[0], exact) < 1e-2


def test_ties_keep_the_lower_index():
    scores = torch.full((1, 2, 5000), 0.1, device=DEVICE)
    config = dataclasses.replace(SMALL, pool_size=1, keep_ratio=0.5)
    selection = select_tokens(scores, config)
    kept = int(selection.lengths[0, 0]) - SMALL.observation_window
    lowest = torch.arange(kept, device=DEVICE)
    assert torch.equal(selection.indices[0, :, :kept], lowest.expand(2, -1))


def test_128k_tokens_fit_and_equal_float64_on_some_queries():
    length, config = 131072, TokenSelectionConfig(drop_mass=0.3)
    torch.manual_seed(0)
    query = torch.randn(1, 32, length, 128, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 8, length, 128, device=DEVICE, dtype=torch.bfloat16)
    out, selection = with_selection(Problem(query, key, value), config)
    assert selection.ran_sparse.all()
    assert query.numel() < 2**31 < 32 * length * length, "indices must not overflow"
    for head in (0, 17, 31):
        indices = selection.indices[0, head, : selection.lengths[0, head]]
        for entry in (0, 1000, len(indices) // 2, len(indices) - 1):
            seen = indices[: entry + 1]
            k, v = (x[0, head // 4, seen].double() for x in (key, value))
            probs = (query[0, head, indices[entry]].double() @ k.T / 128**0.5).softmax(-1)
            assert relative_error(out[0, head, indices[entry]], probs @ v) < 2e-2
        dropped = torch.ones(length, dtype=torch.bool, device=DEVICE)
        dropped[indices] = False
        assert not out[0, head, dropped].any()
