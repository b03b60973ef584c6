"""Run a list of stages, each with its own time limit: no stage stops the next one, and nothing runs longer than planned.

It uses only the standard library, since it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 3.0  # seconds between the interrupt, after which a stage may still print its results, and the kill
SAID = "== "  # lines of a stage's output with this prefix go into the summary
TOOLS_SAY = (
    "========= ERROR SUMMARY",
    "========= Error",
    "==ERROR==",
)  # and these, of compute-sanitizer and ncu, the first few
FEW = 6


class PlanError(Exception):
    """A plan that exceeds its time."""


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take, grace included.

    grace: seconds of the limit between the interrupt and the end. log: the file in the results' folder that its output is appended to. needed: whether it runs at all, asked when its turn comes.
    more: seconds that it may take beyond its limit if earlier stages have left that many.
    """

    name: str
    limit: float
    command: Sequence[str]
    log: str
    needed: Callable[[], bool] = lambda: True
    environment: Mapping[str, str] | None = None
    more: float = 0.0
    grace: float = GRACE


class Summary:
    """Lines that are written to the file and to the screen at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a")
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def check(stages: Sequence[Stage], most: float) -> float:
    """The sum of the limits in seconds. Raises `PlanError` if it exceeds ``most``, or if a limit leaves no time."""
    total = sum(stage.limit for stage in stages)
    if total > most:
        raise PlanError(f"the stages' limits add up to {total:g} s, more than {most:g} s")
    for stage in stages:
        if stage.limit <= stage.grace:
            raise PlanError(
                f"stage {stage.name}: its limit of {stage.limit:g} s must be more than the grace of {stage.grace:g} s"
            )
    return total


def run(stages: Sequence[Stage], folder: Path, summary: Summary, *, most: float, root: Path) -> list[str]:
    """Run the stages in order in ``root``; returns the names of failed ones. ``summary`` gets the plan and a line per stage."""
    total = check(stages, most)
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as shells leave it to what runs in the background; stages would inherit it
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
    plan = ", ".join(f"{stage.name} {stage.limit:g}" for stage in stages)
    summary.say(f"plan: {plan}; together at most {total:g} s of {most:g}")
    failed, spare = [], 0.0
    for stage in stages:
        if not stage.needed():
            summary.say(f"{stage.name}: not needed")
            spare += stage.limit
            continue
        limit = stage.limit + min(stage.more, spare)
        status, seconds = _run(stage, limit, folder, summary, root)
        spare = max(0.0, spare + stage.limit - seconds)
        if status != "ok":
            failed.append(stage.name)
        summary.say(f"{stage.name}: {status}, {seconds:.1f} s of {limit:.0f}")
    return failed


def _run(stage: Stage, limit: float, folder: Path, summary: Summary, root: Path) -> tuple[str, float]:
    started = time.monotonic()
    with (folder / stage.log).open("ab") as log:
        log.write(f"---- {stage.name}: {' '.join(stage.command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=root,
                env={**os.environ, **(stage.environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"did not start ({error.strerror}: {stage.command[0]})", time.monotonic() - started
        reader = threading.Thread(target=_copy, args=(process, log, summary), daemon=True)
        reader.start()
        status = _wait(process, limit - stage.grace, stage.grace)
        # The process group may keep the pipe open after its leader has ended.
        reader.join(0.5)
        _signal(process, signal.SIGKILL)
        reader.join(0.5)
    return status, time.monotonic() - started


def _copy(process: subprocess.Popen[bytes], log: object, summary: Summary) -> None:
    assert process.stdout is not None
    few = FEW
    for raw in process.stdout:
        log.write(raw)  # type: ignore[attr-defined]
        log.flush()  # type: ignore[attr-defined]
        line = raw.decode(errors="replace").rstrip("\n")
        if line.startswith(SAID):
            summary.say("  " + line.removeprefix(SAID))
        elif few and line.startswith(TOOLS_SAY):
            few -= 1
            summary.say("  " + line.lstrip("= "))


def _wait(process: subprocess.Popen[bytes], seconds: float, grace: float) -> str:
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        try:
            process.wait(grace - 1)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in a driver may survive
                process.wait(1)
        return "stopped at its limit"
    return "ok" if code == 0 else f"failed with {code}"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]
