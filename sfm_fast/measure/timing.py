"""Measures times of several callables interleaved in one run, and the ratio of two with its interval."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

L2_BYTES = 256 << 20  # more than the second-level cache of any GPU


def captured(function: Callable[[], Any], warmup: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``function()``, captured after ``warmup`` calls, and the result tensor that its replays overwrite."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
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


@dataclass(frozen=True)
class Ratio:
    """Time of one callable over another's: the median of the rounds' ratios, and the sign-test interval of that median."""

    median: float
    low: float
    high: float


def cache_flush(device: torch.device | str, size: int = L2_BYTES) -> Callable[[], Any]:
    """A callable that fills the second-level cache by reading ``size`` bytes of other data.

    Writing would leave dirty lines that are written back to memory while the next call is timed.
    """
    buffer = torch.zeros(size // 4, device=device)
    result = torch.empty((), device=device)
    return lambda: torch.sum(buffer, 0, out=result)


def samples(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    prime: int = 0,
    device: torch.device | str = "cpu",
    cold: bool = False,
    events: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every callable, measured once per round, so that disturbances of the machine affect all of them equally.

    Every other round runs in reverse order, so that none always follows the same other one. ``prime``: untimed calls before each
    timed one, so that it doesn't start with the caches of another callable. ``events`` (GPUs): device time between two events
    instead of host time. ``cold`` (GPUs): the same, and the second-level cache is filled with other data before each call.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    flush = cache_flush(device) if cuda and cold else None

    def timed(function: Callable[[], Any]) -> float:
        if flush is not None:
            flush()
        if cuda and (cold or events):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        if cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    for turn in range(rounds):
        for name, function in order if turn % 2 == 0 else reversed(order):
            for _ in range(prime):
                function()
            seconds[name].append(timed(function))
    return seconds


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    prime: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Median and spread of `samples`."""
    seconds = samples(functions, rounds=rounds, warmup=warmup, prime=prime, device=device)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: Sequence[float]) -> Timing:
    """Median and the 20th and 80th percentile of ``values`` in seconds."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def ratio(seconds: Sequence[float], base: Sequence[float], *, confidence: float = 0.95) -> Ratio:
    """``seconds`` over ``base``, round by round; both from one call of `samples`, so that a round's times are close together.

    With the sign-test interval of `interval`; at 95 % fewer than 6 rounds give the open interval (0, infinity).
    """
    if len(seconds) != len(base) or not len(base):
        raise ValueError(
            f"seconds and base must have the same number of rounds, at least 1, got {len(seconds)} and {len(base)}"
        )
    return interval([one / max(other, 1e-12) for one, other in zip(seconds, base, strict=True)], 1 - confidence)


def interval(values: Sequence[float], error: float) -> Ratio:
    """The median of ``values`` and an interval that misses the true median with at most the probability ``error``.

    The interval lies between two order statistics, by inverting the sign test: exact for any distribution, while a percentile bootstrap
    is too narrow for few values (Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2). Too few values give (0, infinity).
    """
    ordered, count = sorted(values), len(values)
    tail, place = 0.0, 0  # tail: probability that fewer than `place` + 1 of the values are below the true median
    while place < count // 2 and (tail := tail + math.comb(count, place) * 0.5**count) <= error / 2:
        place += 1
    if place == 0:
        return Ratio(statistics.median(ordered), 0.0, math.inf)
    return Ratio(statistics.median(ordered), ordered[place - 1], ordered[count - place])
