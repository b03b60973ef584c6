"""Accuracy of distilled images: methods x images a class x distilling and evaluating backbones x modes, references and cost beside them.

    python -m benchmarks.accuracy --data fashion-mnist --out benchmarks/results/cpu

What each cell will take is printed before it starts; the most telling come first. Every run's images and every finished cell are kept in WORK, and
accuracy.json is written again after each, so an interrupted table continues where it stopped. FULL=1 in the environment (or --full) adds the cells that
take hours. Mean ± std is over distillation seeds, each with an evaluation of its own; for references over evaluation seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sfm_fast.arguments import add_list, check_names
from sfm_fast.demo.cost import compare_methods
from sfm_fast.distill.config import DistillConfig
from sfm_fast.files import write_json

from ..cells import Cell, fill, in_parallel
from ..machine import environment
from . import content, judge, places
from .content import LGM, OURS, Run
from .tables import Result, summary, verdicts

FORMAT = "sfm_fast accuracy 2"
LIMIT = 900.0  # seconds that LGM may take for `content.LEAST` steps, unless everything is wanted
# Seconds of evaluating a set of images on one backbone, by images per class: a guess for the estimates.
EVALUATION = {1: 12.0, 10: 30.0, 50: 90.0}
Kept = dict[str, Any]


def measure_costs(table: places.Table, phi: str, ipc: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of a step of our default and of LGM, with steps in turn."""
    configs = {OURS: DistillConfig(ipc=ipc, init="noise"), LGM: DistillConfig.paper(method="lgm", ipc=ipc)}
    known = places.statistics(table, phi, ipc if ipc > 1 else 0)
    costs = compare_methods(
        configs, places.backbone(phi), places.source(table.data, "train"), known, rounds=1 if ipc > 10 else rounds
    )
    return {cost["name"]: {"seconds": cost["step_seconds"], "peak_bytes": cost["peak_bytes"]} for cost in costs}


def step_seconds(costs: Mapping[str, Any], run: Run) -> float:
    """What a step of ``run`` takes."""
    name = LGM if run.name.startswith(LGM) else OURS
    return sum(float(costs[f"{phi}, {run.ipc}"][name]["seconds"]) for phi in run.made_for)


def estimate(costs: Mapping[str, Any], run: Run, steps: int, backbones: int) -> float:
    """Seconds that a cell will take, roughly."""
    return steps * step_seconds(costs, run) + EVALUATION[run.ipc] * (backbones if run.wide else 1)


def steps_in_time(run: Run, seed: int, costs: Mapping[str, Any], kept: Kept) -> int:
    """How many steps fit into the time of our default run for the same backbone, but at least `content.LEAST`."""
    start = f"{OURS}{content.CONVERGED}, {run.ipc} a class, {' + '.join(run.made_for)}, seed {seed}:"
    rows: list[dict[str, Any]] = next((found for name, found in kept.items() if name.startswith(start)), [])
    seconds = float(rows[0]["seconds"]) if rows else 0.0
    return max(content.LEAST, round(seconds / step_seconds(costs, run)))


def wanted_runs(table: places.Table, *, full: bool) -> list[Run]:
    return list(content.runs(table.ipcs, table.backbones, table.seeds, full=full))


def told_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of accuracy.json")
    parser.add_argument("--work", default="runs/accuracy", help="folder of the runs' images, features and rows")
    add_list(parser, "--backbones", default=content.BACKBONES, help=f"of {', '.join(content.BACKBONES)}")
    add_list(parser, "--ipc", int, default=list(content.LONGEST), help=f"of {', '.join(map(str, content.LONGEST))}")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, help="instead of the table's own")
    parser.add_argument("--epochs", type=positive, default=1000, help="of the probes")
    parser.add_argument("--rounds", type=positive, default=3, help="interleaved steps when measuring times")
    parser.add_argument("--finished", action="store_true", help="a table of what is finished, nothing new")
    parser.add_argument(
        "--full", action="store_true", default=bool(os.environ.get("FULL")), help="all cells, for whoever has a day"
    )
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, help="processes; the cores are divided among them"
    )
    args = parser.parse_args()
    backbones = check_names("--backbones", args.backbones, content.BACKBONES)
    ipcs = check_names("--ipc", args.ipc, list(content.LONGEST))
    out, work = Path(args.out), Path(args.work).resolve()
    table = places.Table(args.data, work, tuple(backbones), tuple(ipcs), args.seeds, args.epochs)
    for folder in (out, *(work / name for name in ("images", "features"))):
        folder.mkdir(parents=True, exist_ok=True)
    store = work / "kept.json"
    kept: Kept = json.loads(store.read_text()) if store.exists() else {}
    costs: dict[str, Any] = {}
    runs = wanted_runs(table, full=args.full)
    cells: list[Cell[str, Any]] = []

    def result() -> dict[str, Any]:
        rows = [row for cell in cells for row in kept.get(cell.name, ())]
        return {
            "format": FORMAT,
            "data": args.data,
            "full": args.full,
            "backbones": [places.backbone(name).describe() for name in backbones],
            "classifiers": {phi: places.classifier(table, phi).metadata for phi in backbones},
            "environment": environment(),
            "costs": costs,
            "left_out": left_out(costs, args.full),
            "rows": rows,
        }

    def save() -> None:
        write_json(store, kept)
        write_json(out / "accuracy.json", result())

    def run_all(some: list[Cell[str, Any]], what: str) -> None:
        if not args.finished:
            for _ in fill(
                kept, some, save, run=in_parallel(args.jobs, max(1, (os.cpu_count() or 1) // args.jobs), what)
            ):
                pass

    list(
        in_parallel(args.jobs, 1, "features and classifiers")(
            Cell(phi, functools.partial(places.prepare, table, phi)) for phi in backbones
        )
    )
    for ipc in ipcs:
        for phi in backbones:
            name = f"costs, {table.slug}, {places.backbone(phi).fingerprint}, {ipc}"
            if ipc > 10 and phi == content.LITE and not args.full:
                continue
            if name not in kept:
                kept[name] = measure_costs(table, phi, ipc, args.rounds)
                write_json(store, kept)
            costs[f"{phi}, {ipc}"] = kept[name]
    cells += reference_cells(table)
    first = [(run, seed) for run in runs if run.until != "time" for seed in range(run.seeds)]
    cells += [cell_of(table, run, seed, args.steps) for run, seed in first]
    expect(cells[len(cells) - len(first) :], first, costs, table, kept, args.steps)
    run_all(cells, "cells")
    late = [
        cell_of(table, run, seed, args.steps or steps_in_time(run, seed, costs, kept))
        for run in runs
        if run.until == "time" and (args.full or not too_long(step_seconds(costs, run)))
        for seed in range(run.seeds)
    ]
    cells += late
    run_all(late, "cells of equal time")
    save()
    print(summary(cast(Result, result())))
    print(verdicts(cast(Result, result())))


def cell_of(table: places.Table, run: Run, seed: int, steps: int | None) -> Cell[str, Any]:
    """The cell of a run with one seed; ``steps``: instead of its own."""
    return Cell(judge.key_of(table, run, seed, steps), functools.partial(judge.judged, table, run, seed, steps))


def expect(
    cells: list[Cell[str, Any]],
    runs: list[tuple[Run, int]],
    costs: Mapping[str, Any],
    table: places.Table,
    kept: Kept,
    steps: int | None,
) -> None:
    """Print what each cell that isn't finished will take."""
    total = 0.0
    for cell, (run, seed) in zip(cells, runs, strict=True):
        if cell.name not in kept:
            seconds = estimate(costs, run, steps or run.config(seed).steps, len(table.backbones))
            total += seconds
            print(f"{told_time(seconds):>7} at most: {cell.name.rpartition(':')[0]}", flush=True)
    print(f"{told_time(total)} of computing at most, besides references, divided among the processes", flush=True)


def reference_cells(table: places.Table) -> list[Cell[str, Any]]:
    found = []
    for ipc in table.ipcs:
        for phi in table.backbones:
            for psi in table.backbones:
                for name in judge.REFERENCES:
                    once = name == "full" and ipc != table.ipcs[0]
                    only_own = (name == "class-means" or ipc > 10) and phi != psi
                    if once or only_own:
                        continue
                    prints = [places.backbone(one).fingerprint for one in (phi, psi)]
                    key = (
                        f"{name}, {ipc} a class, {phi} to {psi}: {table.slug}, {prints}, {table.epochs}, {table.seeds}"
                    )
                    found.append(Cell(key, functools.partial(judge.referred, table, name, phi, psi, ipc, table.seeds)))
    return found


def too_long(seconds: float) -> bool:
    """Whether `content.LEAST` steps of LGM, of so many seconds each, take longer than `LIMIT`."""
    return content.LEAST * seconds > LIMIT


def left_out(costs: Mapping[str, Any], full: bool) -> list[dict[str, Any]]:
    """LGM's runs that would take too long, with what a step takes."""
    absent = []
    for name, cost in costs.items():
        phi, _, ipc = name.partition(", ")
        seconds = float(cost[LGM]["seconds"])
        if not full and too_long(seconds):
            absent.append({"label": LGM, "made_for": [phi], "ipc": int(ipc), "step_seconds": seconds})
    return absent


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"wanted a whole number, at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
