"""The figure and the table of ``derivation.json``, made only from its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sfm_fast.errors import require_package
from sfm_fast.report.tables import text_table

from ..report.drawing import save_figure, tidy
from .rows import Measured, Point, Result

# Okabe and Ito's palette, for colour-blind readers too, with one marker per colour.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#C65102", "#007A5A", "#A0508A"
STYLES = {
    "features as they are": (BLUE, "o"),
    "common mean subtracted": (PURPLE, "D"),
    "balanced batch, W = 0": (GREEN, "s"),
    "random batch, W = 0": (ORANGE, "^"),
    "random batch, drawn W (LGM)": (BLUE, "o"),
    "LGM, common mean subtracted": (PURPLE, "D"),
}
DASHED, DOTTED, GREY = (0, (5, 3)), (0, (1, 1.6)), "#666666"
SMALLEST = 1e-9  # a smaller distance is only rounding, of a batch that has all images


@dataclass(frozen=True)
class Label:
    """A series' name next to its line: at the fraction ``place`` along it, moved by (right, up) points."""

    text: str
    place: float
    right: float = 0
    up: float = 0
    align: str = "left"


def number(row: Point, name: str) -> float:
    return cast(Mapping[str, float], row)[name]


def _lines(axes: Any, rows: list[Point], x: str, labels: dict[str, Label]) -> None:
    """Measured band and median, first order (dashed) and bound (dotted) of each labelled series along ``x``."""
    for name, label in labels.items():
        color, marker = STYLES[name]
        log = axes.get_yscale() == "log"
        shown = [row for row in rows if row["series"] == name and (row["predicted"] > SMALLEST or not log)]
        xs, medians = [number(row, x) for row in shown], [row["distance_median"] for row in shown]
        band = ([number(row, f"distance_{end}") for row in shown] for end in ("p10", "p90"))
        axes.fill_between(xs, *band, color=color, alpha=0.2, linewidth=0)
        axes.plot(xs, medians, color=color, marker=marker, markersize=4, linewidth=1.4)
        axes.plot(xs, [row["predicted"] for row in shown], color=color, linewidth=1.1, linestyle=DASHED)
        axes.plot(xs, [row["bound"] for row in shown], color=color, linewidth=1.4, linestyle=DOTTED)
        k = round(label.place * (len(xs) - 1))
        axes.annotate(
            label.text,
            (xs[k], medians[k]),
            (label.right, label.up),
            textcoords="offset points",
            color=color,
            fontsize=9.5,
            horizontalalignment=label.align,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
        )


def _mark(axes: Any, x: float, text: str) -> None:
    """A grey vertical line at ``x`` with its meaning at the bottom."""
    axes.axvline(x, color=GREY, linewidth=0.8, zorder=0)
    axes.annotate(
        text, (x, 0), (4, 5), xycoords=axes.get_xaxis_transform(), textcoords="offset points", color=GREY, fontsize=9
    )


def write_figure(result: Result, path: Path) -> None:
    """Three panels of the result's first backbone, as .svg or .png by ``path``'s ending."""
    require_package("matplotlib", "the figure", "distill")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    measured = next(iter(result["backbones"].values()))
    panels, some = measured["panels"], measured["panels"]["spread"][0]["n"]
    figure = Figure(figsize=(13.5, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    weights, batch, spread = figure.subplots(1, 3)

    weights.set(xscale="log", yscale="log", ylim=(2e-5, 60), xlabel="standard deviation σ of the weights W")
    _lines(
        weights,
        panels["weights"],
        "sigma",
        {
            "features as they are": Label("features as they are", 0.5, -8, 6, "right"),
            "common mean subtracted": Label("common mean\nsubtracted", 0.5, 9, -24),
        },
    )
    weights.set_title(f"a  All {measured['moments']['images']} images, drawn W", loc="left", fontsize=11)
    weights.set_ylabel("distance of LGM's gradient to the flow\n(1 = as long as the flow)")
    _mark(weights, 0.01, "LGM's σ")
    batch.set(xscale="log", yscale="log", xlabel="images n in the batch")
    _lines(
        batch,
        panels["batch"],
        "n",
        {
            "random batch, drawn W (LGM)": Label("random, drawn W (LGM)", 1, 0, 30, "right"),
            "random batch, W = 0": Label("random, W = 0", 0.75, 9, 3),
            "balanced batch, W = 0": Label("balanced, W = 0", 0.55, -8, -14, "right"),
        },
    )
    batch.set_title("b  Batches of n images", loc="left", fontsize=11)
    _mark(batch, some, "LGM's n at ipc 1")
    _lines(
        spread,
        panels["spread"],
        "scale",
        {
            "random batch, drawn W (LGM)": Label("random, drawn W (LGM)", 0, 6, 34),
            "random batch, W = 0": Label("random, W = 0", 0, 6, -28),
            "balanced batch, W = 0": Label("balanced, W = 0", 0.45, 12, -8),
            "LGM, common mean subtracted": Label("LGM, common\nmean subtracted", 0, 6, 18),
        },
    )
    spread.set(ylim=(0, None), xlim=(0, 2), xlabel="spread within classes s (1 = the real one)")
    spread.set_title(f"c  Batches of {some}, wider or narrower classes", loc="left", fontsize=11)
    for axes in (weights, batch, spread):
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=0)
        tidy(axes, "both")
    key: Mapping[str, Any] = {
        f"measured median, 10–90 % of {measured['draws']} draws": (
            Patch(facecolor="#888", alpha=0.3),
            Line2D([], [], color="#444", marker="o", markersize=4),
        ),
        "first order, root mean square": Line2D([], [], color="#444", linestyle=DASHED),
        "bound on the root mean square": Line2D([], [], color="#444", linestyle=DOTTED),
    }
    figure.legend(list(key.values()), list(key), loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    save_figure(figure, path, "derivation")


def findings(measured: Measured) -> Iterable[tuple[str, Point]]:
    """The main rows of one backbone: LGM's own sigma and batch, one cause at a time and all together."""
    panels, some = measured["panels"], measured["panels"]["spread"][0]["n"]
    for row in panels["weights"]:
        if row["sigma"] == 0.01:
            yield f"all {row['n']} images, drawn W, {row['series']}", row
    for row in panels["batch"]:
        if row["n"] == some:
            yield f"{row['series']}, n = {some}", row
    yield f"LGM on an augmented batch, n = {some}", measured["augmentation"]["lgm"]


def findings_table(result: Result) -> str:
    """Markdown table of `findings`, for every backbone."""
    header = ("gradient", "backbone", "distance (10–90 %)", "rms", "first order", "bound", "cosine", "mean of draws")
    rows = []
    for name, measured in result["backbones"].items():
        for what, row in findings(measured):
            low, middle, high = (f"{number(row, 'distance_' + key):.2f}" for key in ("p10", "median", "p90"))
            numbers = (f"{number(row, key):.2f}" for key in ("distance_rms", "predicted", "bound", "cosine_median"))
            rows.append((what, name, f"{middle} ({low}–{high})", *numbers, f"{row['distance_of_mean']:.2f}"))
    return text_table(header, rows)
