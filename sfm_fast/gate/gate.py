"""Assertions about cost for tests (memory budgets, time ratios, values that must not grow), used by pytest's fixture `performance_gate`."""

from __future__ import annotations

import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from ..errors import InputError
from ..measure.memory import peak_memory
from ..measure.timing import Ratio
from ..options import number_of
from ..units import memory, parse_bytes, percent
from .baseline import UPDATED, Measurement, read_baseline
from .paired import FAILED, INCONCLUSIVE, PASSED, check_options, compare, rounds_of

FELL_TO_NOTHING = "the count is 0, so the work may have been replaced by work that isn't counted; compare times instead"
POLICIES = ("skip", "fail", "pass")


class Gate:
    """One test's assertions. ``record`` is called with every measurement, in a form that JSON can hold, whether it passes or fails.

    Args:
        test: the test's name in the report.
        record: called with each measurement; by default it does nothing.
        inconclusive: outcome of a ratio that can't be decided: "skip" or "fail" the test, or "pass" (continue).
        baseline: the JSON file of `unchanged`.
        update: `unchanged` accepts every value; `update_baseline` writes them from the records afterwards.
        pythonpath: folders that the process of `instructions` can import from.
    """

    def __init__(
        self,
        test: str = "",
        *,
        record: Callable[[Measurement], None] = lambda measurement: None,
        inconclusive: str = "skip",
        baseline: Path | str = "performance-baseline.json",
        update: bool = False,
        pythonpath: Sequence[str] = (),
    ) -> None:
        if inconclusive not in POLICIES:
            raise InputError(f"inconclusive must be one of {', '.join(POLICIES)}, got {inconclusive!r}")
        self.test, self.record, self.inconclusive, self.update = test, record, inconclusive, update
        self.baseline, self.pythonpath = Path(baseline), list(pythonpath)

    def peak_memory(
        self, function: Callable[[], Any], at_most: str | int, device: torch.device | str | None = None
    ) -> int:
        """Assert that ``function()`` allocates at most ``at_most`` (bytes, "200MB", "1GiB") beyond earlier allocations; returns the peak.

        It is called once before the measurement, so that one-time set-up doesn't count. ``device`` None: the GPU if that call
        allocated memory there, else the CPU, where torch's allocator is counted (not a library's own malloc or numpy's).
        """
        __tracebackhide__ = True
        limit = parse_bytes(at_most)
        measured = self.allocated(function, device)
        text = f"{memory(measured, 2)} of at most {memory(limit, 2)}"
        if measured > limit:
            text += f", {memory(measured - limit, 2)} ({_percent(measured, limit)}) over"
        verdict = PASSED if measured <= limit else FAILED
        self._note(what="peak memory", verdict=verdict, text=text, measured=measured, limit=limit, unit="bytes")
        if measured > limit:
            raise AssertionError(f"peak memory: {text}")
        return measured

    def ratio(
        self,
        function: Callable[[], Any],
        baseline: Callable[[], Any],
        at_most: float = 0.5,
        *,
        confidence: float = 0.95,
        rounds: int = 30,
        retries: int = 3,
        seconds: float = 60.0,
        device: torch.device | str | None = None,
    ) -> Ratio:
        """Assert that ``function()`` takes at most ``at_most`` times as long as ``baseline()``; returns the ratio.

        Passes if the ratio's interval is below the limit, fails if it is above the limit in two separate batches, and is
        inconclusive otherwise, or if the baseline's ratio to itself isn't 1; see `sfm_fast.gate.paired`. The first look has
        ``rounds`` rounds of three samples; up to ``retries`` more looks double them; none starts after ``seconds``.
        ``device`` None: the GPU if this process uses one.
        """
        __tracebackhide__ = True
        check_options(at_most, confidence, rounds, retries, seconds)
        _complete(function(), "function")
        _complete(baseline(), "baseline")
        if device is None:
            device = "cuda" if torch.cuda.is_initialized() else "cpu"
        comparison = compare(
            rounds_of(function, baseline, device),
            at_most,
            confidence=confidence,
            rounds=rounds,
            retries=retries,
            seconds=seconds,
        )
        ratio = comparison.ratio
        text = f"limit {at_most:g}; {comparison.reason}"
        self._note(
            what="time ratio", verdict=comparison.verdict, text=text, measured=ratio.median, limit=at_most,
            low=ratio.low, high=None if math.isinf(ratio.high) else ratio.high, control=comparison.control.median,
            rounds=comparison.rounds,
        )  # fmt: skip
        if comparison.verdict == FAILED:
            raise AssertionError(
                f"time ratio {ratio.median:.3f} is {_percent(ratio.median, at_most)} over the limit: {text}"
            )
        if comparison.verdict == INCONCLUSIVE:
            self._undecided(f"inconclusive: {text}")
        return ratio

    def unchanged(self, name: str, value: float, *, tolerance: float = 0.01, unit: str = "") -> None:
        """Assert that a deterministic ``value`` is at most ``tolerance`` (a fraction) above the one in the baseline file.

        A smaller value passes and is reported as an improvement, but 0 fails if the baseline isn't 0, because uncounted work may
        have replaced the counted work. Raises ``InputError`` if the file is damaged or has another unit, AssertionError if the
        value grew or the file has no such ``name``; ``--gate-update`` writes it.
        """
        __tracebackhide__ = True
        if not name or not isinstance(name, str):
            raise InputError(f"name must be a non-empty string, got {name!r}")
        if not 0 <= number_of(value) < math.inf:
            raise InputError(f"value of {name!r} must be a finite number of at least 0, got {value!r}")
        value = (
            int(value) if isinstance(value, numbers.Integral) else float(value)
        )  # numpy's too; records travel as JSON
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance must be a fraction from 0 to below 1, got {tolerance!r}")

        def note(verdict: str, text: str, limit: float | None) -> None:
            self._note(what="unchanged", name=name, verdict=verdict, text=text, measured=value, limit=limit, unit=unit)

        known = read_baseline(self.baseline).get(name)
        measured = f"{value:,} {unit}".strip()
        if self.update:
            note(UPDATED, measured, value)
            return
        if known is None:
            text = (
                f"{measured}, but {self.baseline} has no {name!r}: run pytest with --gate-update, and commit the file"
            )
            note(FAILED, text, None)
            raise AssertionError(text)
        if known["unit"] != unit:
            raise InputError(f"unit of {name!r} must be {known['unit']!r} as in {self.baseline}, got {unit!r}")
        limit = known["value"]
        text = f"{measured}, baseline {limit:,}"
        if not value and limit:
            text += f": {FELL_TO_NOTHING}; if the work is really gone, run with --gate-update"
            note(FAILED, text, limit)
            raise AssertionError(f"{name}: {text}")
        grown = value > limit * (1 + tolerance)
        if value != limit:
            text += f" ({_percent(value, limit)})"
        if value < limit * (1 - tolerance):
            text += "; improved: run with --gate-update to keep it"
        if grown:
            text += f", more than {tolerance:.1%} over"
            if known["torch"] != torch.__version__:
                text += f"; the baseline was measured with torch {known['torch']}, but this is {torch.__version__}"
        note(FAILED if grown else PASSED, text, limit)
        if grown:
            raise AssertionError(f"{name}: {text}")

    def flops(self, function: Callable[[], Any]) -> int:
        """Floating-point operations of the matrix products, convolutions and attention in ``function()``, by torch's formulas.

        Element-wise operations, sums, and the package's own C++ operations aren't counted: use `instructions` or `ratio` for them.
        """
        from ..measure.tracker import Tracker

        with Tracker() as tracker:
            _complete(function(), "function")
        return int(tracker.flops)

    def allocated(self, function: Callable[[], Any], device: torch.device | str | None = None) -> int:
        """Peak bytes that ``function()`` allocates, after a warm-up call; see `peak_memory`."""
        before = 0
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        _complete(function(), "function")
        if device is None:
            on_gpu = torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > before
            device = "cuda" if on_gpu else "cpu"
        return peak_memory(function, device)

    def instructions(self, setup: str, statement: str, library: str | None = None) -> int:
        """CPU instructions of ``statement`` (Python source) after ``setup``, counted by callgrind in a separate process.

        ``library``: only those inside that shared library, e.g. "sfm_fast/_C", which repeats exactly; see `callgrind`.
        """
        from .callgrind import count_instructions

        counts = count_instructions(setup, {"statement": statement}, library=library, pythonpath=self.pythonpath)
        return counts["statement"]

    def _note(self, **measurement: Unpack[Measurement]) -> None:
        self.record({"test": self.test, "name": "", "unit": "", **measurement})

    def _undecided(self, text: str) -> None:
        __tracebackhide__ = True
        if "pytest" not in sys.modules:  # outside of pytest, the user's script reads the record
            return
        import pytest

        if self.inconclusive == "skip":
            pytest.skip(text)
        if self.inconclusive == "fail":
            pytest.fail(text)


def _complete(result: Any, argument: str) -> None:
    """Raise ``InputError`` if a call returned a generator or coroutine, which hasn't done its work yet."""
    if inspect.isgenerator(result) or inspect.iscoroutine(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise InputError(
            f"{argument} must do its work when it is called, got a {type(result).__name__}: run it inside the function"
        )


def _percent(value: float, limit: float) -> str:
    return percent(value / limit - 1) if limit else "the baseline is 0"
