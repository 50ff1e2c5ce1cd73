"""Kernels keep what they work on in registers: compiled for Hopper, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MOST = 400  # bytes of a thread that do not fit; at 900 the attention took twice as long
COMPILE = """
import json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from token_sparse_attention.kernels import block_scoring, sampled_attention, sampling
from token_sparse_attention.kernels.softmax import _dot_constants

HALF = {"query_ptr", "key_ptr", "value_ptr", "out_ptr", "probes_ptr"}
WHOLE = {"slots_ptr", "counts_ptr", "bounds_ptr", "begins_ptr"}


def stack(kernel, constants, num_warps, num_stages):
    types, divisible = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*bf16" if name in HALF else "*i32" if name in WHOLE else "*fp32"
            divisible[place,] = [["tt.divisibility", 16]]
        elif name.startswith("stride") or name == "num_scores":
            types[name] = "i64"
            divisible[place,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name == "scale_log2" else "i32"
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=divisible)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        found = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return max(map(int, re.findall(r"STACK:(\\d+)", found.stdout)))


def found(head_dim):
    half = torch.bfloat16
    dot = _dot_constants(head_dim, half, True)
    yield "sample_blocks", stack(
        sampling.sample_blocks_kernel,
        {"budgets_ptr": None, "BLOCK_SIZE": 2048, "BLOCK": sampling._BLOCK}, sampling._WARPS, 3,
    )
    m, n, warps, stages = sampled_attention.pick_tiles(half, head_dim)
    tile = {"BLOCK_SIZE": 2048, "BLOCK_M": m, "BLOCK_N": n, "COUNTED": 128}
    kernel = sampled_attention.sampled_keys_kernel
    yield "sampled_keys", stack(kernel, dot | tile, warps, stages)
    for name, tiles in zip(("statistics", "scores"), block_scoring.pick_tiles(half, head_dim)):
        kernel = getattr(block_scoring, f"block_{name}_kernel")
        constants = block_scoring._launch(tiles)
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        constants = constants | dot | {"GROUP": 4, "NUM_PROBES": 16, "BLOCK_SIZE": 2048}
        yield f"block_{name}", stack(kernel, constants, warps, stages)


print(json.dumps(dict(found(int(sys.argv[1])))))
"""


@pytest.mark.parametrize("head_dim", [64, 128])
def test_registers_hold_what_a_thread_works_on(head_dim):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(head_dim)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    stacks = json.loads(result.stdout)
    assert len(stacks) == 4
    assert {name: size for name, size in stacks.items() if size > MOST} == {}, stacks
