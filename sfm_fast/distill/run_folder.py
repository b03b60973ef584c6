"""A run's folder: the names of its files, whether a run may start in it, and the exception of a run that was stopped."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..files import LOCK_NAME, locked_folder, parse_json, write_text

CHECKPOINT, LOG, RESULT, SUMMARY, MARKER = (
    "checkpoint.safetensors",
    "log.jsonl",
    "synthetic.safetensors",
    "summary.json",
    "run.json",
)


class Interrupted(Exception):  # noqa: N818 (not an error: the run was asked to stop, and its state is saved)
    """Signal ``signum`` stopped the run after step ``step``; its state was saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the state is saved, continue with --resume"
        )
        self.signum, self.step = signum, step


def check_run_folder(folder: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ``InputError`` unless a run may start (or continue, with ``resume``) in ``folder``; changes nothing."""
    if not str(folder):
        raise InputError("the run's folder must have a name, got ''")
    place = Path(folder)
    if resume:
        if not (place / CHECKPOINT).is_file():
            raise InputError(f"{place}: nothing to resume, {CHECKPOINT} is missing")
    elif place.is_dir() and any(entry.name != LOCK_NAME for entry in place.iterdir()):
        if not (place / MARKER).is_file():
            raise InputError(f"{place}: holds files that are not of a run; choose an empty or a new folder")
        if not overwrite:
            raise InputError(
                f"{place}: holds a run already; use --resume to continue it, --overwrite to replace it, or choose another folder"
            )


def precision_of_run(folder: str | Path, place: int = 0) -> str | None:
    """The precision of backbone number ``place`` as the run in ``folder`` records it; None without a readable record: its checkpoint is checked anyway."""
    try:
        precision = parse_json((Path(folder) / MARKER).read_text(encoding="utf-8"))["provenance"]["precision"][place]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return precision if isinstance(precision, str) else None


@contextlib.contextmanager
def open_run_folder(folder: str | Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Create and lock the folder if a run may start in it, which is checked before and again while the lock is held."""
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    with locked_folder(folder) as place:
        check_run_folder(folder, resume=resume, overwrite=overwrite)
        yield place


def clear_run(place: Path) -> None:
    """Remove the files of an earlier run, and no others."""
    for name in (CHECKPOINT, LOG, RESULT, SUMMARY, "grid.png"):
        (place / name).unlink(missing_ok=True)
    for name in ("grids", "images", "tensorboard"):
        shutil.rmtree(place / name, ignore_errors=True)


def cut_log(path: Path, steps: int) -> None:
    """Remove the lines of steps after ``steps``, which will be repeated, and lines truncated by a crash."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        write_text(path, "".join(line for line in lines if _step_of(line) <= steps))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a line truncated by a crash
