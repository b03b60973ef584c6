"""Curves on log axes for benchmark pages: panels of contenders with bands, and crosses for what ran out of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .plots import WIDTH, Style, drawing, plain, tidy


@dataclass
class Series:
    """One contender's points (x, y, lowest, highest), those that ran out of memory, and whether all was only predicted."""

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


def line_grid(panels: Sequence[Sequence[Panel]], looks: dict[str, Style], salt: str) -> str:
    """Rows of panels with one legend below. Points out of memory stand as crosses in a strip along the top edge."""
    columns = max(len(row) for row in panels)
    width = WIDTH if columns > 1 else 0.62 * WIDTH
    with drawing(salt, (width, 2.75 * len(panels) + 0.75)) as (figure, finish):
        grid = figure.subplots(len(panels), columns, squeeze=False)
        handles: dict[str, Any] = {}
        for row, axes_row in zip(panels, grid, strict=True):
            for place, axes in enumerate(axes_row):
                if place >= len(row) or not row[place].series:
                    axes.set_visible(False)
                    continue
                _draw_panel(axes, row[place], looks, handles, place == 0 or row[place].ylabel != row[0].ylabel)
        across = 4 if columns > 1 else 2
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across, frameon=False)
        return finish()


def _draw_panel(axes: Any, panel: Panel, looks: dict[str, Style], handles: dict[str, Any], labelled: bool) -> None:
    for place, series in enumerate(panel.series):
        look = looks[series.name]
        size = max(3.6, 6.4 - 0.55 * place)  # later marks are smaller, so that equal values don't hide each other
        fill = "white" if series.predicted else look.color
        shape = dict(
            color=look.color, marker=look.marker, markersize=size, markerfacecolor=fill, zorder=4 if look.ours else 3
        )
        x, y, low, high = zip(*sorted(series.points), strict=True) if series.points else ((), (), (), ())
        width = 1.9 if look.ours else 1.3
        (line,) = axes.plot(x, y, linestyle=":" if series.predicted else look.dashes, linewidth=width, **shape)
        if any(a < b for a, b in zip(low, high, strict=True)):
            axes.fill_between(x, low, high, color=look.color, alpha=0.16, linewidth=0)
            axes.vlines(x, low, high, color=look.color, linewidth=0.8, alpha=0.6)
        if x:
            handles.setdefault(series.name + (" (predicted)" if series.predicted else ""), line)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if panel.title:
        axes.set_title(panel.title)
    axes.set_xlabel(panel.xlabel)
    if labelled:
        axes.set_ylabel(panel.ylabel)
    _x_ticks(
        axes,
        sorted({p[0] for s in panel.series for p in s.points} | {x for s in panel.series for x in s.out_of_memory}),
    )
    _y_ticks(axes, [value for s in panel.series for p in s.points for value in p[1:]])
    _strip(axes, panel.series, looks, handles)
    tidy(axes, "both")


def _strip(axes: Any, series: Sequence[Series], looks: dict[str, Style], handles: dict[str, Any]) -> None:
    """Crosses of what ran out of memory, one line a contender, in a grey strip above the data."""
    failed = [one for one in series if one.out_of_memory]
    if not failed:
        return
    bottom, top = axes.get_ylim()
    share = min(0.5, 0.1 + 0.06 * len(failed))
    step = (share - 0.1) / len(failed)
    strip_top = top * (top / bottom) ** (share / (1 - share))
    axes.axhspan(top, strip_top, color="#888888", alpha=0.13, linewidth=0)
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
    axes.set_ylim(bottom, strip_top)
    transform = axes.get_xaxis_transform()
    axes.text(0.015, 1 - 0.012, "✕ out of memory", transform=axes.transAxes, fontsize=7.5, color="#444444", va="top")
    for place, one in enumerate(failed):
        height = 1 - share + (place + 0.6) * step
        look = looks[one.name]
        crosses = axes.scatter(
            one.out_of_memory, [height] * len(one.out_of_memory), transform=transform, color=look.color, marker="x", s=30,
            linewidths=1.6, zorder=5, clip_on=False,
        )  # fmt: skip
        handles.setdefault(one.name, crosses)


def _x_ticks(axes: Any, values: Sequence[float]) -> None:
    """The measured values themselves, but those that would touch; at least a factor 2 wide."""
    if not values:
        return
    low, high = values[0], values[-1]
    span = max(math.log(high / low), math.log(2))
    middle = math.sqrt(low * high)
    half = math.exp(span / 2 * 1.12)
    axes.set_xlim(middle / half, middle * half)
    kept = [high]
    for value in reversed(values[:-1]):
        if math.log(kept[-1] / value) > 0.14 * span:
            kept.append(value)
    axes.set_xticks(kept, [plain(value) for value in kept])
    axes.minorticks_off()


def _y_ticks(axes: Any, values: Sequence[float]) -> None:
    """Round numbers written out, at least a factor 8 from bottom to top."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    span = max(math.log(high / low) * 1.12, math.log(8))
    middle = math.sqrt(low * high)
    axes.set_ylim(middle * math.exp(-span / 2), middle * math.exp(span / 2))
    decades = span / math.log(10)
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if decades < 2.6 else (1,), numticks=12 if decades < 7 else 7)
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
