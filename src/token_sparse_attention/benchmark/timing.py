"""How long calls take and how much memory they need."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SAMPLES, MAX_SAMPLES = 3, 50
_LONG = 0.1  # seconds from which on every call counts
# Calls that take seconds together drain so much power that the next one runs at another clock.
_SETTLING = 0.1  # seconds of calls before a timed one, where a call takes this share of them:
_SHARE = 0.2

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Times of one call; `Record` explains the fields."""

    kind: str
    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    note: str = ""


def summarize(kind: str, times_ms: Sequence[float], note: str = "") -> Timing:
    """Return the median, and the 20th and 80th percentile."""
    low = high = times_ms[0]
    if len(times_ms) > 1:
        low, *_, high = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(kind, statistics.median(times_ms), low, high, len(times_ms), note)


def kernel_times(calls: Sequence[Call], device: torch.device, budget: float) -> list[Timing]:
    """Time calls on the device, without the host's part where a CUDA graph can be captured.

    Several calls take turns, so that a drifting clock meets all of them equally. Long ones run
    untimed for a tenth of a second before, so that each meets the clock that it leaves itself.

    Args:
        calls: what to time.
        device: where they run; elsewhere than on CUDA this is `wall_times`.
        budget: seconds to spend on each call, as far as `MIN_SAMPLES` allows.
    """
    if device.type != "cuda" or not calls:
        return wall_times(calls, device, budget)
    prepared = [_prepare(call, device) for call in calls]
    runs = [one.run for one in prepared]
    seconds = [one.seconds for one in prepared]
    if max(seconds) < _LONG:
        _event_times(runs, device, 1, [0] * len(runs))  # a graph's first replay uploads it
    rounds = _rounds(max(seconds), budget)
    times_ms = _event_times(runs, device, rounds, _untimed(seconds))
    return [summarize(one.kind, t, one.note) for one, t in zip(prepared, times_ms)]


def wall_times(calls: Sequence[Call], device: torch.device, budget: float) -> list[Timing]:
    """Time calls by the host's clock, taking turns; the arguments are `kernel_times`'s."""
    seconds = [wall_ms(call, device) / 1e3 for call in calls]
    before = _untimed(seconds) if device.type == "cuda" else [0] * len(seconds)
    rounds = _rounds(max(seconds, default=0.0), budget)
    times_ms = [
        [_last_ms(call, device, count) for call, count in zip(calls, before)]
        for _ in range(rounds)
    ]
    return [summarize("eager", times) for times in zip(*times_ms)]


def _last_ms(call: Call, device: torch.device, untimed: int) -> float:
    for _ in range(untimed):
        call()
    return wall_ms(call, device)


def _untimed(seconds: Sequence[float]) -> list[int]:
    """Return how many untimed calls go before a timed one, from what one takes."""
    if max(seconds, default=0.0) < _SHARE * _SETTLING:
        return [0] * len(seconds)
    return [math.ceil(_SETTLING / max(one, 1e-3)) for one in seconds]


def wall_ms(call: Call, device: torch.device) -> float:
    """Return how long one call takes from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def peak_extra_mib(call: Callable[[], Tensor], device: torch.device) -> float | None:
    """Make one call; return its peak memory beyond inputs and output, None off CUDA."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before - out.numel() * out.element_size()
    return extra / 2**20


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _rounds(seconds: float, budget: float) -> int:
    return max(min(int(budget / max(seconds, 1e-6)), MAX_SAMPLES), MIN_SAMPLES)


def _event_times(
    runs: Sequence[Call], device: torch.device, rounds: int, untimed: Sequence[int]
) -> list[list[float]]:
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(rounds):  # all are queued before the first wait: launches overlap with work
        for run, own_marks, before in zip(runs, marks, untimed):
            for _ in range(before):
                run()
            start, end = _new_event(), _new_event()
            start.record()
            run()
            end.record()
            own_marks.append((start, end))
    synchronize(device)
    return [[start.elapsed_time(end) for start, end in own_marks] for own_marks in marks]


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Prepared(NamedTuple):
    run: Call
    kind: str
    note: str
    seconds: float  # about how long a call takes


def _prepare(call: Call, device: torch.device) -> _Prepared:
    """Warm a call up and capture it in a CUDA graph; where that fails, run the call itself."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    synchronize(device)
    start = time.perf_counter()
    mode, obstacle = torch.cuda.get_sync_debug_mode(), ""
    try:
        # A call that waits for the device is found before it can break a capture.
        torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError as error:
        obstacle = _no_graph(error)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    if obstacle:
        return _Prepared(call, "events", obstacle, wall_ms(call, device) / 1e3)
    synchronize(device)
    seconds = time.perf_counter() - start
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    except RuntimeError as error:
        synchronize(device)
        return _Prepared(call, "events", _no_graph(error), seconds)
    return _Prepared(graph.replay, "graph", "", seconds)


def _no_graph(error: RuntimeError) -> str:
    return f"no CUDA graph: {str(error).splitlines()[0][:80]}"
