"""A run's folder: what lies in it under which name, and whether a run may start there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from ..errors import InputError
from ..files import LOCK_NAME, write_text

CHECKPOINT, LOG, RESULT, SUMMARY, MARKER = (
    "checkpoint.safetensors",
    "log.jsonl",
    "synthetic.safetensors",
    "summary.json",
    "run.json",
)


def check_intervals(**intervals: int) -> None:
    """Raise ``InputError`` unless all numbers of steps are at least 1."""
    for name, value in intervals.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def check_run_folder(folder: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ``InputError`` unless a run may start (or continue, with ``resume``) in ``folder``; touches nothing."""
    if not str(folder):
        raise InputError("the run's folder must have a name, got ''")
    place = Path(folder)
    if resume:
        if not (place / CHECKPOINT).is_file():
            raise InputError(f"{place}: nothing to resume here, {CHECKPOINT} is missing")
    elif place.is_dir() and any(entry.name != LOCK_NAME for entry in place.iterdir()):
        if not (place / MARKER).is_file():
            raise InputError(f"{place}: holds other files, and no run; choose an empty or a new folder")
        if not overwrite:
            raise InputError(
                f"{place}: holds a run already; --resume continues it, --overwrite replaces it, or choose another folder"
            )


def clear_run(place: Path) -> None:
    """Remove an earlier run's own files, and nothing else."""
    for name in (CHECKPOINT, LOG, RESULT, SUMMARY, "grid.png"):
        (place / name).unlink(missing_ok=True)
    for name in ("grids", "images", "tensorboard"):
        shutil.rmtree(place / name, ignore_errors=True)


def cut_log(path: Path, steps: int) -> None:
    """Remove the lines of later steps, which will be run again, and one that a crash cut short."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        write_text(path, "".join(line for line in lines if _step_of(line) <= steps))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a line cut short by a crash
