"""The figures of a benchmark page, as SVG text with captions: curves of time and memory, bars of whole steps and of predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sfm_fast.units import memory, milliseconds, times

from ..rows import Result, Row, groups
from .drawing import Bar, Panel, Series, Styles, bar_grid, line_grid
from .tables import dtypes, hardware, status

_NUMBERS = ("classes", "dim", "ipc", "views", "backbone", "image_size", "channels")  # of a case, as named in captions
_AXES = {
    "classes": "number of classes C",
    "ipc": "images a class (ipc)",
    "views": "views a step A",
    "dim": "feature dimension D",
}
_SHORT = {"classes": "C", "dim": "D", "views": "A"}
_BANDS = "Lines are medians, bands the 20th to 80th percentile of the rounds"
_DELTA = "memory is the peak beyond what stood before the call, in decimal units"


@dataclass(frozen=True)
class Drawing:
    """A plot as SVG text, and its caption as plain text."""

    svg: str
    caption: str


def drawings(result: Result, styles: Styles, salt: str) -> list[Drawing]:
    """All plots for which there are rows. ``salt``: a text that differs between the results of a page."""
    return [
        drawing
        for number, make in enumerate((_losses("classes"), _losses("dim"), _scaling, _steps, _predictions))
        for drawing in make(result, styles, f"{salt} {number}")
    ]


def _machine(result: Result, rows: Iterable[Row]) -> str:
    """The end of a caption: hardware, torch and number format."""
    torch = f"torch {result.environment.get('torch') or 'of unknown version'}"
    return f"{hardware(result.environment)}; {torch}; {dtypes(rows)}."


# --- curves ------------------------------------------------------------------------------------------------------------


def _number(row: Row, name: str) -> Any:
    return getattr(row, name)


def _varying(rows: Sequence[Row], axis: str) -> list[Row]:
    """The losses' rows that differ only in ``axis``: of all ways to fix the rest, the one with the most values of ``axis``.

    Ties are decided by the classes nearest to 1000, then by more rows.
    """
    fixed = [name for name in ("classes", "dim", "ipc") if name != axis]
    ways: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        ways.setdefault(tuple(_number(row, name) for name in fixed), []).append(row)

    def rank(members: list[Row]) -> tuple[float, ...]:
        far = abs(math.log((members[0].classes or 1) / 1000)) if axis != "classes" else 0.0
        return len({_number(row, axis) for row in members}), -round(far, 3), len(members)

    return max(ways.values(), key=rank, default=[])


def _size(row: Row) -> float | None:
    """Peak beyond the memory allocated before, measured or predicted."""
    return row.predicted_delta if row.predicted else row.peak_bytes


def _scale(sizes: Iterable[float | None]) -> tuple[float, str]:
    """The unit: GB if no value is below 0.1 GB."""
    return (1e9, "GB") if min((size for size in sizes if size), default=0) >= 1e8 else (1e6, "MB")


def _panels(title: str, axis: str, rows: Sequence[Row], scale: tuple[float, str]) -> tuple[Panel, Panel]:
    """Time and memory of the rows against ``axis``."""
    panels = Panel(title, _AXES[axis], "time, ms", []), Panel("", _AXES[axis], f"memory, {scale[1]}", [])
    for panel, of_time in zip(panels, (True, False), strict=True):
        series: dict[tuple[str, bool], Series] = {}
        for row in rows:
            x, size, timing = _number(row, axis), _size(row), row.timing
            if not x:  # a log axis has no 0
                continue
            one = series.setdefault((row.contender, row.predicted), Series(row.contender, predicted=row.predicted))
            if row.lacks_memory:
                one.out_of_memory.append(x)
            elif of_time and timing is not None:
                values = (timing.median * 1e3, timing.p20 * 1e3, timing.p80 * 1e3)
            elif not of_time and (row.measured or row.predicted) and size is not None:
                values = (size / scale[0],) * 3
            else:
                continue
            if not row.lacks_memory and values[0] > 0:
                one.points.append((x, *values))
        panel.series = [one for one in series.values() if one.points or one.out_of_memory]
    return panels


def _fixed(rows: Sequence[Row], axis: str) -> str:
    """What all rows have in common: "D = 768, ipc = 1"."""
    common = []
    for name in _NUMBERS:
        values = {str(_number(row, name)) for row in rows} - {"None"}
        if name != axis and len(values) == 1:
            common.append(f"{_SHORT.get(name, name.replace('_', ' '))} = {values.pop()}")
    return ", ".join(common)


def _left_out(rows: Sequence[Row]) -> str:
    """A sentence with the contenders that have no point although they were requested, and the reasons."""
    skipped = dict.fromkeys(
        f"{row.contender} ({status(row)[:80]})"
        for row in rows
        if not (row.measured or row.predicted or row.lacks_memory)
    )
    free = dict.fromkeys(row.contender for row in rows if _size(row) == 0)
    nothing = f" Needed no memory at some points, which a log axis can't show: {', '.join(free)}." if free else ""
    return (f" Not drawn: {'; '.join(skipped)}." if skipped else "") + nothing


def _losses(axis: str) -> Callable[[Result, Styles, str], list[Drawing]]:
    """Losses against ``axis``, one panel per alignment."""

    def draw(result: Result, styles: Styles, salt: str) -> list[Drawing]:
        rows = [row for row in result.rows if row.suite == "losses" and row.mode == "both" and row.alignment]
        rows = _varying(rows, axis)
        scale = _scale(map(_size, rows))
        pairs = [
            _panels(f"{name} alignment", axis, [row for row in rows if row.alignment == name], scale)
            for name in dict.fromkeys(row.alignment for row in rows)
        ]
        if len({_number(row, axis) for row in rows}) < 2 or not any(panel.series for pair in pairs for panel in pair):
            return []  # one point isn't a curve
        caption = (
            f"Measured: time (above) and memory (below) of the losses, forward + backward, against the {_AXES[axis]}; "
            f"{_fixed(rows, axis)}. {_BANDS}; {_DELTA}. {_machine(result, rows)}{_left_out(rows)}"
        )
        return [Drawing(line_grid([[pair[0] for pair in pairs], [pair[1] for pair in pairs]], styles, salt), caption)]

    return draw


def _scaling(result: Result, styles: Styles, salt: str) -> list[Drawing]:
    """Whole steps against each number that the scaling suite varies, one column each."""
    rows = [row for row in result.rows if row.suite == "scaling"]
    columns: list[tuple[Panel, Panel]] = []
    settings, used, scale = [], [], _scale(map(_size, rows))
    for axis in _AXES:
        part = [row for row in rows if row.varied == axis]
        pair = _panels("", axis, part, scale)
        if len({_number(row, axis) for row in part}) >= 2 and any(panel.series for panel in pair):
            columns.append(pair)
            used += part
            settings.append(f"{_AXES[axis]}: {_fixed(part, axis) or 'nothing else fixed'}")
    if not columns:
        return []
    grid = [list(side) for side in zip(*columns, strict=True) if any(panel.series for panel in side)]
    ran, guessed = any(row.measured for row in used), any(row.predicted for row in used)
    how = (
        "Measured (filled marks) and predicted (hollow marks)"
        if ran and guessed
        else "Measured"
        if ran
        else "Predicted, not measured"
    )
    what = "time (above) and memory (below)" if len(grid) == 2 else "memory"
    memory_is = f"{_BANDS}; {_DELTA}" if ran else _DELTA[0].upper() + _DELTA[1:]
    caption = (
        f"{how}: {what} of one distillation step. Held fixed against {'; '.join(settings)}. {_views(used)}{memory_is}. "
        f"{_machine(result, used)}{_left_out(used)}"
    )
    return [Drawing(line_grid(grid, styles, salt), caption)]


def _views(rows: Sequence[Row]) -> str:
    """The number of views per image of each contender, unless that is the axis, since it may cause most of a difference."""
    counts = {row.contender: row.views for row in rows if row.views and row.varied != "views"}
    if len(set(counts.values())) < 2:
        return ""
    return f"Views of an image but where they are the axis: {', '.join(f'{name} {count}' for name, count in counts.items())}. "


def _steps(result: Result, styles: Styles, salt: str) -> list[Drawing]:
    """Time and memory of whole steps, one figure per mode."""
    every = [row for row in result.rows if row.suite == "step"]
    drawn = []
    for place, group in enumerate(groups(row for row in every if not row.predicted)):
        first = next((row for row in group if row.measured), None)
        if first is None:
            continue
        guesses = {row.contender: row.predicted_delta for row in every if row.predicted and row.case == first.case}
        seconds, sizes = [], []
        for row in group:
            timing, guess = row.timing, row.predicted_delta
            guess = guesses.get(row.contender) if guess is None else guess
            if timing is None:
                words = f"✕ {status(row)[:60]}"
                seconds.append(Bar(row.contender, None, words))
                told = "" if guess is None else f", predicted {memory(guess)}"
                sizes.append(Bar(row.contender, None, words + told, predicted=guess))
                continue
            factor = "" if row is first or row.ratio is None else f", {times(row.ratio.median)}"
            text = f"{milliseconds(timing.median)} ms{factor}"
            seconds.append(Bar(row.contender, timing.median * 1e3, text, (timing.p20 * 1e3, timing.p80 * 1e3)))
            size, base = row.peak_bytes, first.peak_bytes
            share = f", {times(size / base)}" if size is not None and base and row is not first else ""
            sizes.append(
                Bar(row.contender, size, "not measured" if size is None else memory(size) + share, predicted=guess)
            )
        scale, unit = (1e9, "GB") if max(bar.value or bar.predicted or 0 for bar in sizes) >= 1e9 else (1e6, "MB")
        for bar in sizes:
            bar.value, bar.predicted = bar.value and bar.value / scale, bar.predicted and bar.predicted / scale
        guessed = any(bar.predicted for bar in sizes)
        label = f"memory, {unit}" + (" (hatched: predicted without running)" if guessed else "")
        what = "one distillation step" if (first.steps or 1) == 1 else f"{first.steps} distillation steps in a row"
        caption = (
            f"Measured: {what}, {first.case}. Left: median time, black line: 20th to 80th percentile. Right: {_DELTA}"
            f"{', beside its prediction' if guessed else ''}. Factors are those over {first.contender}. {_machine(result, group)}"
        )
        drawn.append(Drawing(bar_grid([seconds, sizes], ["time, ms", label], styles, f"{salt} {place}"), caption))
    return drawn


def _predictions(result: Result, styles: Styles, salt: str) -> list[Drawing]:
    """Cases that weren't run: the predicted peak of each method."""
    ran = {(row.suite, row.case) for row in result.rows if row.measured}
    rows = [row for row in result.rows if row.predicted and row.suite != "scaling" and (row.suite, row.case) not in ran]
    drawn = []
    for place, group in enumerate(groups(row for row in rows if row.predicted_total)):
        sizes = [row.predicted_total or 0 for row in group]
        entries = [
            Bar(
                row.contender,
                None,
                memory(size) + (f", {times(size / sizes[0])}" if row is not group[0] else ""),
                predicted=size / 1e9,
            )
            for row, size in zip(group, sizes, strict=True)
        ]
        caption = (
            f"Predicted, not measured: peak memory of one step, {group[0].case}, everything in memory at that moment, counted with tensors that "
            f"hold no data ({dtypes(group)}, torch {result.environment.get('torch') or 'of unknown version'}; counted on {hardware(result.environment)}). "
            f"Factors are those over {group[0].contender}."
        )
        drawn.append(Drawing(bar_grid([entries], ["predicted peak memory, GB"], styles, f"{salt} {place}"), caption))
    return drawn
