"""Whether other processes leave this one too little of the CPUs: computing time of a thread against wall time."""

from __future__ import annotations

import time

# Between steps on two idle cores the main thread computes for 0.9 of the time or more, also if it waits for other threads by sleeping.
ENOUGH = 0.7


class CpuShare:
    """The share of the wall time that the calling thread computed, since the object was made: near 1 for a loop that never waits.

    Far below 1, it waited: for other processes that use the CPUs, for threads of its own that do, or for files and workers. So it
    tells about other processes only in a loop that reads nothing.
    """

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.computed = time.thread_time()

    @property
    def seconds(self) -> float:
        """Wall time since the object was made."""
        return time.perf_counter() - self.begun

    @property
    def value(self) -> float:
        return min(1.0, (time.thread_time() - self.computed) / max(self.seconds, 1e-9))


class StarvationNotice:
    """Says once if steps that should compute all the time got too little of the CPUs. ``every``: seconds of steps between two looks."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.said = every, False
        self.seconds = self.computed = 0.0

    def add(self, step: CpuShare) -> str:
        """To be called at the end of each step, with the share begun at its start: the notice, or "" if there is none, or no longer."""
        seconds = step.seconds
        self.seconds += seconds
        self.computed += step.value * seconds
        if self.said or self.seconds < self.every:
            return ""
        value, seconds = self.computed / self.seconds, self.seconds
        self.seconds = self.computed = 0.0
        if value >= ENOUGH:
            return ""
        self.said = True
        return (
            f"this process computed in only {value:.0%} of the last {seconds:.0f} s of steps: others use the CPUs, and its threads wait for "
            "each other. End or pause the others, or use fewer threads (--threads 1)"
        )
