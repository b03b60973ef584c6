"""Where we lose, by the rows of a benchmark result: slower, larger, longer to start, or not running at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .rows import Row, duration, groups, is_measured, is_ours, is_predicted, memory, ratio, rivals, times

_SAME = 0.01  # memory that differs by less is the same
HEADER = ("what", "ours", "theirs", "factor")


Cells = tuple[str, ...]


@dataclass(frozen=True)
class Losses:
    """One kind of loss: a heading, what it means in a line, and its rows under `HEADER`, the worst first."""

    kind: str
    explanation: str
    rows: list[Cells]


def losses(result: dict[str, Any]) -> list[Losses]:
    """Every kind that has rows; empty where nothing was lost."""
    # Ours comes first in a case; a case that has none of ours, such as LGM's ways to load images, is nobody's loss.
    found = [group for group in groups(result["rows"]) if is_ours(group[0]["contender"])]
    return [kind for kind in (make(found) for make in _KINDS) if kind.rows]


def _what(row: Row) -> str:
    return f"{row['suite']}: {row['case']}, {row['mode']}"


def _ordered(rows: Sequence[tuple[float, Cells]]) -> list[Cells]:
    return [cells for _, cells in sorted(rows, key=lambda entry: -entry[0])]


def _not_running(found: list[list[Row]]) -> Losses:
    rows: list[Cells] = []
    for group in found:
        ours, others = group[0], [row for row in rivals(group) if is_measured(row)]
        if others and not is_measured(ours) and not is_predicted(ours):
            best = min(others, key=lambda row: row["median"])
            theirs = f"{best['contender']}: {duration(best['median'])}"
            rows.append((_what(ours), f"{ours['contender']}: {ours['status']}", theirs, ""))
    return Losses("Not running", "Ours gave no result where another did; the fastest of the others.", rows)


def _slower(found: list[list[Row]]) -> Losses:
    rows: list[tuple[float, Cells]] = []
    for group in found:
        ours = group[0]
        for row in rivals(group):
            spread = row.get("ratio")
            # Only what the interval is sure of: a median below 1 with an interval around 1 is a draw.
            if not (is_measured(row) and is_measured(ours) and spread and spread["high"] < 1):
                continue
            inverse = [1 / max(spread[key], 1e-12) for key in ("median", "high", "low")]
            sides = [f"{side['contender']}: {duration(side['median'])}" for side in (ours, row)]
            rows.append((inverse[0], (_what(row), *sides, times(*inverse))))
    text = "Another contender is faster, and the whole 95 % interval of the ratio says so. Fixed costs of a call decide small shapes."
    return Losses("Slower", text, _ordered(rows))


def _micro_batches(found: list[list[Row]]) -> Losses:
    rows: list[tuple[float, Cells]] = []
    seen: set[tuple[float, float]] = set()  # one measurement stands on every axis of the scaling suite
    for group in found:
        whole = next((row for row in group if is_measured(row) and _is_whole(row["contender"])), None)
        for row in group:
            name = row["contender"]
            if whole is None or not is_measured(row) or not is_ours(name) or not re.search(r"micro-?batch", name, re.I):
                continue
            spread = row.get("ratio") if whole is group[0] else None
            factor, surely = row["median"] / whole["median"], row["p20"] > whole["p80"]
            if spread:
                factor, surely = spread["median"], spread["low"] > 1
            measurement = (row["median"], whole["median"])
            if surely and measurement not in seen:
                seen.add(measurement)
                written = ratio(row) if spread else times(factor)
                sides = [f"{side['contender']}: {duration(side['median'])}" for side in (row, whole)]
                rows.append((factor, (_what(row), *sides, written)))
    text = (
        "The price of less memory: a micro-batched step runs the forward pass twice, and small batches use the machine less well. "
        "It is compared with our own one-shot step."
    )
    return Losses("Micro-batches against one shot", text, _ordered(rows))


def _is_whole(name: str) -> bool:
    return name.startswith("SFM one-shot")


def _first_call(found: list[list[Row]]) -> Losses:
    worst: dict[tuple[str, str], tuple[float, Cells]] = {}
    for group in found:
        ours = group[0]
        others = [row for row in rivals(group) if row.get("first_seconds") and "compile" not in row["contender"]]
        if not others or not ours.get("first_seconds"):
            continue
        best = min(others, key=lambda row: row["first_seconds"])
        factor = ours["first_seconds"] / best["first_seconds"]
        key = ours["suite"], ours["case"]
        if factor > max(1.0, worst[key][0] if key in worst else 0.0):
            sides = [f"{side['contender']}: {duration(side['first_seconds'])}" for side in (ours, best)]
            worst[key] = factor, (_what(ours), *sides, times(factor))
    text = (
        "Our first call in a process (loading, warm-up, compiling, tuning) takes longer than that of the quickest contender that isn't compiled. "
        "One call each, so no interval; of a case's modes the worst is named."
    )
    return Losses("First call", text, _ordered(list(worst.values())))


def _more_memory(found: list[list[Row]]) -> Losses:
    rows: list[tuple[float, Cells]] = []
    for group in found:
        ours = group[0]
        for row in rivals(group):
            counted = is_predicted(ours) and is_predicted(row)
            if not counted and not (is_measured(ours) and is_measured(row)):
                continue
            own, other = ours.get("peak_bytes"), row.get("peak_bytes")
            if own is None or other is None or own < (1 + _SAME) * other or own == other:
                continue
            factor = own / other if other else float("inf")
            sides = [f"{side['contender']}: {memory(side['peak_bytes'])}" for side in (ours, row)]
            more = f"{times(factor)}, " if other else ""
            what = _what(row) + (" (predicted)" if counted else "")
            rows.append((factor, (what, *sides, f"{more}{memory(own - other)} more")))
    text = "Another contender needs less memory at its peak beyond what stood before the call, by more than 1 %."
    return Losses("More memory", text, _ordered(rows))


_KINDS: tuple[Callable[[list[list[Row]]], Losses], ...] = (
    _not_running,
    _slower,
    _micro_batches,
    _first_call,
    _more_memory,
)
