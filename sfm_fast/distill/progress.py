"""A run's progress bar, log (JSON lines, TensorBoard), memory peak and signals."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypedDict

import torch
from torch import Tensor

from .run_folder import LOG


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of torch's allocator on a GPU, resident memory of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LogRow(TypedDict):
    """A line of a run's log.jsonl."""

    step: int
    loss: float
    step_seconds: float
    peak_bytes: int


class Signals:
    """Within the context, SIGINT, SIGTERM and SIGUSR1 only set ``signum``; a second SIGINT raises KeyboardInterrupt."""

    HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> Signals:
        self.signum: int | None = None
        self.previous: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread can set signal handlers
            for number in self.HANDLED:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signum = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Reporter:
    """Progress bar, JSON lines and TensorBoard.

    title: shown before the bar. memory: name of what ``peak`` in `step` measures.
    """

    def __init__(
        self,
        place: Path,
        first: int,
        steps: int,
        progress: bool,
        log_every: int,
        title: str = "distil",
        memory: str = "peak",
    ) -> None:
        self.title, self.memory = title, memory
        self.place, self.first, self.steps, self.progress, self.log_every = (
            place,
            first,
            steps,
            progress,
            log_every,
        )
        self.times: list[float] = []
        self.last_loss: float | None = None
        self.file: TextIO

    def __enter__(self) -> Reporter:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.steps,
            initial=self.first,
            desc=self.title,
            unit="step",
            disable=not self.progress,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        self.file = open(self.place / LOG, "a", encoding="utf-8")
        self.board = _tensorboard(self.place, self.first)
        return self

    def step(self, step: int, loss: Tensor, seconds: float, peak: int) -> None:
        self.times.append(seconds)
        self.bar.update()
        if step % self.log_every and step != self.steps:
            return
        self.last_loss = loss.item()
        self.bar.set_postfix_str(
            f"loss {self.last_loss:.4f}, {seconds * 1e3:.0f} ms/step, {self.memory} {peak / 1e6:.0f} MB", refresh=False
        )
        self.file.write(
            json.dumps({"step": step, "loss": self.last_loss, "step_seconds": round(seconds, 6), "peak_bytes": peak})
            + "\n"
        )
        self.file.flush()
        if self.board is not None:
            self.board.add_scalar("loss", self.last_loss, step)
            self.board.add_scalar("step_seconds", seconds, step)

    def median_step(self) -> float | None:
        return sorted(self.times)[len(self.times) // 2] if self.times else None

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


def _tensorboard(place: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # A resumed run repeats the steps after its checkpoint, so their events are removed.
    return SummaryWriter(str(place / "tensorboard"), purge_step=first + 1 if first else None)


def iterate_log(path: str | Path) -> Iterator[LogRow]:
    """The rows of a run's log.jsonl."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
