"""The files of the performance gate: the expected values that a project commits, and the measurements of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from .. import files
from ..errors import InputError
from ..schema import check

BASELINE_FORMAT = "sfm_fast gate baseline 1"
RECORDS_FORMAT = "sfm_fast gate 1"
_BASELINE = {
    "format": lambda value: value == BASELINE_FORMAT,
    "values": {str: {"value": lambda value: type(value) in (int, float) and value >= 0, "unit": str, "torch": str}},
}
UPDATED = "updated"  # the verdict of a value to be written


class Expected(TypedDict):
    """An entry of the baseline; ``torch``: the version it was measured with."""

    value: float
    unit: str
    torch: str


class Measurement(TypedDict, total=False):
    """One measurement of a test, as in the report. ``limit``: the allowed value. ``low`` to ``rounds``: only for ratios."""

    test: str
    what: str
    name: str
    verdict: str
    text: str
    measured: float
    limit: float | None
    unit: str
    low: float
    high: float | None
    control: float
    rounds: int


def read_baseline(path: Path) -> dict[str, Expected]:
    """The expected values by name; empty if there is no file. Raises ``InputError`` if the file is damaged."""
    if not path.exists():
        return {}
    try:
        content = files.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or not a baseline of performance_gate ({error})") from error
    values: dict[str, Expected] = check(path, content, _BASELINE, "baseline of performance_gate")["values"]
    return values


def update_baseline(path: Path, records: Iterable[Measurement]) -> list[str]:
    """Write the values of the records with verdict "updated" into the file; other names are kept. Returns descriptions of the changes.

    Raises ``InputError`` if two tests have different values for one name; then nothing is written.
    """
    fresh: dict[str, Measurement] = {}
    for record in records:
        if record["verdict"] != UPDATED:
            continue
        other = fresh.setdefault(record["name"], record)
        if (other["measured"], other["unit"]) != (record["measured"], record["unit"]):
            raise InputError(
                f"{path}: not updated: {record['name']!r} is {other['measured']} in {other['test']} "
                f"and {record['measured']} in {record['test']}"
            )
    values = read_baseline(path)
    notes = []
    for name, record in sorted(fresh.items()):
        entry = Expected(value=record["measured"], unit=record["unit"], torch=str(torch.__version__))
        before = values.get(name)
        if before is None or (before["value"], before["unit"]) != (entry["value"], entry["unit"]):
            notes.append(f"{path.name}: {name} {'new' if before is None else before['value']} -> {entry['value']}")
        values[name] = entry
    if fresh:
        files.write_json(path, {"format": BASELINE_FORMAT, "values": dict(sorted(values.items()))})
    return notes


def write_records(path: Path, records: Sequence[Measurement]) -> None:
    """Write all measurements of a run as JSON."""
    files.write_json(path, {"format": RECORDS_FORMAT, "measurements": list(records)})
