"""The curves of a benchmark page: time and memory against classes, images a class, views and dimension, the rest held fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .lines import Panel, Series, line_grid
from .plots import Style
from .rows import Row, dtypes, hardware, is_measured, is_predicted, of_suite, predicted_delta

# What a case can vary in; a plot against one of them holds all others fixed.
_SETTINGS = ("classes", "dim", "ipc", "views", "metric", "dtype", "precision", "backbone", "image_size", "channels")
_AXES = {
    "classes": "number of classes C",
    "ipc": "images a class (ipc)",
    "views": "views a step A",
    "dim": "feature dimension D",
}
_SHORT = {"classes": "C", "dim": "D", "views": "A"}
_BANDS = "Lines are medians, bands the 20th to 80th percentile of the rounds"
DELTA = "memory is the peak beyond what stood before the call, in decimal units"


@dataclass(frozen=True)
class Drawing:
    """A plot as SVG text, and its caption as plain text."""

    svg: str
    caption: str


def machine(result: dict[str, Any], rows: Iterable[Row]) -> str:
    """The end of a caption: hardware, torch and number format."""
    environment = result["environment"]
    torch = f"torch {environment.get('torch') or 'of unknown version'}"
    return f"{hardware(environment)}; {torch}; {dtypes(rows)}."


def chosen(rows: Sequence[Row], axis: str, free: Sequence[str] = ()) -> list[Row]:
    """The rows that differ in ``axis`` (and in ``free``) alone: of all ways to fix the rest, the one with most values of ``axis``.

    Ties go to 1000 classes, or what is nearest, then to more rows.
    """
    fixed = [key for key in _SETTINGS if key not in (axis, *free)]
    rows = [row for row in rows if row.get(axis)]  # a log axis has no 0
    # What a row doesn't say can't set it apart: one that ran out of memory may know less about itself than others.
    ways: list[list[Row]] = []
    vague: list[list[Row]] = []
    for way in {tuple(row.get(key) for key in fixed): None for row in rows}:
        wanted = dict(zip(fixed, way, strict=True))
        members = [
            row
            for row in rows
            if all(None in (row.get(key), value) or row[key] == value for key, value in wanted.items())
        ]
        said = all(row.get(key) is None for row in members for key, value in wanted.items() if value is None)
        (ways if said else vague).append(members)

    def rank(way: list[Row]) -> tuple[float, ...]:
        far = abs(math.log((way[0].get("classes") or 1) / 1000)) if axis != "classes" else 0.0
        return len({row[axis] for row in way}), -round(far, 3), len(way)

    return max(ways or vague, key=rank, default=[])


def _series(
    rows: Sequence[Row], axis: str, measured: Callable[[Row], Any], predicted: Callable[[Row], Any]
) -> list[Series]:
    """The rows' contenders in order. ``measured``, ``predicted``: (value, low, high) of a row, or None where it has none."""
    found: dict[tuple[str, bool], Series] = {}
    for row in rows:
        guess = is_predicted(row)
        one = found.setdefault((row["contender"], guess), Series(row["contender"], predicted=guess))
        if row["status"].startswith("out of memory"):
            one.out_of_memory.append(row[axis])
        values = predicted(row) if guess else measured(row) if is_measured(row) else None
        again = any(row[axis] == x for x, *_ in one.points)  # the point where two sweeps cross, measured in both
        if values is not None and values[0] > 0 and not again:  # a log axis has no 0
            one.points.append((row[axis], *values))
    return [one for one in found.values() if one.points or one.out_of_memory]


def _panels(title: str, axis: str, rows: Sequence[Row], unit: str) -> tuple[Panel, Panel]:
    """Time and memory of the rows against ``axis``, memory in ``unit``."""
    scale = {"MB": 1e6, "GB": 1e9}[unit]

    def seconds(row: Row) -> tuple[float, float, float]:
        return row["median"] * 1e3, row["p20"] * 1e3, row["p80"] * 1e3

    def sizes(row: Row) -> tuple[float, float, float] | None:
        size = _size(row)
        return None if size is None else (size / scale,) * 3

    return (
        Panel(title, _AXES[axis], "time, ms", _series(rows, axis, seconds, lambda row: None)),
        Panel("", _AXES[axis], f"memory, {unit}", _series(rows, axis, sizes, sizes)),
    )


def _size(row: Row) -> float | None:
    """Peak beyond what stood before, measured or predicted."""
    return predicted_delta(row) if is_predicted(row) else row.get("peak_bytes")


def _unit(rows: Iterable[Row]) -> str:
    """GB where nothing is below a tenth of one."""
    return "GB" if min((size for size in map(_size, rows) if size), default=0) >= 1e8 else "MB"


def _fixed(rows: Sequence[Row], axis: str) -> str:
    """What all rows share: "D = 768, ipc = 1"."""
    shared = []
    for key in _SETTINGS:
        values = {str(row.get(key)) for row in rows} - {"None"}
        if key not in (axis, "dtype", "precision") and len(values) == 1:
            shared.append(f"{_SHORT.get(key, key.replace('_', ' '))} = {values.pop()}")
    return ", ".join(shared)


def _left_out(rows: Sequence[Row]) -> str:
    """A sentence naming what has no point though it was asked for, and why."""
    skipped = dict.fromkeys(
        f"{row['contender']} ({' '.join(row['status'].split())[:80]})"
        for row in rows
        if not is_measured(row) and not is_predicted(row) and not row["status"].startswith("out of memory")
    )
    free = dict.fromkeys(row["contender"] for row in rows if _size(row) == 0)
    nothing = f" Needed no memory at some points, which a log axis can't show: {', '.join(free)}." if free else ""
    return (f" Not drawn: {'; '.join(skipped)}." if skipped else "") + nothing


def _against(axis: str, result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    rows = [row for row in of_suite(result["rows"], "losses") if row["mode"] == "both" and row.get("alignment")]
    rows = chosen(rows, axis, free=("alignment",))
    alignments = dict.fromkeys(row["alignment"] for row in rows)
    unit = _unit(rows)
    pairs = [
        _panels(f"{name} alignment", axis, [row for row in rows if row["alignment"] == name], unit)
        for name in alignments
    ]
    if len({row[axis] for row in rows}) < 2 or not any(panel.series for pair in pairs for panel in pair):
        return []  # a point is no curve
    caption = (
        f"Measured: time (above) and memory (below) of the losses, forward + backward, against the {_AXES[axis]}; "
        f"{_fixed(rows, axis)}. {_BANDS}; {DELTA}. {machine(result, rows)}{_left_out(rows)}"
    )
    return [Drawing(line_grid([[pair[0] for pair in pairs], [pair[1] for pair in pairs]], looks, salt), caption)]


def against_classes(result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    """Losses against the number of classes, a panel each alignment."""
    return _against("classes", result, looks, salt)


def against_dim(result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    """Losses against the feature dimension, a panel each alignment."""
    return _against("dim", result, looks, salt)


def scaling(result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    """Whole steps against whatever the scaling suite varies, a column each."""
    rows = of_suite(result["rows"], "scaling")
    rows = [row for row in rows if row["mode"] == rows[0]["mode"]]
    found, settings, used, unit = [], [], [], _unit(rows)
    for axis in _AXES:
        # Each method has views of its own, and another D is another backbone.
        free = ("views",) if axis != "views" else ()
        swept = [row for row in rows if row.get("varied") in (None, axis)]
        part = chosen(swept, axis, free=(*free, "backbone") if axis == "dim" else free)
        if free:  # a contender at several numbers of views would stand twice on one line
            names = dict.fromkeys(row["contender"] for row in part)
            part = [
                row
                for name in names
                for row in chosen([one for one in part if one["contender"] == name], axis, ("backbone",))
            ]
        if len({row[axis] for row in part}) < 2:
            continue
        pair = _panels("", axis, part, unit)
        if any(panel.series for panel in pair):
            found.append(pair)
            used += part
            settings.append(f"{_AXES[axis]}: {_fixed(part, axis) or 'nothing else fixed'}")
    if not found:
        return []
    grid = [sides for sides in ([pair[side] for pair in found] for side in (0, 1)) if any(one.series for one in sides)]
    kinds = [
        kind
        for kind, here in (("measured (filled marks)", is_measured), ("predicted (hollow marks)", is_predicted))
        if any(map(here, used))
    ]
    how = (
        " and ".join(kinds).capitalize()
        if len(kinds) == 2
        else "Measured"
        if kinds == ["measured (filled marks)"]
        else "Predicted, not measured"
    )
    what = "time (above) and memory (below)" if len(grid) == 2 else "memory"
    bands = f"{_BANDS}; " if any(map(is_measured, used)) else ""
    caption = (
        f"{how}: {what} of one distillation step. Held fixed against {'; '.join(settings)}. {_views(used)}"
        f"{bands}{DELTA if bands else DELTA[0].upper() + DELTA[1:]}. {machine(result, used)}{_left_out(used)}"
    )
    return [Drawing(line_grid(grid, looks, salt), caption)]


def _views(rows: Sequence[Row]) -> str:
    """How many views of an image each contender takes where that isn't the axis: what most of a difference may come from."""
    counts = {row["contender"]: row["views"] for row in rows if row.get("views") and row.get("varied") != "views"}
    if len(set(counts.values())) < 2:
        return ""
    told = ", ".join(f"{name} {count:g}" for name, count in counts.items())
    return f"Views of an image but where they are the axis: {told}. "
