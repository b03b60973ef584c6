"""The table and the figure of ``targets.json``, made only from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sfm_fast.errors import require_package
from sfm_fast.files import write_atomically
from sfm_fast.report.tables import text_table

from .tables import short_name

Row = Mapping[str, Any]
COLORS = {"fashion_vit": "#0072B2", "fashion_cnn": "#C65102", "tf_efficientnet_lite0": "#007A5A"}  # Okabe and Ito's
STYLES = {0.8: (0, (1, 1.6)), 1.0: "-", 1.2: (0, (5, 3)), 1.5: (0, (5, 1.5, 1, 1.5))}  # by scale


def run_table(result: Mapping[str, Any]) -> str:
    """One row per label: top-1 on the distilling backbone, steps, and the seconds of a run on each backbone; the class means first."""
    rows, names = result["rows"], result["backbones"]
    header = ["trained on", *map(short_name, names), *(f"{short_name(name)}: steps, time" for name in names)]
    lines = []
    means = [next((row["top1"] for row in _of(rows, "features", name) if row["scale"] is None), None) for name in names]
    if any(value is not None for value in means):
        told = ["" if value is None else f"{value:.1f}" for value in means]
        lines.append(["class means, no images (held-out training images)", *told, *[""] * len(names)])
    for label in dict.fromkeys(row["label"] for row in rows if row["part"] == "runs"):
        cells, costs = [], []
        for name in names:
            mine = [row for row in _of(rows, "runs", name) if row["label"] == label]
            cells.append(_spread([row["top1"] for row in mine]))
            seconds = [row["seconds"] for row in mine]
            costs.append(f"{mine[0]['steps']}, {statistics.fmean(seconds):.0f} s" if mine else "")
        lines.append([label, *cells, *costs])
    return text_table(header, lines)


def _of(rows: Iterable[Row], part: str, backbone: str) -> list[Row]:
    return [row for row in rows if (row["part"], row["backbone"]) == (part, backbone)]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def write_figure(result: Mapping[str, Any], path: Path) -> None:
    """Two panels, accuracy along lambda of probes trained on the targets and on short runs' images, as .svg or .png by ``path``'s ending."""
    require_package("matplotlib", "the figure", "distill")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "targets", "font.size": 10, "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for name in result["backbones"]:
            _features(left, _of(result["rows"], "features", name), name)
            _images(right, _of(result["rows"], "images", name), name)
        left.set_title("a  a probe trained on the targets themselves", loc="left")
        right.set_title("b  on images distilled to them", loc="left")
        left.set_ylabel("top-1 on held-out training images, %")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("shrinkage λ")
            axes.grid(alpha=0.3, linewidth=0.6)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        left.legend(frameon=False, fontsize=8.5, ncols=2)
        write_atomically(
            path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None})
        )


def _features(axes: Any, rows: list[Row], name: str) -> None:
    color = COLORS[name]
    for scale, style in STYLES.items():
        points = [(row["shrinkage"], row["top1"]) for row in rows if row["scale"] == scale and not row["chosen"]]
        label = f"{short_name(name)}, κ = {scale:g}" if scale == 1 or name == "fashion_vit" else None
        axes.plot(*zip(*sorted(points), strict=True), color=color, linestyle=style, linewidth=1.4, label=label)
    for row in rows:
        if row["scale"] is None:
            axes.axhline(row["top1"], color=color, linewidth=0.7, alpha=0.6)
        elif row["chosen"] and row["scale"] == 1:
            axes.plot(row["shrinkage"], row["top1"], color=color, marker="o", markersize=6)


def _images(axes: Any, rows: list[Row], name: str) -> None:
    points = [(row["shrinkage"], row["top1"]) for row in rows]
    axes.plot(*zip(*sorted(points), strict=True), color=COLORS[name], marker=".", linewidth=1.4)
    for row in rows:
        if row["chosen"]:
            axes.plot(row["shrinkage"], row["top1"], color=COLORS[name], marker="o", markersize=6)
