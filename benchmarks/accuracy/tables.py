"""Tables and verdicts of the accuracy result: methods x images per class x distilling and evaluating backbones x modes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from sfm_fast.report.tables import text_table
from sfm_fast.units import megabytes

ALLOWED_LOSS = 0.5  # points below LGM at equal steps
OURS = "sfm-decoupled, recommended"  # the run that the claims are made for
LONG = f"{OURS}, LGM's time"  # as many steps as fit into LGM's time
INHERIT_GAIN = 3.0  # points above the probe, on a backbone other than the distilling one
TITLES = {
    "probe": "a linear probe trained on the images",
    "inherit": "the inherited classifier",
    "kd": "a probe with the inherited classifier as teacher",
}

Row = dict[str, Any]  # of `Evaluator`, with the table's keys: label, distilled_on, steps, and the cost of distilling
Rows = list[Row]


class Result(TypedDict):
    """The part of accuracy.json that the tables read."""

    rows: Rows
    backbones: list[Mapping[str, Any]]  # as `Backbone.describe` gives them


def summary(result: Result) -> str:
    """One row per label: top-1 on the distilling backbone, and means over pairs of different backbones in all modes.

    Only distilling backbones with every run (`compared`) count, since means of different cells can't be compared.
    """
    cells, phis = [], compared(result)
    rows = [row for row in result["rows"] if row["distilled_on"] in phis]
    for ipc, label in _labels(rows):
        group = [row for row in rows if (row["label"], row["ipc"]) == (label, ipc)]
        own = [row for row in group if row["distilled_on"] == row["backbone"]]
        others = [row for row in group if row["distilled_on"] != row["backbone"]]
        costs = [row for row in own if row["mode"] == "probe" and row["distillation_seconds"] is not None]
        seconds = f"{sum(row['distillation_seconds'] for row in costs):.0f} s" if costs else ""
        peak = megabytes(max(row["peak_bytes"] for row in costs)) if costs else ""
        picked = [_of_mode(own, "probe"), *(_of_mode(others, mode) for mode in TITLES)]
        cells.append([label, str(ipc), *(_mean(rows) for rows in picked), seconds, peak])
    header = (
        "trained on", "images a class", "own backbone, probe", "other backbones, probe", "inherit", "kd", "distillation",
        "peak of a step",
    )  # fmt: skip
    return text_table(header, cells)


def compared(result: Result) -> list[str]:
    """The distilling backbones on which every run of the table was made."""
    names = [backbone["name"] for backbone in result["backbones"]]
    made = {(row["label"], row["ipc"], row["distilled_on"]) for row in result["rows"] if row["steps"] is not None}
    runs = {run[:2] for run in made}
    return [name for name in names if all((*run, name) in made for run in runs)]


def full_tables(result: Result) -> str:
    """For every number of images and mode a table of all pairs of backbones, as Markdown with headings."""
    parts = []
    names = [backbone["name"] for backbone in result["backbones"]]
    labels = _labels(result["rows"])
    for ipc in sorted({ipc for ipc, label in labels if label != "full"}):
        for mode, title in TITLES.items():
            cells = []
            for its_ipc, label in labels:
                by_pair = {
                    (row["distilled_on"], row["backbone"]): row
                    for row in result["rows"]
                    if (row["label"], row["ipc"], row["mode"]) == (label, its_ipc, mode)
                }
                if by_pair and (its_ipc == ipc or label == "full"):
                    cells.append([label, *(_cell(by_pair.get((a, b))) for a in names for b in names)])
            if not cells:
                continue
            header = ["trained on", *(f"{short_name(a)} → {short_name(b)}" for a in names for b in names)]
            plural = "image" if ipc == 1 else "images"
            parts.append(f"### {ipc} {plural} a class: {title}\n\n{text_table(header, cells)}")
    return "\n\n".join(parts)


def stored_table(result: Result) -> str:
    """The bytes that inheritance stores besides the evaluating backbone, and its fit's time, for every pair of backbones."""
    cells, seen = [], set()
    for row in result["rows"]:
        pair = row["distilled_on"], row["backbone"]
        if row["mode"] != "inherit" or row["label"] != OURS or pair in seen:
            continue
        seen.add(pair)
        cells.append(
            [
                f"{short_name(pair[0])} → {short_name(pair[1])}",
                f"{row['parameters']:,}",
                f"{row['bytes_fp32'] / 1e6:.2f} MB",
                f"{row['bytes_bf16'] / 1e6:.2f} MB",
                f"{4 * row['parameters_folded'] / 1e3:.1f} kB",
                f"{row['fit_seconds']:.2f} s",
            ]
        )
    return text_table(("distilled on → used on", "numbers", "fp32", "bf16", "as one map, fp32", "ridge fit"), cells)


def verdicts(result: Result) -> str:
    """Each claim with the required and the measured difference, one line each."""
    rows, lines = result["rows"], []
    by_cell = {(row["label"], row["ipc"], row["mode"], row["distilled_on"], row["backbone"]): row for row in rows}

    def points(label: str, ipc: int, mode: str, pair: tuple[str, str]) -> float | None:
        row = by_cell.get((label, ipc, mode, *pair))
        return None if row is None else 100 * float(row["top1_mean"])

    names = [backbone["name"] for backbone in result["backbones"]]
    # (run, the run it is compared with, required points above it): probes on the distilling backbone.
    against = ((OURS, "lgm", -ALLOWED_LOSS), (OURS, "lgm, equal time", 0.0), (LONG, "lgm", 0.0))
    for ipc in sorted({ipc for ipc, label in _labels(rows) if label != "full"}):
        for label, other, least in against:
            for phi in names:
                a, b = (points(one, ipc, "probe", (phi, phi)) for one in (label, other))
                if a is not None and b is not None:
                    met = a - b >= least if least else a - b > 0
                    lines.append(_verdict(f"{label} against {other}", ipc, short_name(phi), a - b, least, met))
        for label in (OURS, LONG):
            for phi, psi in itertools.permutations(names, 2):
                a, b = (points(label, ipc, mode, (phi, psi)) for mode in ("inherit", "probe"))
                if a is not None and b is not None:
                    pair = f"{short_name(phi)} → {short_name(psi)}"
                    met = a - b >= INHERIT_GAIN
                    lines.append(_verdict(f"inherit against probe, {label}", ipc, pair, a - b, INHERIT_GAIN, met))
    return text_table(("claim", "images a class", "on", "wanted", "measured, points", ""), lines)


def _verdict(what: str, ipc: int, where: str, measured: float, least: float, met: bool) -> list[str]:
    wanted = f"at least {least:+.1f}" if least else "above 0"
    return [what, str(ipc), where, wanted, f"{measured:+.1f}", "met" if met else "missed"]


def _labels(rows: Iterable[Row]) -> list[tuple[int, str]]:
    """(ipc, label) in the order of the table: full data first, then by number of images, each in order of appearance."""
    labels = dict.fromkeys((row["ipc"], row["label"]) for row in rows)
    return sorted(labels, key=lambda one: (one[1] != "full", one[0]))


def _of_mode(rows: Rows, mode: str) -> Rows:
    return [row for row in rows if row["mode"] == mode]


def _mean(rows: Rows) -> str:
    """Mean of the rows' means; its spread is the mean of the rows' spreads."""
    if not rows:
        return ""
    mean, spread = (statistics.fmean(row[f"top1_{kind}"] for row in rows) for kind in ("mean", "std"))
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['top1_mean']:.1f} ± {100 * row['top1_std']:.1f}"


def short_name(name: str) -> str:
    """A backbone's name, short enough for a column."""
    return name.removeprefix("fashion_").removeprefix("tf_").removesuffix("_lite0")
