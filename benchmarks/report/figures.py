"""The figures of a benchmark page, as SVG text with captions: curves of time and memory, bars of whole steps and of predictions."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfm_fast.errors import require_package
from sfm_fast.units import memory, milliseconds, times

from ..rows import Result, Row, groups
from .tables import dtypes, hardware, status

# Okabe and Ito's colours (Color Universal Design, 2008), without the yellow that vanishes on white, and a grey.
_OURS = ("#0072B2", "#56B4E9", "#009E73")
_RIVALS = ("#D55E00", "#E69F00", "#CC79A7", "#000000", "#7F7F7F")
_MARKERS = "osD^vPX<>ph"  # a number with no divisor in common with the colours
_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
_SETTINGS = {
    "svg.fonttype": "none",  # text isn't converted to paths
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.7,
    "figure.constrained_layout.w_pad": 0.11,
    "figure.constrained_layout.h_pad": 0.09,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a $ in a name is literal
}
_WIDTH = 9.6
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


@dataclass(frozen=True)
class Style:
    """How a contender is drawn everywhere on a page."""

    color: str
    marker: str
    dashes: Any
    ours: bool


Styles = dict[str, Style]


@dataclass
class Series:
    """One contender's points (x, y, lowest, highest), those that ran out of memory, and whether all are only predicted."""

    name: str
    points: list[tuple[float, float, float, float]] = field(default_factory=list)
    out_of_memory: list[float] = field(default_factory=list)
    predicted: bool = False


@dataclass
class Panel:
    """One pair of log axes."""

    title: str
    xlabel: str
    ylabel: str
    series: list[Series]


@dataclass
class Bar:
    """One contender's value with its spread, and the prediction; ``text`` is at the end, or gives the reason for no value."""

    name: str
    value: float | None
    text: str
    spread: tuple[float, float] | None = None
    predicted: float | None = None


def styles_of(results: Iterable[Result]) -> Styles:
    """One style for each contender of all results: blues and green for ours, the other colours for rivals.

    Contenders of single operations and of whole steps are never in the same plot, so each kind starts with the first colours.
    """
    rows = [row for result in results for row in result.rows]
    styles: Styles = {}
    for small in (False, True):
        counts = {True: 0, False: 0}
        for row in rows:
            if (row.suite in ("losses", "images")) is not small or row.contender in styles:
                continue
            place, colors = counts[row.ours], _OURS if row.ours else _RIVALS
            counts[row.ours] += 1
            marker = _MARKERS[(place + (0 if row.ours else 3)) % len(_MARKERS)]
            dashes = _DASHES[(place + (0 if row.ours else 1)) % len(_DASHES)]
            styles[row.contender] = Style(colors[place % len(colors)], marker, dashes, row.ours)
    return styles


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


def line_grid(panels: Sequence[Sequence[Panel]], styles: Styles, salt: str) -> str:
    """Rows of panels with one legend below. Points out of memory are crosses in a strip along the top edge."""
    columns = max(len(row) for row in panels)
    with _figure(salt, (_WIDTH if columns > 1 else 0.62 * _WIDTH, 2.75 * len(panels) + 0.75)) as (figure, finish):
        handles: dict[str, Any] = {}
        for row, axes_row in zip(panels, figure.subplots(len(panels), columns, squeeze=False), strict=True):
            for place, axes in enumerate(axes_row):
                if place >= len(row) or not row[place].series:
                    axes.set_visible(False)
                    continue
                _draw_panel(axes, row[place], styles, handles)
                if place == 0 or row[place].ylabel != row[0].ylabel:
                    axes.set_ylabel(row[place].ylabel)
        across = 4 if columns > 1 else 2
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across, frameon=False)
        return finish()


def _draw_panel(axes: Any, panel: Panel, styles: Styles, handles: dict[str, Any]) -> None:
    for place, series in enumerate(panel.series):
        style = styles[series.name]
        x, y, low, high = zip(*sorted(series.points), strict=True) if series.points else ((), (), (), ())
        (line,) = axes.plot(
            x, y, color=style.color, marker=style.marker, zorder=4 if style.ours else 3,
            markersize=max(3.6, 6.4 - 0.55 * place),  # later marks are smaller, so that equal values don't hide each other
            markerfacecolor="white" if series.predicted else style.color,
            linestyle=":" if series.predicted else style.dashes, linewidth=1.9 if style.ours else 1.3,
        )  # fmt: skip
        if any(a < b for a, b in zip(low, high, strict=True)):
            axes.fill_between(x, low, high, color=style.color, alpha=0.16, linewidth=0)
            axes.vlines(x, low, high, color=style.color, linewidth=0.8, alpha=0.6)
        if x:
            handles.setdefault(series.name + (" (predicted)" if series.predicted else ""), line)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(panel.title)
    axes.set_xlabel(panel.xlabel)
    xs = {p[0] for s in panel.series for p in s.points} | {x for s in panel.series for x in s.out_of_memory}
    _x_ticks(axes, sorted(xs))
    _y_ticks(axes, [value for s in panel.series for p in s.points for value in p[1:]])
    _strip(axes, panel.series, styles, handles)
    _tidy(axes, "both")


def _strip(axes: Any, series: Sequence[Series], styles: Styles, handles: dict[str, Any]) -> None:
    """Crosses for the points that ran out of memory, one line per contender, in a grey strip above the data."""
    failed = [one for one in series if one.out_of_memory]
    if not failed:
        return
    bottom, top = axes.get_ylim()
    share = min(0.5, 0.1 + 0.06 * len(failed))
    strip_top = top * (top / bottom) ** (share / (1 - share))
    axes.axhspan(top, strip_top, color="#888888", alpha=0.13, linewidth=0)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.set_ylim(bottom, strip_top)
    axes.text(0.015, 0.988, "✕ out of memory", transform=axes.transAxes, fontsize=7.5, color="#444444", va="top")
    for place, one in enumerate(failed):
        height = 1 - share + (place + 0.6) * (share - 0.1) / len(failed)
        crosses = axes.scatter(
            one.out_of_memory, [height] * len(one.out_of_memory), transform=axes.get_xaxis_transform(),
            color=styles[one.name].color, marker="x", s=30, linewidths=1.6, zorder=5, clip_on=False,
        )  # fmt: skip
        handles.setdefault(one.name, crosses)


def _plain(value: float, _: object = None) -> str:
    """A tick's number without an exponent."""
    return f"{value:,.0f}".replace(",", "\u202f") if value >= 10 else f"{value:g}"


def _x_ticks(axes: Any, values: Sequence[float]) -> None:
    """Ticks at the measured values, except those that would overlap; at least a factor 2 wide."""
    if not values:
        return
    low, high = values[0], values[-1]
    span, middle = max(math.log(high / low), math.log(2)), math.sqrt(low * high)
    half = math.exp(span / 2 * 1.12)
    axes.set_xlim(middle / half, middle * half)
    kept = [high]
    for value in reversed(values[:-1]):
        if math.log(kept[-1] / value) > 0.14 * span:
            kept.append(value)
    axes.set_xticks(kept, [_plain(value) for value in kept])
    axes.minorticks_off()


def _y_ticks(axes: Any, values: Sequence[float]) -> None:
    """Ticks at round numbers without exponents, at least a factor 8 from bottom to top."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    span, middle = max(math.log(high / low) * 1.12, math.log(8)), math.sqrt(low * high)
    axes.set_ylim(middle * math.exp(-span / 2), middle * math.exp(span / 2))
    decades = span / math.log(10)
    subs, most = (1, 2, 5) if decades < 2.6 else (1,), 12 if decades < 7 else 7
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=most))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


# --- bars --------------------------------------------------------------------------------------------------------------


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
        drawn.append(Drawing(_bars([seconds, sizes], ["time, ms", label], styles, f"{salt} {place}"), caption))
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
        drawn.append(Drawing(_bars([entries], ["predicted peak memory, GB"], styles, f"{salt} {place}"), caption))
    return drawn


def _bars(sides: Sequence[Sequence[Bar]], labels: Sequence[str], styles: Styles, salt: str) -> str:
    """Panels of horizontal bars from zero with common names; a hatched outline (below a bar if there is one) is a prediction."""
    count = len(sides[0])
    with _figure(salt, (_WIDTH if len(sides) > 1 else 0.82 * _WIDTH, 0.36 * count + 1.15)) as (figure, finish):
        panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
        for axes, side, label in zip(panels, sides, labels, strict=True):
            paired = any(bar.predicted is not None for bar in side) and any(bar.value is not None for bar in side)
            height, shift = (0.36, 0.19) if paired else (0.62, 0.0)
            ends = [max(bar.value or 0, bar.predicted or 0, *(bar.spread or ())) for bar in side]
            largest = max(ends) or 1.0
            for place, (bar, end) in enumerate(zip(side, ends, strict=True)):
                color = styles[bar.name].color
                if bar.value is not None:
                    axes.barh(place - shift, bar.value, height, color=color, edgecolor="black", linewidth=0.6)
                if bar.predicted is not None:
                    axes.barh(place + shift, bar.predicted, height, facecolor="white", edgecolor=color, hatch="//////", linewidth=0.8)  # fmt: skip
                if bar.spread is not None:
                    axes.hlines(place - shift, *bar.spread, color="black", linewidth=1.2)
                    axes.vlines(bar.spread, place - shift - 0.13, place - shift + 0.13, color="black", linewidth=1.2)
                axes.text(end + 0.015 * largest, place, bar.text, va="center", fontsize=8)
            axes.set_xlim(0, largest * 1.42)
            axes.set_xlabel(label)
            _tidy(axes, "x")
        panels[-1].tick_params(axis="y", length=0)
        panels[0].set_yticks(range(count), [bar.name for bar in sides[0]])
        panels[0].set_ylim(count - 0.4, -0.6)
        return finish()


# --- SVG ---------------------------------------------------------------------------------------------------------------


def _tidy(axes: Any, grid: str) -> None:
    """A light grid along ``grid`` ("x", "y" or "both"), and no frame at the top and the right."""
    axes.grid(axis=grid, alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


@contextlib.contextmanager
def _figure(salt: str, size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure with this file's settings, and a function that gives its SVG text; global settings are restored."""
    require_package("matplotlib", "plots", "distill")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Equal input gives equal bytes; ids differ between the figures of a page.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": f"sfm_fast {salt}"})
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, lambda: _svg(figure)


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    # Names such as axes_1 would be in every figure of a page, and nothing refers to them.
    return re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
