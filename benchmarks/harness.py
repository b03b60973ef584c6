"""How all benchmarks measure: verdict first, then times in turn, ratios with an interval, memory, share of a ceiling."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sfm_fast.errors import reason_of
from sfm_fast.measure.memory import is_out_of_memory, living_bytes, peak_memory
from sfm_fast.measure.starvation import CpuShare
from sfm_fast.measure.timing import Ratio, captured, ratio, samples, summary

from .machine import memory_limit
from .rows import Row

SLOW = 15.0  # seconds per call; beyond it, only the calls for warming up and checking are timed
GRAPH_CALLS = 50  # of one CUDA graph, so that the launch of the graph hardly counts
GRAPH_LONGEST = 0.1  # seconds of such a graph; in longer calls the launch overhead doesn't matter
REPLAYS = 200  # of a graph at most, for about a second


@dataclass
class Contender:
    """One way of doing a case's work.

    ``row``: the fields that don't depend on the measurement, among them its name, ``ours`` and ``compiled``. ``verdict``: "" if
    its result is right, else the status that its row gets instead of a time. ``first_seconds``: its first call in this process,
    including compiling, tuning and loading. ``prepare`` is called before each timed call, outside the measured time, and its
    result is passed to ``call``. ``graph``: also time it as a CUDA graph, on a GPU.
    """

    row: Row
    call: Callable[..., Any]
    verdict: str = ""
    first_seconds: float | None = None
    prepare: Callable[[], Any] | None = None
    graph: bool = False

    @property
    def name(self) -> str:
        return self.row.contender

    def run(self) -> Any:
        return self.call() if self.prepare is None else self.call(self.prepare())


@dataclass(frozen=True)
class Plan:
    """How much is measured: ``seconds`` long for the slowest contender, in ``least`` to ``most`` rounds.

    Fewer than 6 rounds have no 95 % interval. memory: also peak bytes. cold: GPU inputs come from memory, not from the L2 cache.
    """

    seconds: float
    least: int = 6
    most: int = 300
    memory: bool = True
    cold: bool = False


def status_of(error: BaseException) -> str:
    """The status of a contender's row after an error; errors that aren't about the contender are raised again."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"unsupported: {error}"
    if isinstance(error, (RuntimeError, MemoryError, NotImplementedError)):
        return f"failed: {reason_of(error)[:120]}"
    raise error


def attempt(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, str]:
    """(result, seconds, "") of one call under the memory limit; (None, 0, status) if it fails."""
    started = time.perf_counter()
    try:
        with memory_limit(device):
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Exception as error:
        status = status_of(error)
    else:
        return result, time.perf_counter() - started, ""
    # Here the error is gone, and with it the frames that held its tensors.
    release(device)
    return None, 0.0, status


def release(device: torch.device) -> None:
    """Free unused memory. Never raises: if a context is lost or a capture has failed, the next call raises."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def measure(contenders: Sequence[Contender], device: torch.device, plan: Plan) -> list[Row]:
    """One row per contender, in their order; times are of calls in turn, ratios relative to the first contender: above 1 is slower."""
    once = _first_calls(contenders, device)
    timed = [contender for contender in contenders if not contender.verdict]
    slow = {contender.name for contender in timed if once[contender.name] > SLOW and contender.prepare is None}
    taken = {name: [once[name]] for name in slow}
    quick = [contender for contender in timed if contender.name not in slow]
    share = CpuShare()
    if quick:
        each = max(once[contender.name] for contender in quick)
        rounds = int(min(plan.most, max(plan.least, plan.seconds / max(each, 1e-9))))
        taken |= _samples(quick, rounds, device, plan.cold, prime=int(each < 0.2))
    cpu_share = round(share.value, 3) if quick and device.type == "cpu" else None
    base = taken.get(contenders[0].name)
    rows = [_row(contender, taken.get(contender.name), base, device, plan) for contender in contenders]
    return [replace(row, cpu_share=cpu_share if row.measured else None) for row in rows]


def _first_calls(contenders: Iterable[Contender], device: torch.device) -> dict[str, float]:
    """Seconds of the second call of each working contender. Sets the verdict of failing ones, and ``first_seconds`` if unknown."""
    once: dict[str, float] = {}
    for contender in contenders:
        if contender.verdict:
            continue
        known = contender.first_seconds
        if known is not None and known > SLOW and not contender.row.compiled:
            once[contender.name] = known
            continue
        _, spent, contender.verdict = attempt(contender.run, device)
        if known is None and not contender.verdict:
            contender.first_seconds = spent
            if spent <= SLOW or contender.row.compiled:
                _, spent, contender.verdict = attempt(contender.run, device)
        if not contender.verdict:
            once[contender.name] = spent
    return once


def _row(
    contender: Contender, taken: list[float] | None, base: list[float] | None, device: torch.device, plan: Plan
) -> Row:
    row = replace(contender.row, status=contender.verdict or "ok")
    if contender.verdict or taken is None:
        return row
    row.take(summary(taken))
    if taken is base:
        row.ratio = Ratio(1.0, 1.0, 1.0)
    elif base is not None:
        pairs = min(len(base), len(taken))  # one for a slow contender, many for a fast one
        row.ratio = ratio(taken[:pairs], base[:pairs])
    row.first_seconds = contender.first_seconds
    if plan.memory and contender.prepare is None:
        standing = living_bytes(device)
        row.peak_bytes = peak_memory(contender.run, device)
        row.absolute_bytes = standing + row.peak_bytes
    if contender.graph and device.type == "cuda" and contender.prepare is None:
        row.graph_microseconds = graph_microseconds(contender.call)
        if GRAPH_CALLS * row.graph_microseconds <= GRAPH_LONGEST * 1e6:
            row.graph50_microseconds = graph_microseconds(contender.call, GRAPH_CALLS)
    return row


def _samples(
    contenders: Iterable[Contender], rounds: int, device: torch.device, cold: bool, prime: int
) -> dict[str, list[float]]:
    plain = {contender.name: contender.call for contender in contenders if contender.prepare is None}
    prepared = [contender for contender in contenders if contender.prepare is not None]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in prepared}
    if plain:
        seconds |= samples(plain, rounds=rounds, warmup=0, prime=prime, device=device, cold=cold)
    for turn in range(rounds):
        for contender in prepared if turn % 2 == 0 else reversed(prepared):
            assert contender.prepare is not None
            ready = contender.prepare()
            once = {contender.name: functools.partial(contender.call, ready)}
            seconds[contender.name] += samples(once, rounds=1, warmup=0, device=device)[contender.name]
            del ready, once
    return seconds


def graph_microseconds(function: Callable[[], object], calls: int = 1) -> float:
    """Device time of a call under a CUDA graph, in microseconds: the median of single replays.

    With one call per graph, the L2 cache is cold and the graph's launch counts; with several, the cache is warm and the
    launch hardly counts.
    """

    def several() -> None:
        for _ in range(calls):
            function()

    graph, _ = captured(several, warmup=3 if calls == 1 else 1)

    def replay(rounds: int) -> list[float]:
        return samples({"graph": graph.replay}, rounds=rounds, device="cuda", cold=calls == 1, events=True)["graph"]

    (once,) = replay(1)
    return summary(replay(min(REPLAYS, max(5, int(1 / max(once, 1e-9)))))).median * 1e6 / calls


def add_share(
    row: Row, ceilings: Mapping[str, float], *, least_bytes: float = 0, flops: int = 0, rate: str = "matmul_rate"
) -> None:
    """Put the ceilings into a measured row, and the share of them that it reaches: the bytes it must move over copy bandwidth,
    and its operations over the rate of matrix products.

    rate: the ceiling of its products; if it isn't "matmul_rate", the row names it as ``matmul_ceiling``.
    """
    if not row.measured:
        return
    for name, value in ceilings.items():
        setattr(row, name, value)
    if least_bytes:
        row.copy_fraction = least_bytes / row.seconds / ceilings["copy_bandwidth"]
    if flops:
        row.flops, row.matmul_fraction = flops, flops / row.seconds / ceilings[rate]
        if rate != "matmul_rate":
            row.matmul_ceiling = rate
