"""The table and the figure of ``targets.json``, made only from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sfm_fast.errors import require_package
from sfm_fast.report.tables import text_table

from ..report.drawing import save_figure, tidy
from .tables import short_name

Row = Mapping[str, Any]
COLORS = {"fashion_vit": "#0072B2", "fashion_cnn": "#C65102", "tf_efficientnet_lite0": "#007A5A"}  # Okabe and Ito's
STYLES = {0.8: (0, (1, 1.6)), 1.0: "-", 1.2: (0, (5, 3)), 1.5: (0, (5, 1.5, 1, 1.5))}  # by scale


def shrinkage_table(result: Mapping[str, Any]) -> str:
    """Top-1 along lambda at kappa = 1, for each backbone of a probe on the targets themselves, and of short runs' images; the last row is the rule's lambda."""
    names, lines = result["backbones"], []
    header = ["shrinkage λ", *(f"{short_name(name)}: {of}" for name in names for of in ("targets", "images"))]
    features = {
        name: [row for row in _of(result["rows"], "features", name) if row["scale"] in (None, 1.0)] for name in names
    }
    usual = {name: _usual_weight(_of(result["rows"], "images", name)) for name in names}
    known = sorted({row["shrinkage"] for row in features[names[0]] if row["scale"] and not row["chosen"]})
    means = [one for name in names for one in (f"{features[name][0]['top1']:.1f}", "")]
    lines.append(["class means", *means])
    for number in (*known, None):
        cells = ["auto" if number is None else f"{number:g}"]
        for name in names:
            for rows in (features[name][1:], usual[name]):
                row = next(row for row in rows if (row["chosen"] if number is None else row["shrinkage"] == number))
                cells.append(
                    f"{row['top1']:.1f}"
                    + (f" (λ = {row['shrinkage']:.1f})" if number is None and rows is not usual[name] else "")
                )
        lines.append(cells)
    return text_table(header, lines)


def _usual_weight(rows: list[Row]) -> list[Row]:
    """The rows of the length weight along whose lambda there are several."""
    weight = next(row["length_weight"] for row in rows if not row["chosen"])
    return [row for row in rows if row["length_weight"] == weight]


def weight_table(result: Mapping[str, Any]) -> str:
    """Top-1 of short runs along the length weight: one row per weight; own backbone and the mean over the others, for each backbone."""
    names, lines = result["backbones"], []
    rows = [row for row in result["rows"] if row["part"] == "images" and row["chosen"]]
    for weight in sorted({row["length_weight"] for row in rows}):
        cells = [f"{weight:g}"]
        for name in names:
            row = next(row for row in rows if (row["backbone"], row["length_weight"]) == (name, weight))
            cells += [f"{row['top1']:.1f}", f"{_others(row):.1f}" if row["others"] else ""]
        lines.append(cells)
    return text_table(
        ["length weight", *(f"{short_name(name)}: {of}" for name in names for of in ("own", "others"))], lines
    )


def _of(rows: Iterable[Row], part: str, backbone: str) -> list[Row]:
    return [row for row in rows if (row["part"], row["backbone"]) == (part, backbone)]


def _others(row: Row) -> float:
    """Mean top-1 on the backbones other than the distilling one."""
    return statistics.fmean(row["others"].values())


def write_figure(result: Mapping[str, Any], path: Path) -> None:
    """Three panels, as .svg or .png by ``path``'s ending: probes trained on the targets themselves, and on images of short runs along lambda and the length weight."""
    require_package("matplotlib", "the figure", "distill")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.7), layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    for name in result["backbones"]:
        _features(first, _of(result["rows"], "features", name), name)
        images = _of(result["rows"], "images", name)
        _images(second, images, name)
        _weights(third, [row for row in images if row["chosen"]], name)
    first.set_title("a  A probe trained on the targets, without images", loc="left", fontsize=11)
    second.set_title(f"b  On images of {images[0]['steps']} steps", loc="left", fontsize=11)
    third.set_title("c  The same along the weight of lengths", loc="left", fontsize=11)
    first.set_ylabel("top-1 on held-out training images, %")
    for axes in (first, second):
        axes.set(xscale="log", xlabel="shrinkage λ")
    third.set_xlabel("length weight")
    for axes in (first, second, third):
        tidy(axes, "both")
    first.legend(frameon=False, fontsize=8.5)
    third.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0.84))
    save_figure(figure, path, "targets")


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
    rows = _usual_weight(rows)
    points = [(row["shrinkage"], row["top1"]) for row in rows]
    axes.plot(*zip(*sorted(points), strict=True), color=COLORS[name], marker=".", linewidth=1.4)
    for row in rows:
        if row["chosen"]:
            axes.plot(row["shrinkage"], row["top1"], color=COLORS[name], marker="o", markersize=6)


def _weights(axes: Any, rows: list[Row], name: str) -> None:
    rows = sorted(rows, key=lambda row: row["length_weight"])
    places = range(len(rows))  # not to scale, because the first weight is 0
    axes.plot(
        places, [row["top1"] for row in rows], color=COLORS[name], marker=".", linewidth=1.4, label=short_name(name)
    )
    if rows[0]["others"]:
        label, dotted = f"{short_name(name)}: on the others", (0, (1, 1.6))
        axes.plot(places, list(map(_others, rows)), color=COLORS[name], linestyle=dotted, linewidth=1.4, label=label)
    axes.set_xticks(places, [f"{row['length_weight']:g}" for row in rows])
