"""The rows of a run on a GPU, each written to the file and the screen when it is measured, until the time is over."""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfm_fast.files import write_json

Row = Mapping[str, object]


@dataclass
class Taken(abc.ABC):
    """The contents of a row; its fields are written to the file."""

    @abc.abstractmethod
    def line(self) -> str:
        """The row in words."""


class Record:
    """``head``: the JSON file's keys before the rows; ``rows``: the rows to keep. The time ends ``seconds`` from now."""

    def __init__(self, out: Path, head: Mapping[str, object], seconds: float, rows: Sequence[Row] = ()) -> None:
        self.out, self.head, self.rows, self.end = out, head, list(rows), time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds left."""
        return self.end - time.monotonic()

    def over(self, what: str) -> bool:
        """Whether the time is over; if so, prints that ``what`` is left out."""
        if self.left < 0:
            print(f"== out of time: {what} left out", flush=True)
        return self.left < 0

    def add(self, row: Taken) -> None:
        self.rows.append(asdict(row))
        write_json(self.out, {**self.head, "rows": self.rows})
        print("==", row.line(), flush=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run's file; none if there is no file."""
    rows: list[Row] = json.loads(path.read_text()).get("rows", []) if path.exists() else []
    return rows


def why(error: Exception) -> str:
    """The status of a row whose contender failed with ``error``."""
    return f"error: {type(error).__name__}: {str(error)[:120]}"
