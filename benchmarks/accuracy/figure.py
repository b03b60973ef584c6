"""The figure of the accuracy result: top-1 against seconds and against images through the backbone, made only from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfm_fast.errors import require_package

from ..report.drawing import save_figure, tidy
from .content import CONVERGED, EQUAL_STEPS, LGM, OURS, PAPER_METHODS, SHIPPED
from .tables import Result, short_name

COLORS = ("#0072B2", "#C65102", "#007A5A", "#8C6D00", "#555555")  # Okabe and Ito's, darkened
FIRST_PAPER, DECOUPLED = PAPER_METHODS
SHOWN = {
    OURS + CONVERGED: ("SFM, default settings", "-"),
    "SFM from noise" + EQUAL_STEPS: ("the same from noise", "-"),
    DECOUPLED + EQUAL_STEPS: (DECOUPLED, "-"),
    FIRST_PAPER + EQUAL_STEPS: (FIRST_PAPER, "-"),
    LGM + EQUAL_STEPS: ("LGM", (0, (5, 2))),
}


def write_figure(result: Result, path: Path) -> None:
    """Two panels for each shipped backbone, one image per class; lines are means over seeds, bands reach from the worst to the best. .svg or .png by ``path``'s ending."""
    require_package("matplotlib", "the figure", "distill")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharey="row")
    for row, phi in zip(panels, SHIPPED, strict=True):
        for axes, (key, title) in zip(
            row, (("seconds", "seconds, one thread"), ("images", "images through the backbone")), strict=True
        ):
            for (label, (name, style)), color in zip(SHOWN.items(), COLORS, strict=True):
                _line(axes, result, label, phi, key, name, style, color)
            axes.set(xscale="log", xlabel=title)
            tidy(axes, "both")
        row[0].set_ylabel("top-1 on test images, %")
        row[0].set_title(f"{short_name(phi)}, one image per class", loc="left", fontsize=11)
    panels[0][0].legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, path, "accuracy")


def _line(axes: Any, result: Result, label: str, phi: str, key: str, name: str, style: Any, color: str) -> None:
    rows = [
        row for row in result["rows"]
        if (row["label"], row["ipc"], row["made_for"], row["backbone"], row["mode"]) == (label, 1, [phi], phi, "probe")
    ]  # fmt: skip
    if not rows:
        return
    looks: list[dict[int, Mapping[str, float]]] = [{point["steps"]: point for point in row["points"]} for row in rows]
    steps = [step for step in looks[0] if all(step in look for look in looks)]
    at = [statistics.fmean(look[step][key] for look in looks) for step in steps]
    top1 = [[100 * look[step]["test"] for look in looks] for step in steps]
    axes.plot(
        at,
        [statistics.fmean(values) for values in top1],
        color=color,
        linestyle=style,
        linewidth=1.5,
        marker=".",
        label=name,
    )
    axes.fill_between(
        at, [min(values) for values in top1], [max(values) for values in top1], color=color, alpha=0.15, linewidth=0
    )
