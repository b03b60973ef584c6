"""What to do when a test has broken its process's CUDA context: nothing after it could pass, so the process ends.

An illegal memory access stays: every later call of CUDA in that process fails with it, and tests that are right would look
wrong. Under pytest-xdist the worker ends and another takes its place; alone, the run ends with a line that says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

CODE = 86  # of a process that ended for this: no code of pytest's own


def synchronize() -> None:
    """Wait for the GPU where this process has used one; raises where its context is lost."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class LostContext:
    """A pytest plugin. ``synchronize`` raises where the context is lost; ``leave`` ends a worker's process at once."""

    def __init__(
        self,
        synchronize: Callable[[], None] = synchronize,
        leave: Callable[[int], None] = os._exit,
        worker: bool | None = None,
    ) -> None:
        self.synchronize, self.leave = synchronize, leave
        self.worker = "PYTEST_XDIST_WORKER" in os.environ if worker is None else worker
        self.failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """After the last report of a failed test: all that is known of it has been sent."""
        self.failed = False
        result = yield
        if self.failed:
            self.check(item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def check(self, name: str) -> None:
        """End the process if the GPU no longer answers."""
        try:
            self.synchronize()
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"the CUDA context of this process is lost after {name}: {reason}"
            if not self.worker:
                pytest.exit(message, returncode=CODE)
            os.write(2, f"{message}; another worker takes its place\n".encode())  # sys.stderr may be captured
            self.leave(CODE)
