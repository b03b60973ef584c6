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


TITLES = {
    "recommended": "SFM, recommended",
    "lgm-equal-time": "LGM, as long",
    "decoupled-discriminant": "SFM decoupled, discriminant centres",
    "decoupled-means": "SFM decoupled, class means",
    "recommended-means": "SFM, recommended but class means",
    "sfm": "SFM as in the paper",
}


def run_table(result: Mapping[str, Any]) -> str:
    """One row per backbone and kind of run: top-1 on that backbone, the mean over the two others, steps and seconds; the class means first."""
    rows, lines = result["rows"], []
    for name in result["backbones"]:
        for row in _of(rows, "features", name):
            if row["scale"] is None:
                lines.append(
                    [
                        short_name(name),
                        "class means, no images (held-out training images)",
                        f"{row['top1']:.1f}",
                        "",
                        "",
                        "",
                    ]
                )
        for label in dict.fromkeys(row["label"] for row in rows if row["part"] == "runs"):
            mine = [row for row in _of(rows, "runs", name) if row["label"] == label]
            if mine:
                own = _spread([row["top1"] for row in mine])
                others = _spread([statistics.fmean(row["others"].values()) for row in mine])
                seconds = statistics.fmean(row["seconds"] for row in mine)
                lines.append([short_name(name), TITLES[label], own, others, str(mine[0]["steps"]), f"{seconds:.0f} s"])
    return text_table(("distilled on", "trained on", "own backbone", "other backbones", "steps", "time"), lines)


def weight_table(result: Mapping[str, Any]) -> str:
    """Top-1 of short runs along the length weight: one row per weight; own backbone and the mean over the others, for each backbone."""
    names, lines = result["backbones"], []
    rows = [row for row in result["rows"] if row["part"] == "images" and row["chosen"]]
    for weight in sorted({row["length_weight"] for row in rows}):
        cells = [f"{weight:g}"]
        for name in names:
            row = next(row for row in rows if (row["backbone"], row["length_weight"]) == (name, weight))
            cells += [f"{row['top1']:.1f}", f"{statistics.fmean(row['others'].values()):.1f}"]
        lines.append(cells)
    return text_table(
        ["length weight", *(f"{short_name(name)}: {of}" for name in names for of in ("own", "others"))], lines
    )


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
    weight = next(row["length_weight"] for row in rows if not row["chosen"])
    rows = [row for row in rows if row["length_weight"] == weight]
    points = [(row["shrinkage"], row["top1"]) for row in rows]
    axes.plot(*zip(*sorted(points), strict=True), color=COLORS[name], marker=".", linewidth=1.4)
    for row in rows:
        if row["chosen"]:
            axes.plot(row["shrinkage"], row["top1"], color=COLORS[name], marker="o", markersize=6)
