"""How the default settings of `distill` were chosen: one change of a base at a time, judged on held-out training images.

    python -m sfm_fast.benchmarks.accuracy.settings --out benchmarks/results/cpu

Images are made for one backbone, or for two at once, from five sixths of the training images, and a linear probe trained on them is tested on the
other sixth (`held_out`): with three sets of views on the backbones that they were made for, with one on the others. Test images decide nothing here.
Finished cells are kept in WORK.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfm_fast.arguments import add_list, check_names
from sfm_fast.distill.config import DistillConfig
from sfm_fast.evaluation.evaluator import ProbeConfig
from sfm_fast.files import write_json

from ..cells import Cell, fill, in_parallel
from ..machine import environment
from .content import BACKBONES, CNN, LITE, VIT
from .held_out import Place, data, judged, known
from .setting_tables import settings_table

FORMAT = "sfm_fast settings 1"
STEPS = {1: 1000, 10: 300}  # by images per class
# What the images are made for, by images per class.
MADE_FOR = {1: ((VIT,), (CNN,), (VIT, CNN), (LITE,)), 10: ((VIT,), (CNN,))}
SHRINKAGE = 0.1  # of the base's regression centres; the study led to the default of 0.3
# Changes of the base, by their name in the table; "steps" is a factor of the usual number.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "start from noise": {"init": "noise"},
    "step size 0.0025": {"lr": 0.0025},
    "step size 0.01": {"lr": 0.01},
    "step size 0.02": {"lr": 0.02},
    "half the steps": {"steps": 0.5},
    "twice the steps": {"steps": 2},
    "two views, half the steps": {"views": 2, "steps": 0.5},
    "crops from 0.15": {"min_area": 0.15},
    "crops from 0.3": {"min_area": 0.3},
    "crops from 0.5": {"min_area": 0.5},
    "crops from 0.7": {"min_area": 0.7},
    "views with noise": {"noise": True},
    "no average of iterates": {"average_last": 0.0},
    "average of the last tenth": {"average_last": 0.1},
    "means as centres": {"centers": "means"},
    "discriminant centres": {"centers": "discriminant"},
    "shrinkage 0.3": {"shrinkage": 0.3},
    "proximity 0.5": {"proximity": 0.5},
    "proximity 2": {"proximity": 2.0},
    "no term for lengths": {"length_weight": 0.0},
    "length weight 0.5": {"length_weight": 0.5},
    "squared error": {"method": "sfm-decoupled"},
    "class level": {"level": "class"},
    "images 1.5 times as large": {"size": 42},
    "as in the paper": {"paper": True},
}
# Those that are tried on the slow backbone, and on two at once.
FEWER = (
    "base", "start from noise", "step size 0.0025", "step size 0.01", "twice the steps", "crops from 0.3", "crops from 0.5", "means as centres", "discriminant centres",
    "no term for lengths", "squared error", "as in the paper",
)  # fmt: skip


def config_of(change: str, ipc: int, steps: int | None, seed: int) -> DistillConfig:
    """The configuration of a change; ``steps``: instead of the usual number."""
    options = dict(CHANGES[change])
    factor, paper = options.pop("steps", 1), options.pop("paper", False)
    options |= {"ipc": ipc, "seed": seed, "steps": max(1, round(factor * (steps or STEPS[ipc])))}
    if not paper and "centers" not in options:
        options = {"shrinkage": SHRINKAGE} | options
    if change != "base" and "lr" not in options and "init" not in options and not paper:
        options["lr"] = DistillConfig(steps=steps or STEPS[ipc], init="real").schedule(1).lr  # of the base
    return DistillConfig.paper(**options) if paper else DistillConfig(**options)


def cells(args: argparse.Namespace, place: Place) -> Iterator[tuple[dict[str, Any], Cell[str, dict[str, Any]]]]:
    """Every cell, whose name has all that its result depends on, with what its row says besides; the most important come first."""
    for change in args.changes:
        for ipc in args.ipc:
            for made_for in MADE_FOR[ipc]:
                if not set(made_for) <= set(place.backbones) or (change == "class level" and ipc == 1):
                    continue
                if made_for in ((LITE,), (VIT, CNN)) and change not in FEWER:
                    continue
                config = config_of(change, ipc, args.steps, 0)
                key = json.dumps(config.to_dict(), sort_keys=True)
                about = {"change": change, "ipc": ipc, "made_for": list(made_for)}
                name = f"settings, {place.tag(' '.join(made_for))}, {key}"
                yield about, Cell(name, functools.partial(judged, place, made_for, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of settings.json")
    parser.add_argument("--work", default="runs/accuracy", help="folder of features and finished cells")
    add_list(parser, "--backbones", default=BACKBONES, help=f"of {', '.join(BACKBONES)}")
    add_list(parser, "--ipc", int, default=tuple(STEPS), help=f"of {', '.join(map(str, STEPS))}")
    parser.add_argument("--changes", nargs="+", metavar="NAME", default=list(CHANGES), help="some of the table's")
    parser.add_argument("--steps", type=int, help=f"instead of {STEPS}")
    parser.add_argument("--epochs", type=int, default=ProbeConfig().epochs, help="of each probe")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    args.backbones = check_names("--backbones", args.backbones, BACKBONES)
    args.ipc = check_names("--ipc", args.ipc, tuple(STEPS))
    args.changes = check_names("--changes", args.changes, tuple(CHANGES))
    out, place = Path(args.out), Place(args.data, Path(args.work).resolve(), tuple(args.backbones), args.epochs)
    for folder in (out, place.work / "features"):
        folder.mkdir(parents=True, exist_ok=True)
    for phi in args.backbones:  # once, before several processes want them
        data(place, phi)
        for clusters in {0, *(ipc for ipc in args.ipc if ipc > 1)}:
            known(place, phi, clusters)
    store = place.work / "settings-kept.json"
    found: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    wanted = list(cells(args, place))

    def result() -> dict[str, Any]:
        rows = [about | found[cell.name] for about, cell in wanted if cell.name in found]
        told = {"format": FORMAT, "data": args.data, "environment": environment(), "backbones": args.backbones}
        return told | {"rows": rows}

    def save() -> None:
        write_json(store, found)
        write_json(out / "settings.json", result())

    run = in_parallel(args.jobs, max(1, (os.cpu_count() or 1) // args.jobs), "settings")
    for _ in fill(found, [cell for _, cell in wanted], save, run=run):
        pass
    save()
    print(settings_table(result()))


if __name__ == "__main__":
    main()
