"""Tables and verdicts of the accuracy result: methods x images per class x distilling and evaluating backbones x modes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from sfm_fast.report.tables import text_table
from sfm_fast.units import megabytes

from .content import BOTH, CONVERGED, EQUAL_STEPS, EQUAL_TIME, LGM, LITE, OURS, SHIPPED

TITLES = {
    "probe": "a linear probe trained on the images",
    "inherit": "the inherited classifier",
    "kd": "a probe with the inherited classifier as teacher",
}
OWN_GOALS = {
    1: ("class-means", 2.0),
    10: ("random-real", 6.0),
    50: ("random-real", 0.0),
}  # points above, by images per class

Row = Mapping[str, Any]  # of `judge`


class Result(TypedDict):
    """The part of accuracy.json that the tables read."""

    rows: Sequence[Row]
    backbones: Sequence[Mapping[str, Any]]  # as `Backbone.describe` gives them
    costs: Mapping[
        str, Mapping[str, Mapping[str, float]]
    ]  # "backbone, images per class": name: seconds and peak bytes of a step
    left_out: Sequence[Mapping[str, Any]]


class Cell(NamedTuple):
    """What a score is of; ``made_for``: "" for those on real images."""

    label: str
    ipc: int
    made_for: tuple[str, ...]
    distilled_on: str
    backbone: str
    mode: str


class Score(NamedTuple):
    """Mean and standard deviation of top-1, in percent."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}"


def scores(result: Result) -> dict[Cell, Score]:
    """Of every cell, over its seeds, in the order of the result."""
    found: dict[Cell, list[Row]] = {}
    for row in result["rows"]:
        cell = Cell(row["label"], row["ipc"], tuple(row["made_for"]), row["distilled_on"], row["backbone"], row["mode"])
        found.setdefault(cell, []).append(row)
    return {cell: _score(rows) for cell, rows in found.items()}


def _score(rows: list[Row]) -> Score:
    values = [100 * row["top1"] for row in rows]
    if len(values) == 1:
        return Score(values[0], 100 * rows[0].get("std", 0.0))
    return Score(statistics.fmean(values), statistics.stdev(values))


def summary(result: Result) -> str:
    """One row per kind of images that the two shipped backbones have: the mean over both, on themselves, on each other and on EfficientNet-lite0."""
    known, lines = scores(result), []
    for ipc, label in _labels(known):
        groups = {
            cell.made_for
            for cell in known
            if (cell.label, cell.ipc) == (label, ipc) and set(cell.made_for) <= set(SHIPPED)
        }
        if not groups or (len(next(iter(groups))) == 1 and len(groups) < len(SHIPPED)):
            continue

        def mean(mode: str, kind: str, ipc: int = ipc, label: str = label) -> str:
            return _mean(
                score
                for cell, score in known.items()
                if (cell.label, cell.ipc, cell.mode) == (label, ipc, mode) and _kind(cell) == kind
            )

        rows = [
            row
            for row in result["rows"]
            if (row["label"], row["ipc"]) == (label, ipc)
            and row["mode"] == "probe"
            and row["backbone"] in row["made_for"]
        ]
        timed = [row for row in rows if row.get("seconds")]
        steps = str(round(statistics.fmean(row["steps"] for row in timed))) if timed else ""
        seconds = f"{statistics.fmean(row['seconds'] for row in timed):.0f} s" if timed else ""
        lines.append(
            [
                label,
                str(ipc or ""),
                mean("probe", "own"),
                mean("probe", "other"),
                mean("inherit", "other"),
                mean("kd", "other"),
                mean("probe", "unseen"),
                steps,
                seconds,
            ]
        )
    header = (
        "trained on",
        "images a class",
        "own backbone",
        "the other, probe",
        "inherit",
        "kd",
        "EfficientNet-lite0",
        "steps",
        "time",
    )
    return text_table(header, lines)


def _kind(cell: Cell) -> str:
    """Where a cell of the shipped backbones was evaluated: "own", "other" of the two, "unseen"; "" for other cells."""
    if not set(cell.made_for) <= set(SHIPPED):
        return ""
    if cell.backbone == LITE:
        return "unseen"
    if cell.mode == "probe":
        return "own" if cell.backbone in cell.made_for else "other"
    return "own" if cell.backbone == cell.distilled_on else "other"


def full_tables(result: Result) -> str:
    """For every number of images and mode a table of all pairs of backbones, as Markdown with headings."""
    known, parts = scores(result), []
    names = [backbone["name"] for backbone in result["backbones"]]
    for ipc in sorted({cell.ipc for cell in known} - {0}):
        for mode, title in TITLES.items():
            lines = []
            for its_ipc, label in _labels(known):
                by_pair = {
                    (cell.distilled_on, cell.backbone): score
                    for cell, score in known.items()
                    if (cell.label, cell.ipc, cell.mode) == (label, its_ipc, mode)
                }
                if by_pair and its_ipc in (0, ipc):
                    lines.append([label, *(str(by_pair.get((a, b), "")) for a in names for b in names)])
            if lines:
                header = ["trained on", *(f"{short_name(a)} → {short_name(b)}" for a in names for b in names)]
                plural = "image" if ipc == 1 else "images"
                parts.append(f"### {ipc} {plural} a class: {title}\n\n{text_table(header, lines)}")
    return "\n\n".join(parts)


def costs_table(result: Result) -> str:
    """A step of our default settings and of LGM: seconds and peak memory, with what LGM would need at least 15 minutes for."""
    lines = []
    for name, cost in result["costs"].items():
        phi, _, ipc = name.partition(", ")
        ours, lgm = cost[OURS], cost[LGM]
        left = any((one["made_for"], one["ipc"]) == ([phi], int(ipc)) for one in result["left_out"])
        lines.append(
            [
                short_name(phi), ipc, f"{1e3 * ours['seconds']:.0f} ms", f"{1e3 * lgm['seconds']:.0f} ms", f"{lgm['seconds'] / ours['seconds']:.1f}",
                megabytes(ours["peak_bytes"]), megabytes(lgm["peak_bytes"]), "left out" if left else "",
            ]
        )  # fmt: skip
    return text_table(
        ("backbone", "images a class", "SFM", "LGM", "time x", "memory of SFM", "memory of LGM", "LGM in this table"),
        lines,
    )


def stored_table(result: Result) -> str:
    """The bytes that inheritance stores besides the evaluating backbone, and its fit's time, for every pair of backbones."""
    lines, seen = [], set()
    for row in result["rows"]:
        pair = row["distilled_on"], row["backbone"]
        if row["mode"] != "inherit" or row["label"] != "nearest-real" or pair in seen:
            continue
        seen.add(pair)
        lines.append(
            [
                f"{short_name(pair[0])} → {short_name(pair[1])}",
                f"{row['parameters']:,}",
                f"{row['bytes_fp32'] / 1e6:.2f} MB",
                f"{row['bytes_bf16'] / 1e6:.2f} MB",
                f"{4 * row['parameters_folded'] / 1e3:.1f} kB",
                f"{row['fit_seconds']:.2f} s",
            ]
        )
    return text_table(("distilled on → used on", "numbers", "fp32", "bf16", "as one map, fp32", "ridge fit"), lines)


def verdicts(result: Result) -> str:
    """Each goal with the wanted and the measured difference, one line each."""
    return text_table(
        ("goal", "images a class", "on", "wanted", "measured, points", ""), list(_verdicts(scores(result)))
    )


def _verdicts(known: Mapping[Cell, Score]) -> Iterator[list[str]]:
    def points(label: str, ipc: int, made_for: tuple[str, ...], psi: str, mode: str = "probe") -> float | None:
        found = [
            score.mean
            for cell, score in known.items()
            if (cell.label, cell.ipc, cell.made_for, cell.backbone, cell.mode) == (label, ipc, made_for, psi, mode)
        ]
        return statistics.fmean(found) if found else None

    def line(
        what: str, ipc: int, where: str, ours: float | None, other: float | None, least: float, strict: bool = False
    ) -> Iterator[list[str]]:
        if ours is not None and other is not None:
            measured = ours - other
            wanted = "above 0" if strict else f"at least {least:+.1f}"
            met = measured > 0 if strict else measured >= least
            yield [what, str(ipc), where, wanted, f"{measured:+.1f}", "met" if met else "missed"]

    best = OURS + CONVERGED
    for ipc, (reference, least) in OWN_GOALS.items():
        label = "cluster-means" if reference == "class-means" and ipc > 1 else reference
        for phi in (*SHIPPED, LITE):
            yield from line(
                f"SFM above {label}, own backbone",
                ipc,
                short_name(phi),
                points(best, ipc, (phi,), phi),
                points(label, ipc, (phi,), phi),
                least,
            )
    for ipc in (1, 10):
        for phi, psi in itertools.permutations(SHIPPED):
            pair = f"{short_name(phi)} → {short_name(psi)}"
            yield from line(
                "SFM above nearest-real, probe",
                ipc,
                pair,
                points(best, ipc, (phi,), psi),
                points("nearest-real", ipc, (phi,), psi),
                3.0,
            )
            ours, real = (points(label, ipc, (phi,), psi, "inherit") for label in (best, "random-real"))
            yield from line("SFM above random-real, inherit", ipc, pair, ours, real, 0.0)
    real_ones = [points("nearest-real", 1, (phi,), LITE) for phi in SHIPPED]
    if None not in real_ones:
        nearest = statistics.fmean(one for one in real_ones if one is not None)
        yield from line(
            "SFM for both above nearest-real",
            1,
            f"unseen {short_name(LITE)}",
            points(BOTH + CONVERGED, 1, SHIPPED, LITE),
            nearest,
            -3.0,
        )
    for ipc, phi in itertools.product((1, 10), (*SHIPPED, LITE)):
        ours = points(best, ipc, (phi,), phi)
        timely = points(LGM + EQUAL_TIME, ipc, (phi,), phi)
        lgm = points(LGM + EQUAL_STEPS, ipc, (phi,), phi) if timely is None else timely
        yield from line("SFM above LGM at equal time or more", ipc, short_name(phi), ours, lgm, 0.0, True)
        yield from line(
            "SFM above LGM, both converged", ipc, short_name(phi), ours, points(LGM + CONVERGED, ipc, (phi,), phi), 0.0
        )


def _labels(known: Iterable[Cell]) -> list[tuple[int, str]]:
    """(ipc, label) in the order of the table: full data first, then by number of images, each in order of appearance."""
    labels = dict.fromkeys((cell.ipc, cell.label) for cell in known)
    return sorted(labels, key=lambda one: one[0])


def _mean(found: Iterable[Score]) -> str:
    """Mean of the means; its spread is the mean of the spreads."""
    all_of = list(found)
    if not all_of:
        return ""
    return str(Score(statistics.fmean(one.mean for one in all_of), statistics.fmean(one.std for one in all_of)))


def short_name(name: str) -> str:
    """A backbone's name, short enough for a column."""
    return name.removeprefix("fashion_").removeprefix("tf_").removesuffix("_lite0")
