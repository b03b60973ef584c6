"""Drawing for benchmark pages, as SVG text: colours and shapes that survive greyscale, bars, and dots on a log axis."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sfm_fast.errors import require_package

# Okabe and Ito's colours (Color Universal Design, 2008), without the yellow that vanishes on white, and a grey.
_OURS = ("#0072B2", "#56B4E9", "#009E73")
_RIVALS = ("#D55E00", "#E69F00", "#CC79A7", "#000000", "#7F7F7F")
_MARKERS = (
    "o",
    "s",
    "D",
    "^",
    "v",
    "P",
    "X",
    "<",
    ">",
    "p",
    "h",
)  # a number with no divisor in common with the colours
_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.7,
    "figure.constrained_layout.w_pad": 0.11,
    "figure.constrained_layout.h_pad": 0.09,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a $ in a name is a $
}
WIDTH = 9.6


@dataclass(frozen=True)
class Style:
    """How a contender is drawn wherever it stands on a page."""

    color: str
    marker: str
    dashes: Any
    ours: bool


def styles(names: Iterable[tuple[str, bool]]) -> dict[str, Style]:
    """A style for each (name, is ours), in order of appearance: blues and green for ours, the other colours for rivals."""
    found: dict[str, Style] = {}
    counts = {True: 0, False: 0}
    for name, ours in names:
        if name in found:
            continue
        place, colors = counts[ours], _OURS if ours else _RIVALS
        counts[ours] += 1
        marker = _MARKERS[(place if ours else place + 3) % len(_MARKERS)]
        dashes = _DASHES[(place if ours else place + 1) % len(_DASHES)]
        found[name] = Style(colors[place % len(colors)], marker, dashes, ours)
    return found


@dataclass
class Bar:
    """One contender's value with its spread, and what was predicted; ``text`` stands at the end, or says why there is no value."""

    name: str
    value: float | None
    text: str
    spread: tuple[float, float] | None = None
    predicted: float | None = None


def plain(value: float) -> str:
    """A tick's number written out."""
    return f"{value:,.0f}".replace(",", "\u202f") if value >= 10 else f"{value:g}"


def bars(left: Sequence[Bar], right: Sequence[Bar], labels: tuple[str, str], looks: dict[str, Style], salt: str) -> str:
    """Two panels of horizontal bars from zero under common names; a hatched outline below a bar is its prediction."""
    with drawing(salt, (WIDTH, 0.36 * len(left) + 1.15)) as (figure, finish):
        both = figure.subplots(1, 2, sharey=True)
        for axes, side, label in zip(both, (left, right), labels, strict=True):
            paired = any(bar.predicted is not None for bar in side)
            largest = max([0.0, *(max(bar.value or 0, bar.predicted or 0, *(bar.spread or ())) for bar in side)]) or 1.0
            for place, bar in enumerate(side):
                look = looks[bar.name]
                height, shift = (0.36, 0.19) if paired else (0.62, 0.0)
                if bar.value is not None:
                    axes.barh(place - shift, bar.value, height, color=look.color, edgecolor="black", linewidth=0.6)
                if bar.predicted is not None:
                    axes.barh(place + shift, bar.predicted, height, facecolor="white", edgecolor=look.color, hatch="//////", linewidth=0.8)  # fmt: skip
                if bar.spread is not None:
                    axes.hlines(place - shift, *bar.spread, color="black", linewidth=1.2)
                    axes.vlines(bar.spread, place - shift - 0.13, place - shift + 0.13, color="black", linewidth=1.2)
                end = max([bar.value or 0, bar.predicted or 0, *(bar.spread or ())])
                axes.text(end + 0.015 * largest, place, bar.text, va="center", fontsize=8)
            axes.set_xlim(0, largest * 1.42)
            axes.set_xlabel(label)
            tidy(axes, "x")
        both[1].tick_params(axis="y", length=0)
        both[0].set_yticks(range(len(left)), [bar.name for bar in left])
        both[0].set_ylim(len(left) - 0.4, -0.6)
        return finish()


def dots(entries: Sequence[Bar], xlabel: str, looks: dict[str, Style], salt: str) -> str:
    """One dot a name on a log axis: bars would have no zero to start from."""
    values = [bar.value for bar in entries if bar.value]
    with drawing(salt, (0.82 * WIDTH, 0.3 * len(entries) + 0.9)) as (figure, finish):
        axes = figure.subplots()
        low, high = min(values), max(values)
        for place, bar in enumerate(entries):
            look = looks[bar.name]
            axes.axhline(place, color="#cccccc", linewidth=0.6, zorder=0)
            if bar.value:
                axes.plot([bar.value], [place], color=look.color, marker=look.marker, markerfacecolor="white", markeredgewidth=1.6, markersize=7)  # fmt: skip
                axes.annotate(bar.text, (bar.value, place), (9, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, high * max(4.0, (high / low) ** 0.35))
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,), numticks=14))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(xlabel)
        axes.set_yticks(range(len(entries)), [bar.name for bar in entries])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        tidy(axes, "x")
        return finish()


def tidy(axes: Any, grid: str) -> None:
    """A light grid along ``grid`` ("x", "y" or "both"), no frame above and on the right."""
    axes.grid(axis=grid, alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


@contextlib.contextmanager
def drawing(salt: str, size: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure under this file's settings, and what turns it into SVG text; nothing global is left changed."""
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
    # Names such as axes_1 would stand once in every figure of a page; nothing refers to them.
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
