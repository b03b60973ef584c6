"""Measuring: peak memory as a delta in bytes, and times of several callables interleaved in one run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes allocated at once during ``function()`` beyond what was allocated before it.

    On a GPU the caching allocator's count; on a CPU the running sum of torch's allocator events as its profiler
    records them, which sees every tensor and the workspaces that ops take from torch (not a library's own malloc).
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library greets on stderr at every start; errors of the measured function are raised all the same.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``function()``, after three calls to warm up, and the result that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable over the rounds of `interleaved`."""

    median: float
    p20: float
    p80: float
    rounds: int


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    prime: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time every callable once a round, in turn, so that a machine's slow moments hit all of them alike.

    ``prime`` untimed calls come before each timed one: then none is measured behind the caches another one left.
    """
    device = torch.device(device)

    def timed(function: Callable[[], Any]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(prime):
                function()
            seconds[name].append(timed(function))
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: list[float]) -> Timing:
    """Median and the 20th and 80th percentile of some seconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))
