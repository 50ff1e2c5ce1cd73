"""What is installed here, and which attention backend `auto` would run on each device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

import token_sparse_attention
from token_sparse_attention.attention.block_sparse import choose_block_backend
from token_sparse_attention.attention.names import BACKENDS
from token_sparse_attention.attention.resolve import causal_attention, resolve_backend

PACKAGES = ("torch", "transformers", "triton", "flash-attn-4", "accelerate")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CPU_INFO = Path("/proc/cpuinfo")
_SHAPE = {"num_heads": 8, "num_kv_heads": 2, "seq_len": 64, "head_dim": 128}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter, None where absent."""
    found: dict[str, str | None] = {
        "token-sparse-attention": token_sparse_attention.__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: str) -> str:
    """Return what a device is, for people: a GPU's or the processor's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the git commit that this package is run from, "-dirty" appended if it is changed.

    A copy whose history is missing or stale is told by the environment variable
    ``TSA_COMMIT``, which goes first. None outside a checkout of the package; an environment
    inside some other repository is none.
    """
    if told := os.environ.get("TSA_COMMIT"):
        return told
    here = Path(__file__)
    tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        for command in (tracked, describe):
            done = subprocess.run(
                command, cwd=here.parent, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(device: str) -> dict[str, Any]:
    """Return what a result file records of where it comes from: device, versions, commit."""
    return {"device": device_name(device), "versions": versions(), "commit": commit()}


def devices() -> list[dict[str, Any]]:
    """Return the CPU and every CUDA device, with what each is."""
    processor = {"device": "cpu", "name": device_name("cpu")}
    found: list[dict[str, Any]] = [processor | {"threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def backends(device: str) -> list[dict[str, Any]]:
    """Run every attention backend once on `device`, and ask which one `auto` picks.

    Returns:
        One entry per dtype: the dtype, the backends that ran, auto's choice and its reason,
        and which executor block-sparse patterns run on.
    """
    entries = []
    shape = (1, _SHAPE["num_heads"], _SHAPE["seq_len"], _SHAPE["head_dim"])
    for dtype in DTYPES:
        query = torch.randn(shape, device=device, dtype=dtype)
        key = query[:, : _SHAPE["num_kv_heads"]].contiguous()
        ran = []
        for backend in BACKENDS:
            if backend == "auto":
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch lists what every other kernel lacks
                try:
                    causal_attention(query, key, key, scale=0.1, backend=backend)
                except (ValueError, RuntimeError):
                    continue
            ran.append(backend)
        chosen = resolve_backend("auto", query, key)
        entries.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "available": ran,
                "auto": chosen.name,
                "reason": chosen.reason,
                "patterns_on": choose_block_backend("auto", query).name,
            }
        )
    return entries


def collect() -> dict[str, Any]:
    """Return versions, devices, and the backends of each device, JSON-ready."""
    listed = devices()
    return {
        "versions": versions(),
        "devices": listed,
        "backends": {entry["device"]: backends(entry["device"]) for entry in listed},
        "backends_probed_at": _SHAPE,
    }
