"""No kernel reads or writes outside its tensors, as NVIDIA's compute-sanitizer sees it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from token_sparse_attention import (
    AuxRequest, Execution, KVSamplingConfig, TokenSelectionConfig, token_sparse_attention,
)

selection = {"drop_mass": 0.3, "observation_window": 16, "min_tokens": 32}
sampling = {"block_size": 32, "num_probes": 16, "sliding_window": 40, "num_samples": 50}
sampling |= {"crossover": "off"}
for config, query_len in (
    (TokenSelectionConfig(**selection), 333),
    (TokenSelectionConfig(
        budget="per_head", fallback="window", sliding_window=40, **selection), 150),
    (KVSamplingConfig(**sampling), 333),
    (KVSamplingConfig(budget="per_head", dense_heads=(1,), **sampling), 150),
):
    query = torch.randn(2, 6, query_len, 64, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 333, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 333, dtype=torch.bool, device="cuda")
    mask[1, :50] = False
    for padding_mask in (None, mask):
        result = token_sparse_attention(
            query, key, value, config, padding_mask=padding_mask,
            execution=Execution(attention_backend="flash"),
            return_aux=AuxRequest(selection=True, lse=True),
        )
        assert result.selection.ran_sparse.all()
torch.cuda.synchronize()
print("ran")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    # Without the caching allocator every tensor is an allocation of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex",
               "kns=kernel", sys.executable, "-c", SCRIPT]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "ran" in done.stdout
