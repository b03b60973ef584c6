"""Decides whether the time ratio of two callables is at most a limit, from interleaved rounds with a control.

The decision, and how it avoids false passes and failures:

* A round times the function, the baseline and the baseline again (the control), each for about as long as the others, in a random
  order. The load of the machine doesn't depend on this order, so for a function as fast as its baseline the ratio is as likely
  above 1 as below, at any load.
* The ratios of a look are summarised by their median and the interval between two order statistics (by inverting the sign test):
  exact for any distribution of ratios, while a percentile bootstrap is too narrow for few rounds. Source: Conover,
  Practical Nonparametric Statistics, 3rd ed., section 3.2.
* Repeated looks would increase the probability of an error. Look k therefore uses the error (1 - confidence) / 2^k, so that the
  sum over all looks stays below 1 - confidence. Every look doubles the rounds, which compensates for the stricter interval.
* To pass, the interval of all rounds so far must be below the limit. To fail, it must be above, and so must the intervals of two
  separate batches: the rounds before this look and those of this look (or halves of the first look if there is no time for
  another), so that a single long disturbance isn't enough. The error of each batch is chosen such that its square is the look's.
* If the control's interval excludes 1 by a margin, the look decides nothing.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..measure.timing import Ratio, interval

PASSED, FAILED, INCONCLUSIVE = "passed", "failed", "inconclusive"
CONTROL_DRIFT = 1.05  # if the control's whole interval is further from 1 than this factor, the look decides nothing
SAMPLE_SECONDS = 2e-3  # in shorter samples the clock and the loop around the call matter
CALIBRATION_SECONDS = 0.1

Round = tuple[float, float, float]  # seconds of one call: function, baseline, control


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. ``reason`` says why it passed, failed or is inconclusive."""

    verdict: str
    ratio: Ratio
    control: Ratio
    rounds: int
    reason: str


def compare(
    measure: Callable[[int], Sequence[Round]],
    at_most: float,
    *,
    confidence: float = 0.95,
    rounds: int = 30,
    retries: int = 3,
    seconds: float = 60.0,
) -> Comparison:
    """Decide whether function / baseline is at most ``at_most``; ``measure(n)`` returns n more rounds.

    The first look has ``rounds`` rounds; each of at most ``retries`` more looks doubles them, and none starts after ``seconds``.
    Raises ``InputError`` for numbers out of range.
    """
    check_options(at_most, confidence, rounds, retries, seconds)
    started = time.perf_counter()
    every: list[Round] = []
    for look in range(1, retries + 2):
        error = (1 - confidence) / 2**look
        half = (2 * error) ** 0.5  # (half / 2)^2 = error / 2: both batches have to err on the same side
        earlier, fresh = every, list(measure(len(every) or rounds))
        every = earlier + fresh
        ratio = interval([function / baseline for function, baseline, _ in every], error)
        control = interval([second / baseline for _, baseline, second in every], error)
        late = time.perf_counter() - started > seconds
        seen = f"ratio {_text(ratio)}, control {_text(control)} in {len(every)} rounds"
        if control.low > CONTROL_DRIFT or control.high < 1 / CONTROL_DRIFT:
            why = f"the ratio of the baseline to itself is {_text(control)} instead of 1: the machine is too busy"
        elif ratio.high <= at_most:
            return Comparison(PASSED, ratio, control, len(every), seen)
        elif ratio.low > at_most and all(_low(part, half) > at_most for part in _batches(earlier, fresh, late)):
            return Comparison(FAILED, ratio, control, len(every), seen)
        else:
            why = f"the interval {ratio.low:.3f} to {ratio.high:.3f} isn't clearly below or above the limit {at_most:g}"
        if late:
            why += f" (stopped after {seconds:g} s)"
            break
    return Comparison(INCONCLUSIVE, ratio, control, len(every), f"{why}; {seen}")


def _batches(earlier: list[Round], fresh: list[Round], late: bool) -> list[list[Round]]:
    """The two batches that must both fail; if there is no time for a second look, the halves of the first."""
    if earlier:
        return [earlier, fresh]
    middle = len(fresh) // 2
    return [fresh[:middle], fresh[middle:]] if late else [fresh, []]


def check_options(at_most: float, confidence: float, rounds: int, retries: int, seconds: float) -> None:
    """Raise ``InputError`` for a number that `compare` can't work with."""
    if not (isinstance(at_most, (int, float)) and 0 < at_most < math.inf):
        raise InputError(f"at_most must be a positive ratio, got {at_most!r}")
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence must be from 0.5 to below 1, got {confidence!r}")
    if not (isinstance(rounds, int) and rounds >= 5):
        raise InputError(f"rounds must be an integer of at least 5, got {rounds!r}")
    if not (isinstance(retries, int) and 1 <= retries <= 10):
        raise InputError(f"retries must be 1 to 10 (a failure is always confirmed by a second batch), got {retries!r}")
    if not seconds > 0:
        raise InputError(f"seconds must be positive, got {seconds!r}")


def rounds_of(
    function: Callable[[], Any], baseline: Callable[[], Any], device: torch.device | str, seed: int = 0
) -> Callable[[int], list[Round]]:
    """``measure`` for `compare`, with real times on ``device``. Each callable must have been called once before.

    Every sample lasts at least `SAMPLE_SECONDS` and about equally long: the faster callable is called more often in it, so that all
    are interrupted equally often.
    """
    order = random.Random(seed)
    callables = {"function": function, "baseline": baseline, "control": baseline}
    slow, fast = _quickest(function, device), _quickest(baseline, device)
    target = max(SAMPLE_SECONDS, slow, fast)
    repeats = {name: max(1, round(target / (slow if name == "function" else fast))) for name in callables}

    def measure(count: int) -> list[Round]:
        taken: list[Round] = []
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for _ in range(count):
                names = list(callables)
                order.shuffle(names)
                times = {name: _sample(callables[name], repeats[name], device) / repeats[name] for name in names}
                taken.append((times["function"], times["baseline"], times["control"]))
        finally:
            if collecting:
                gc.enable()
        return taken

    return measure


def _sample(call: Callable[[], Any], repeats: int, device: torch.device | str) -> float:
    """Seconds of ``repeats`` calls: wall time, on a CPU without the time that this thread waited for a core.

    Linux records this waiting time (sched(7), /proc/thread-self/schedstat), which other programs cause. Time for sleeping, reading
    and waiting for the callable's other threads is included. On other systems, and on a GPU, it is plain wall time.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
        return max(time.perf_counter() - started, 1e-9)
    waited, own, whole, started = _waited(), time.thread_time(), time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed, own, whole = time.perf_counter() - started, time.thread_time() - own, time.process_time() - whole
    # This thread may have waited for a core that the call's other threads used; that time belongs to the call.
    by_others = max(0.0, _waited() - waited - max(0.0, whole - own))
    # The clocks are read one after the other, so make sure that the result isn't less than the thread's own work.
    return max(elapsed - by_others, own, 1e-9)


def _waited() -> float:
    """Seconds that this thread has waited for a core since it started; 0 if the system doesn't record it."""
    try:
        with open("/proc/thread-self/schedstat", "rb", buffering=0) as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _quickest(call: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds of one undisturbed call: the minimum of many, so that the lengths of samples are chosen correctly."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 25 and sum(seconds) < CALIBRATION_SECONDS):
        seconds.append(_sample(call, 1, device))
    return min(seconds)


def _low(rounds: Sequence[Round], error: float) -> float:
    return 0.0 if not rounds else interval([function / baseline for function, baseline, _ in rounds], error).low


def _text(ratio: Ratio) -> str:
    return f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
