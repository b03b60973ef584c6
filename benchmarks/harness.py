"""The one way everything here is measured: verdict first, then times in turn, ratios with an interval, memory, share of a ceiling."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sfm_fast.measure.memory import is_out_of_memory, living_bytes, peak_memory
from sfm_fast.measure.timing import captured, interleaved, ratio, samples, summary

from .machine import memory_limit

SLOW = 15.0  # seconds a call: then the calls that warm up and check must do
GRAPH_CALLS = 50  # of one CUDA graph, so that the launch of the graph itself is no part of a call
GRAPH_LONGEST = 0.1  # seconds of such a graph: a longer call has no launch overhead worth asking for
REPLAYS = 200  # of a graph at most, and about a second of them
Row = dict[str, Any]


@dataclass
class Contender:
    """One way of doing a case's work.

    ``verdict``: "" if its result is right, else the status that its row gets instead of a time. ``first_seconds``: its first
    call in this process, with whatever that compiles, tunes or loads. ``facts`` go into its rows as they are. ``prepare`` is
    called before each timed call, outside the clock, and its result handed to ``call``.
    """

    name: str
    call: Callable[..., Any]
    verdict: str = ""
    first_seconds: float | None = None
    compiles: bool = False  # its first call says nothing about the others
    prepare: Callable[[], Any] | None = None
    graph: bool = False  # also time it as a CUDA graph, on a GPU
    facts: dict[str, Any] = field(default_factory=dict)


def status_of(error: BaseException) -> str:
    """An error of a contender, as the status of its row; errors that say nothing about the contender are raised again."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"unsupported: {error}"
    if isinstance(error, (RuntimeError, MemoryError, NotImplementedError)):
        return f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
    raise error


def attempt(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, str]:
    """(result, seconds, "") of one call under the memory limit; (None, 0, status) where it fails."""
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
    # Out here the error and with it the frames that held its tensors are gone.
    release(device)
    return None, 0.0, status


def release(device: torch.device) -> None:
    """Give back what nothing holds any more. Never raises: where a context is lost or a capture has failed, the next call says so."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def measure(
    contenders: Sequence[Contender],
    *,
    suite: str,
    case: Mapping[str, Any],
    mode: str,
    device: torch.device,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 300,
    memory: bool = True,
    cold: bool = False,
) -> list[Row]:
    """One row a contender, in their order; times are of calls in turn, ``seconds`` long for the slowest contender.

    ``case`` holds "case", its name, and its numbers; they go into every row. ``ratio`` is a contender's time over that of the first
    contender, so that above 1 is slower than ours. ``memory``: also ``peak_bytes`` beyond what stood before the call, and
    ``absolute_bytes`` with it. ``cold``: GPU inputs come from memory, not from its second-level cache.
    """
    once: dict[str, float] = {}
    for contender in contenders:
        if contender.verdict:
            continue
        known = contender.first_seconds
        if known is not None and known > SLOW and not contender.compiles:
            once[contender.name] = known
            continue
        _, spent, contender.verdict = attempt(functools.partial(_run, contender), device)
        if known is None and not contender.verdict:
            contender.first_seconds = spent
            if spent <= SLOW or contender.compiles:
                _, spent, contender.verdict = attempt(functools.partial(_run, contender), device)
        if not contender.verdict:
            once[contender.name] = spent
    timed = [contender for contender in contenders if not contender.verdict]
    slow = {contender.name for contender in timed if once[contender.name] > SLOW and contender.prepare is None}
    taken = {name: [once[name]] for name in slow}
    quick = [contender for contender in timed if contender.name not in slow]
    if quick:
        each = max(once[contender.name] for contender in quick)
        rounds = int(min(max_rounds, max(min_rounds, seconds / max(each, 1e-9))))
        taken |= _samples(quick, rounds, device, cold, prime=int(each < 0.2))
    rows = []
    for contender in contenders:
        row: Row = {"suite": suite, **case, "contender": contender.name, "mode": mode, **contender.facts}
        row["status"] = contender.verdict or "ok"
        rows.append(row)
        if contender.verdict:
            continue
        row |= asdict(summary(taken[contender.name]))
        base = taken.get(contenders[0].name)
        if base is not None:
            pairs = min(len(base), len(taken[contender.name]))  # one of a slow contender, many of a quick one
            row["ratio"] = asdict(ratio(taken[contender.name][:pairs], base[:pairs]))
        row["first_seconds"] = contender.first_seconds
        if memory and contender.prepare is None:
            standing = living_bytes(device)
            row["peak_bytes"] = peak_memory(functools.partial(_run, contender), device)
            row["absolute_bytes"] = standing + row["peak_bytes"]
        if contender.graph and device.type == "cuda" and contender.prepare is None:
            row["graph_microseconds"] = graph_microseconds(contender.call)
            if GRAPH_CALLS * row["graph_microseconds"] <= GRAPH_LONGEST * 1e6:
                row["graph50_microseconds"] = graph_microseconds(contender.call, GRAPH_CALLS)
    return rows


def _run(contender: Contender) -> Any:
    return contender.call() if contender.prepare is None else contender.call(contender.prepare())


def _samples(
    contenders: Iterable[Contender], rounds: int, device: torch.device, cold: bool, prime: int
) -> dict[str, list[float]]:
    plain = [contender for contender in contenders if contender.prepare is None]
    prepared = [contender for contender in contenders if contender.prepare is not None]
    found: dict[str, list[float]] = {}
    if plain:
        calls = {contender.name: contender.call for contender in plain}
        found |= samples(calls, rounds=rounds, warmup=0, prime=prime, device=device, cold=cold)
    for turn in range(rounds):
        for contender in prepared if turn % 2 == 0 else reversed(prepared):
            assert contender.prepare is not None
            ready = contender.prepare()
            once = {contender.name: functools.partial(contender.call, ready)}
            taken = samples(once, rounds=1, warmup=0, device=device, cold=False)
            found.setdefault(contender.name, []).extend(taken[contender.name])
            del ready, once
    return found


def graph_microseconds(function: Callable[[], object], calls: int = 1) -> float:
    """Device time of a call under a CUDA graph, in microseconds: the median of single replays.

    One call a graph comes with a cold second-level cache and the graph's launch; of several in one graph, a call is warm and
    without it.
    """

    def several() -> None:
        for _ in range(calls):
            function()

    graph, _ = captured(several, warmup=3 if calls == 1 else 1)

    def replay(rounds: int) -> list[float]:
        return samples({"graph": graph.replay}, rounds=rounds, device="cuda", cold=calls == 1, events=True)["graph"]

    (once,) = replay(1)
    return summary(replay(min(REPLAYS, max(5, int(1 / max(once, 1e-9)))))).median * 1e6 / calls


def share_of(
    row: Row, ceilings: Mapping[str, float], *, least_bytes: float = 0, flops: float = 0, rate: str = "matmul_rate"
) -> Row:
    """Share of the measured ceilings that ``row`` reaches: bytes it must move over copy bandwidth, operations over the products' rate.

    rate: which of the ceilings its products have; another than "matmul_rate" is named in the row, as ``matmul_ceiling``.
    """
    if row["status"] != "ok":
        return {}
    found: Row = dict(ceilings)
    if least_bytes:
        found["copy_fraction"] = least_bytes / row["median"] / ceilings["copy_bandwidth"]
    if flops:
        found |= {"flops": flops, "matmul_fraction": flops / row["median"] / ceilings[rate]}
        if rate != "matmul_rate":
            found["matmul_ceiling"] = rate
    return found


def benchmark_rows(
    benchmark: Any, rows: Sequence[Row], call: Callable[[], Any], others: Mapping[str, Callable[[], Any]]
) -> None:
    """Hand a case to pytest-benchmark: ``call`` is its own measurement, ``others`` run in turn with it, rows ride along.

    Raises ``AssertionError`` where a row has a wrong result.
    """
    assert not [row for row in rows if row["status"].startswith("wrong")]
    between: dict[str, list[float]] = {name: [] for name in others}

    def setup() -> None:
        for name, other in others.items():
            between[name].append(interleaved({name: other}, rounds=1, warmup=0)[name].median)

    benchmark.pedantic(call, setup=setup, rounds=15, warmup_rounds=1)
    benchmark.extra_info["rows"] = list(rows)
    if benchmark.stats is not None:  # none where pytest-benchmark is disabled
        own = benchmark.stats.stats.data
        ratios = {name: asdict(ratio(taken[-len(own) :], own)) for name, taken in between.items()}
        benchmark.extra_info["ratio_to_this"] = ratios
