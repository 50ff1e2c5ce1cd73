"""A second CUDA device: kernels run where their tensors are, whichever device is the current."""

from __future__ import annotations

import pytest
import torch

from integrations.models import CONFIG, LAYERS, make_ids, make_model
from support import SMALL, make_problem, with_selection
from token_sparse_attention import Execution, KVSamplingConfig
from token_sparse_attention.attention.flash import fa4_installed
from token_sparse_attention.integrations.transformers import apply

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SAMPLED = KVSamplingConfig(
    block_size=32,
    num_probes=32,
    sliding_window=50,
    num_samples=60,
    dense_queries=40,
    crossover="off",
)
FA4 = pytest.param(
    "fa4", marks=pytest.mark.skipif(not fa4_installed(), reason="flash-attn-4 not installed")
)


@pytest.mark.parametrize("config", [SMALL, SAMPLED], ids=["selection", "sampling"])
@pytest.mark.parametrize(
    "backend", [FA4, "flash", "cudnn", "flexprefill", "minference", "xattention", "streaming"]
)
def test_the_operator_gives_the_same_on_either_device(config, backend):
    problem = make_problem(
        device="cuda:0", dtype=torch.bfloat16, heads=8, head_dim=64, query_len=900, batch=2
    )
    assert torch.cuda.current_device() == 0
    execution = Execution(attention_backend=backend)
    expected, there = with_selection(problem, config, execution=execution)
    assert there.ran_sparse.all()
    moved = [tensor.to("cuda:1") for tensor in problem]
    out, selection = with_selection(moved, config, execution=execution)
    assert out.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(selection.lengths.cpu(), there.lengths.cpu())
    torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=0, atol=1e-2)


def test_a_model_split_over_two_devices():
    from accelerate import dispatch_model

    model, ids = make_model(), make_ids()
    with apply(model, CONFIG):
        expected = model(ids).logits
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    device_map |= {f"model.layers.{layer}": 1 for layer in range(1, LAYERS)}
    device_map |= {"model.norm": 1, "lm_head": 1}
    model = dispatch_model(model, device_map, main_device=0)
    with apply(model, CONFIG) as report:
        logits = model(ids.to("cuda:0")).logits
    assert all(set(record.paths) == {"sparse"} for record in report)
    assert len(report) == LAYERS
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-4)
