"""Times and memory on a CUDA device."""

from __future__ import annotations

import torch

from token_sparse_attention.benchmark import timing

DEVICE = torch.device("cuda")


def test_calls_are_captured_where_they_can_be():
    x = torch.randn(4096, 4096, device=DEVICE)
    calls = [lambda: x @ x, lambda: (x.sum().item(), x @ x)]
    captured, waiting = timing.kernel_times(calls, DEVICE, 0.05)
    assert captured.kind == "graph"
    assert waiting.kind == "events"
    assert waiting.note.startswith("no CUDA graph: called a synchronizing")
    assert 0 < captured.low_ms <= captured.median_ms <= captured.high_ms
    assert torch.randn(3, device=DEVICE).isfinite().all(), "the device is as it was"


def test_a_failed_capture_leaves_the_device_usable():
    x = torch.randn(64, device=DEVICE)

    def waits_unseen():
        torch.cuda.synchronize()
        return x + 1

    (taken,) = timing.kernel_times([waits_unseen], DEVICE, 0.01)
    assert taken.kind == "events"
    (again,) = timing.kernel_times([lambda: x + 1], DEVICE, 0.01)
    assert again.kind == "graph"
    generator = torch.Generator(DEVICE).manual_seed(0)
    assert torch.randn(3, device=DEVICE, generator=generator).isfinite().all()


def test_peak_memory_counts_neither_inputs_nor_output():
    x = torch.zeros(2**20, device=DEVICE)
    assert timing.peak_extra_mib(lambda: x + 1, DEVICE) == 0
    assert timing.peak_extra_mib(lambda: (x + 1) + (x + 2), DEVICE) == 8
