"""Plots as SVG text, to embed in a page."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ..errors import require_package


def line_plot(
    x: Sequence[float],
    y: Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
    marks: Sequence[float] = (),
    mark_label: str = "",
) -> str:
    """One line over x, with dotted vertical lines at ``marks``; with a running median if there are many points."""
    require_package("matplotlib", "plots", "distill")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.plot(x, y, color="#9db8d9", linewidth=1)
    window = max(1, len(y) // 40)
    if window > 1:
        smooth = [
            sorted(y[max(0, i - window) : i + window + 1])[len(y[max(0, i - window) : i + window + 1]) // 2]
            for i in range(len(y))
        ]
        axes.plot(x, smooth, color="#1f4e8c", linewidth=1.6)
    for index, mark in enumerate(marks):
        axes.axvline(mark, color="#999", linewidth=0.8, linestyle=":", label=mark_label if index == 0 else None)
    if marks and mark_label:
        axes.legend(frameon=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
