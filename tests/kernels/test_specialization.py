"""A new length compiles nothing: no launch differs in what Triton compiles a kernel anew for."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest
import torch

from support import SAMPLING, SMALL, WITH_BOTH, make_problem
from token_sparse_attention import Execution, token_sparse_attention
from token_sparse_attention.methods import sampling as sampling_method
from token_sparse_attention.methods import selection as selection_method

pytest.importorskip("triton")

from token_sparse_attention.kernels import (
    block_scoring,
    budget,
    compression,
    sampled_attention,
    sampling,
    scoring,
    selection,
)

KERNELS = {
    "token_selection": (budget, compression, scoring, selection),
    "kv_sampling": (block_scoring, sampled_attention, sampling),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_time_arguments(module):
    """Kernel name -> argument names, and which of them are never specialised on."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            free = set()
            for decorator in node.decorator_list:
                for keyword in getattr(decorator, "keywords", []):
                    free |= set(ast.literal_eval(keyword.value))
            found[node.name] = ([argument.arg for argument in node.args.args], free)
    return found


class Recorder:
    """Notes what each launch of a kernel would be compiled for; runs it if it is given."""

    def __init__(self, kernel, names, free):
        self.kernel, self.names, self.free, self.seen = kernel, names, free, set()

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            key = [tuple(sorted(constants.items(), key=str))]
            for name, argument in zip(self.names, arguments):
                if isinstance(argument, torch.Tensor):
                    aligned = name not in self.free and argument.data_ptr() % 16 == 0
                    key.append((name, argument.dtype, aligned))
                elif argument is None:
                    key.append((name, None))
                elif isinstance(argument, int) and name not in self.free:
                    key.append((name, argument == 1, argument % 16 == 0))
            self.seen.add(tuple(key))
            if self.kernel is not None:
                self.kernel[grid](*arguments, **constants)

        return launch


def record(monkeypatch, method, run=True):
    """A recorder for each kernel of a method."""
    recorders = {}
    for module in KERNELS[method]:
        for name, (names, free) in run_time_arguments(module).items():
            recorders[name] = Recorder(getattr(module, name) if run else None, names, free)
            monkeypatch.setattr(module, name, recorders[name])
    return recorders


def attend(config, kv_len, query_len=None):
    problem = make_problem(
        batch=2, heads=8, query_len=query_len or kv_len, kv_len=kv_len, device=DEVICE
    )
    result = token_sparse_attention(
        *problem, config, execution=Execution("triton", "math"), return_aux=WITH_BOTH
    )
    assert result.selection.ran_sparse.all()


@pytest.mark.parametrize("kind", ["shared", "per_head"])
@pytest.mark.parametrize("method", KERNELS)
def test_lengths_change_nothing_that_is_compiled(monkeypatch, method, kind):
    """Odd, even and round lengths; memory for as many heads at once as fits changes too."""
    monkeypatch.setattr(selection_method, "_PACKED_BYTES", 200_000)
    config = SAMPLING if method == "kv_sampling" else SMALL
    others = {"sink_size": 3} if method == "kv_sampling" else {"fallback": "window"}
    config = dataclasses.replace(config, budget=kind, sliding_window=20, **others)
    recorders = record(monkeypatch, method)
    for length in (144, 177, 255):
        attend(config, length)
    levels = {"count_top_kernel": 4, "count_mass_kernel": 4 if kind == "shared" else 8}
    for name, recorder in recorders.items():
        assert len(recorder.seen) == levels.get(name, 1), f"{name}: {recorder.seen}"


def test_blocks_and_samples_change_nothing_that_is_compiled(monkeypatch):
    """One block and several, first ones of any number, in parts; samples, sinks, windows."""
    recorders = record(monkeypatch, "kv_sampling", run=False)
    attend(SAMPLING, 96)
    attend(dataclasses.replace(SAMPLING, num_samples=16), 32)  # one block
    attend(dataclasses.replace(SAMPLING, num_samples=1), 33)
    attend(dataclasses.replace(SAMPLING, num_samples=32, sink_size=1), 120)
    attend(dataclasses.replace(SAMPLING, sliding_window=32, sink_size=16), 120)
    attend(SAMPLING, 120, 56)  # from a block's first query on
    attend(SAMPLING, 120, 40)
    monkeypatch.setattr(sampling_method, "_SCORES", 1000)
    attend(SAMPLING, 96)
    for name, recorder in recorders.items():
        assert len(recorder.seen) == 1, f"{name}: {recorder.seen}"
    attend(SAMPLING, 120, 51)  # some probes are missing
    attend(SAMPLING, 99, 45)
    for name, recorder in recorders.items():
        expected = 2 if name == "block_norms_kernel" else 1
        assert len(recorder.seen) == expected, f"{name}: {recorder.seen}"


def test_a_length_that_is_specialised_on_would_be_seen():
    recorder = Recorder(None, ["length"], set())
    for length in (160, 177):
        recorder[(1,)](length)
    assert len(recorder.seen) == 2
