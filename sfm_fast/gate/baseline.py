"""The files of the performance gate: expected values that a project commits, and the measurements of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
UPDATED = "updated"  # the verdict of a value that shall be written


def read_baseline(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"value", "unit", "torch"}; nothing where there is no file. Raises ``InputError`` where it is damaged."""
    if not path.exists():
        return {}
    try:
        content = files.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or not a baseline of performance_gate ({error})") from error
    values: dict[str, dict[str, Any]] = check(path, content, _BASELINE, "baseline of performance_gate")["values"]
    return values


def update_baseline(path: Path, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Put the values of the records with verdict "updated" into the file; other names stay. Returns what changed, in words.

    Raises ``InputError`` where two tests gave one name different values; then nothing is written.
    """
    fresh: dict[str, Mapping[str, Any]] = {}
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
        entry = {"value": record["measured"], "unit": record["unit"], "torch": str(torch.__version__)}
        before = values.get(name)
        if before is None or (before["value"], before["unit"]) != (entry["value"], entry["unit"]):
            notes.append(f"{path.name}: {name} {'new' if before is None else before['value']} -> {entry['value']}")
        values[name] = entry
    if fresh:
        files.write_json(path, {"format": BASELINE_FORMAT, "values": dict(sorted(values.items()))})
    return notes


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write all measurements of a run as JSON."""
    files.write_json(path, {"format": RECORDS_FORMAT, "measurements": list(records)})
