"""What only a device path can promise: no waiting, no recompiling, graphs, compilation."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from support import (
    SAMPLING,
    SMALL,
    WITH_BOTH,
    Problem,
    kept_mask,
    make_problem,
    relative_error,
    with_selection,
)
from token_sparse_attention import (
    AuxRequest,
    Execution,
    TokenSelectionConfig,
    token_sparse_attention,
)
from token_sparse_attention.attention.flash import fa4_installed
from token_sparse_attention.attention.resolve import resolve_backend
from token_sparse_attention.custom_op import aux_text, settings_text
from token_sparse_attention.inputs import Chunk

DEVICE = "cuda"
FLASH = [
    pytest.param(
        "fa4", marks=pytest.mark.skipif(not fa4_installed(), reason="flash-attn-4 not installed")
    ),
    "flash",
]
CONFIG = TokenSelectionConfig(drop_mass=0.3, observation_window=32, min_tokens=64)
SAMPLED = dataclasses.replace(
    SAMPLING, block_size=32, sliding_window=50, sink_size=3, num_samples=50
)


def on(backend, **others):
    return Execution(attention_backend=backend, **others)


def half_problem(**shape):
    shape = {"heads": 8, "head_dim": 64, "query_len": 900, "batch": 2} | shape
    return make_problem(device=DEVICE, dtype=torch.bfloat16, **shape)


@pytest.fixture
def no_waiting():
    """Every synchronisation raises, after a first call that may compile."""

    def call(function):
        function()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


METHODS = {
    "zero": CONFIG,
    "window": dataclasses.replace(CONFIG, fallback="window", sliding_window=50),
    "dense heads": dataclasses.replace(CONFIG, dense_heads=(1,), dense_queries=20),
    "sampling": SAMPLED,
    "sampling, dense": dataclasses.replace(SAMPLED, dense_heads=(1,), dense_queries=20),
}
EACH_METHOD = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize("backend", FLASH)
@EACH_METHOD
@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_waits_for_the_device(no_waiting, backend, config, budget, padded):
    config = dataclasses.replace(config, budget=budget)
    problem = half_problem()
    mask = torch.ones(2, 900, dtype=torch.bool, device=DEVICE)
    mask[1, :100] = False

    def call():
        return token_sparse_attention(
            *problem,
            config,
            padding_mask=mask if padded else None,
            execution=on(backend),
            return_aux=WITH_BOTH,
        )

    result = no_waiting(call)
    assert result.selection.ran_sparse.all()
    assert result.output[0].isfinite().all()


@pytest.mark.parametrize("backend", FLASH)
@EACH_METHOD
def test_one_cuda_graph_serves_every_budget(backend, config):
    """Captured on data that keeps half; replayed on data that keeps little, all, or breaks."""
    static = half_problem()

    def call(problem):
        return token_sparse_attention(
            *problem, config, execution=on(backend), return_aux=WITH_BOTH
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(static)
    kept = set()
    for sharpness, seed in ((8.0, 1), (1.0, 2), (0.0, 3), (2.0, 4)):
        problem = half_problem(sharpness=sharpness, seed=seed)
        for target, source in zip(static, problem):
            target.copy_(source)
        captured.output.fill_(torch.nan)
        graph.replay()
        expected = call(problem)
        assert torch.equal(captured.selection.lengths, expected.selection.lengths)
        assert torch.equal(captured.selection.indices, expected.selection.indices)
        assert torch.equal(captured.output, expected.output)
        assert torch.equal(captured.lse, expected.lse)
        kept.add(int(captured.selection.lengths[0, 0]))
    if isinstance(config, TokenSelectionConfig):
        assert len(kept) == 4, "every replay had another budget"


@pytest.mark.parametrize("backend", FLASH)
@EACH_METHOD
@pytest.mark.parametrize(
    "wants", [None, AuxRequest(), AuxRequest(True), AuxRequest(lse=True), WITH_BOTH]
)
def test_compiles_into_one_graph(backend, config, wants):
    torch.compiler.reset()
    problem = half_problem()

    def call(query, key, value):
        return token_sparse_attention(
            query * 1, key, value, config, execution=on(backend), return_aux=wants
        )

    compiled = torch.compile(call, fullgraph=True)(*problem)
    eager = call(*problem)
    if wants is None:
        assert torch.equal(compiled, eager)
        return
    assert torch.equal(compiled.output, eager.output)
    if wants.selection:
        assert torch.equal(compiled.selection.indices, eager.selection.indices)
    if wants.lse:
        assert torch.equal(compiled.lse, eager.lse)


@pytest.mark.parametrize("backend", FLASH)
def test_a_new_length_compiles_nothing(backend):
    """Odd, even and round lengths, each seen for the first time, after two warm ones."""

    def milliseconds(length):
        problem = half_problem(query_len=length, batch=1)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        token_sparse_attention(*problem, CONFIG, execution=on(backend))
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    for length in (1024, 1025, 1024):
        warm = milliseconds(length)
    new = {length: milliseconds(length) for length in (1000, 1333, 2048, 3001, 4096, 5555)}
    assert max(new.values()) <= warm + 20, new


@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize(("query_len", "kv_len"), [(700, 700), (300, 700)])
@pytest.mark.parametrize("fallback", ["zero", "window"])
def test_backends_agree(backend, query_len, kv_len, fallback):
    """Padding, chunks and log-sum-exp, against the exact kernels in single precision."""
    config = dataclasses.replace(CONFIG, budget="per_head", fallback=fallback, sliding_window=70)
    problem = half_problem(batch=4, query_len=query_len, kv_len=kv_len)
    mask = torch.ones(4, kv_len, dtype=torch.bool, device=DEVICE)
    mask[1, :90] = False
    mask[2, 610:] = False
    mask[3, :650] = False  # too short to run sparse
    for padding_mask in (None, mask):
        options = {"padding_mask": padding_mask, "return_aux": WITH_BOTH}
        mine = token_sparse_attention(*problem, config, execution=on(backend), **options)
        exact = token_sparse_attention(
            *problem, config, execution=on("math", impl="triton"), **options
        )
        single = [tensor.float() for tensor in problem]
        full = token_sparse_attention(*single, config, execution=on("math"), **options)
        assert torch.equal(mine.selection.indices, exact.selection.indices)
        same = (mine.selection.lengths == full.selection.lengths).all(-1)
        assert same.sum() >= 2, "single precision mostly selects the same"
        assert relative_error(mine.output, exact.output) < 1e-2
        finite = exact.lse.isfinite()
        assert torch.equal(finite, mine.lse.isfinite())
        torch.testing.assert_close(mine.lse[finite], exact.lse[finite], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize("head_chunk", [1, 3, 16, None])
def test_head_groups_change_nothing(backend, head_chunk):
    problem = half_problem()
    expected = token_sparse_attention(*problem, CONFIG, execution=on(backend, head_chunk=16))
    out = token_sparse_attention(*problem, CONFIG, execution=on(backend, head_chunk=head_chunk))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", FLASH)
@EACH_METHOD
def test_output_buffers_are_written_everywhere(backend, config):
    """Freed memory full of NaN is handed out again for every buffer."""
    problem = half_problem()
    expected = token_sparse_attention(*problem, config, execution=on(backend))
    for _ in range(3):
        poison = [torch.full((2**22,), torch.nan, device=DEVICE) for _ in range(20)]
        poison += [torch.full((2**12,), torch.nan, device=DEVICE) for _ in range(200)]
        del poison
        out = token_sparse_attention(*problem, config, execution=on(backend))
        assert torch.equal(out, expected)


def test_more_than_two_to_the_31_elements():
    """Offsets past 2^31 in query, output and packed tensors, at 32 heads of 128."""
    length, heads = 560_000, 32
    config = dataclasses.replace(SMALL, observation_window=128, pool_size=7, keep_ratio=0.02)
    torch.manual_seed(0)
    query = torch.randn(1, length, heads, 128, device=DEVICE, dtype=torch.bfloat16)
    query = query.transpose(1, 2)
    key, value = torch.randn(2, 1, 2, length, 128, device=DEVICE, dtype=torch.bfloat16)
    assert query.numel() > 2**31
    out, selection = with_selection(
        Problem(query, key, value), config, execution=Execution(head_chunk=heads)
    )
    for head in (0, 15, 31):
        indices = selection.indices[0, head, : selection.lengths[0, head]]
        assert len(indices) == round(0.02 * length)
        for entry in (0, 1000, len(indices) // 2, len(indices) - 1):
            seen = indices[: entry + 1]
            k, v = (x[0, head // 16, seen].double() for x in (key, value))
            probs = (query[0, head, indices[entry]].double() @ k.T / 128**0.5).softmax(-1)
            assert relative_error(out[0, head, indices[entry]], probs @ v) < 2e-2
        dropped = ~kept_mask(selection.indices[:, head : head + 1], length)[0, 0]
        assert not out[0, head, dropped].any()


@pytest.mark.parametrize("wants", [AuxRequest(), WITH_BOTH])
@EACH_METHOD
def test_opcheck(config, wants):
    problem = half_problem(query_len=200)
    settings = settings_text(on("flash").text, config.text)
    arguments = (*problem, None, [], settings, 0.125, aux_text(wants, Chunk()))
    torch.library.opcheck(torch.ops.token_sparse_attention.prefill.default, arguments)


def test_auto_takes_flash_attn_4_where_it_can():
    half, single = half_problem(), make_problem(device=DEVICE, head_dim=64)
    assert resolve_backend("auto", half.query, half.key).name in ("fa4", "flash")
    if fa4_installed() and torch.cuda.get_device_capability()[0] == 9:
        assert resolve_backend("auto", half.query, half.key).name == "fa4"
    assert resolve_backend("auto", single.query, single.key).name == "efficient"
    with pytest.raises(ValueError, match=r"'fa4' (cannot run torch.float32|needs flash-attn-4)"):
        token_sparse_attention(*single, CONFIG, execution=on("fa4"))
