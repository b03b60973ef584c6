"""Lines that say what a long computation is doing, and running independent parts of it at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ..errors import InputError

Result = TypeVar("Result")

EVERY = 8.0  # seconds; a user should not wait ten seconds for a sign of life


class Pulse:
    """Within the context, calls ``say`` every `EVERY` seconds with the time so far and the current `state`, from a thread of its own.

    A thread, because some parts (a fit, a profiled step) can't call back. ``shown``: False prints nothing.
    """

    def __init__(self, say: Callable[[str], None], shown: bool = True) -> None:
        self.say, self.shown = say, shown
        self.state: dict[str, str] = {}  # what each part that runs at the moment is doing
        self.begun = time.perf_counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def seconds(self) -> float:
        """Wall time since the object was made."""
        return time.perf_counter() - self.begun

    def part(self, title: str) -> None:
        """Print the title of the part that begins now, and forget the state of the last one."""
        self.state = {}
        self.say(title)

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            told = ", ".join(f"{name} {state}".strip() for name, state in list(self.state.items()))
            self.say(f"  {self.seconds:.0f} s: {told or 'computing'}")

    def __enter__(self) -> Pulse:
        if self.shown:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self.shown:
            self._thread.join()


class Together:
    """Runs independent jobs at the same time on CPUs, each with its share of torch's threads.

    Small steps gain little from a second thread, which waits for the first one many times per step: two jobs with one thread each take
    less time than one after the other with two. On other devices, or with a single thread, the jobs run one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.threads = torch.get_num_threads()
        self.device, self._stopped = device, False

    def check(self) -> None:
        """Raise ``InputError`` if another job failed or the user stopped the program; jobs that take long call this from time to time."""
        if self._stopped:
            raise InputError("another part of the computation failed or was stopped")

    def run(self, jobs: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
        """The results of all jobs, in their order; raises the error of the first one that failed."""
        workers = min(self.threads, len(jobs)) if self.device.type == "cpu" else 1
        if workers < 2:
            return {name: job() for name, job in jobs.items()}
        share = self.threads // workers
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
                waiting = {name: pool.submit(job) for name, job in jobs.items()}
                try:
                    done, _ = wait(waiting.values(), return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    return {name: future.result() for name, future in waiting.items()}
                except BaseException:  # also KeyboardInterrupt: leaving the pool waits for the jobs
                    self._stopped = True
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(self.threads)
