"""The other end of `worker`: starts one on a built tree, asks it, and tells a died one from one that can't do something."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sfm_fast.measure import timing as perf

from . import worker

TIMEOUT = 600.0  # seconds for one answer


class WorkerError(Exception):
    """The tree can't do what was asked, or its process died of it; the message says why."""


class Client:
    """A worker process on ``tree``; to be used in a ``with`` statement.

    Two of these take turns on a machine that may have two cores: waiting threads must sleep, not spin.
    """

    def __init__(self, tree: Path, *, device: str, threads: int) -> None:
        self.tree, self.device, self.threads = tree, device, threads
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed by stop)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(worker.__file__), str(self.tree), str(perf.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(self.tree, self.threads),
        )
        self._ask(do="start", device=self.device, threads=self.threads)

    def stop(self) -> None:
        """End the process; the next question starts a new one."""
        if self.process is None:
            return
        self.process.kill()
        self.process.communicate()
        self.log.close()
        self.process = None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises `WorkerError` with the worker's reason."""
        if self.process is None:
            self.start()
        return self._ask(do=do, **request)

    def _ask(self, **request: Any) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            ready = select.select([process.stdout], [], [], TIMEOUT)[0]
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = [process.stdout], ""
        if not line:
            raise WorkerError(self._last_words(bool(ready)))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self, died: bool) -> str:
        assert self.process is not None
        why = f"its process ended with code {self.process.wait(TIMEOUT)}" if died else f"no answer in {TIMEOUT:.0f} s"
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        self.stop()
        return f"{why}: {lines[-1]}" if lines else why


def environment(tree: Path, threads: int) -> dict[str, str]:
    """Of a process that measures ``tree``."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    quiet = {"KINETO_LOG_LEVEL": "6", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    return {**inherited, **quiet, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
