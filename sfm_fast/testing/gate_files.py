"""The files of the performance gate: expected values that a project commits, and the measurements of one run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import InputError

BASELINE_FORMAT = "sfm_fast gate baseline 1"
RECORDS_FORMAT = "sfm_fast gate 1"
UPDATED = "updated"  # the verdict of a value that shall be written


def read_baseline(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"value", "unit", "torch"}; nothing where there is no file. Raises ``InputError`` where it is damaged."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != BASELINE_FORMAT:
            raise ValueError(f"format {content['format']!r}, wanted {BASELINE_FORMAT!r}")
        values: dict[str, dict[str, Any]] = content["values"]
        for name, entry in values.items():
            right = (
                isinstance(entry["value"], (int, float))
                and not isinstance(entry["value"], bool)
                and 0 <= entry["value"] < math.inf  # which nan isn't
                and isinstance(entry["unit"], str)
                and isinstance(entry["torch"], str)
            )
            if not right:
                raise ValueError(f"entry {name!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged, or not a baseline of performance_gate ({error})") from error
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
