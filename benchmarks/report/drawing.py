"""Draws the figures of a benchmark page with matplotlib, as SVG text: curves on log axes, and bars."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfm_fast.errors import require_package
from sfm_fast.files import write_atomically

from ..rows import Result

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
    tidy(axes, "both")


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


def bar_grid(sides: Sequence[Sequence[Bar]], labels: Sequence[str], styles: Styles, salt: str) -> str:
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
            tidy(axes, "x")
        panels[-1].tick_params(axis="y", length=0)
        panels[0].set_yticks(range(count), [bar.name for bar in sides[0]])
        panels[0].set_ylim(count - 0.4, -0.6)
        return finish()


# --- SVG ---------------------------------------------------------------------------------------------------------------


def tidy(axes: Any, grid: str) -> None:
    """A light grid along ``grid`` ("x", "y" or "both"), and no frame at the top and the right."""
    axes.grid(axis=grid, alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Any, path: Path, salt: str) -> None:
    """Write a figure of matplotlib as .svg or .png, by ``path``'s ending; equal numbers give equal bytes."""
    import matplotlib

    options: dict[str, Any] = {"format": path.suffix[1:], "dpi": 150, "facecolor": "white"}
    options["metadata"] = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        write_atomically(path, lambda temporary: figure.savefig(temporary, **options))


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
