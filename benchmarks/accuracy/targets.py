"""Targets for one image per class: accuracy along lambda and kappa of discriminant centres, on features and on images.

    python -m sfm_fast.benchmarks.accuracy.targets --out benchmarks/results/cpu --figure docs/figures/targets.svg

Two parts, on each backbone. "features": a linear probe trained on the targets themselves, with no images, along the shrinkage lambda and the
scale kappa of discriminant centres. "images": the same with images of short runs, along lambda and along the length weight. Both are evaluated on
every sixth *training* image, which the statistics then leave out, so that settings are never chosen by test images. Finished cells are kept in WORK.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sfm_fast.arguments import add_list, check_names
from sfm_fast.distill.config import DistillConfig
from sfm_fast.errors import InputError
from sfm_fast.evaluation.evaluator import ProbeConfig
from sfm_fast.features.discriminant import choose_shrinkage
from sfm_fast.features.statistics import ClassStatistics
from sfm_fast.files import write_json

from ..cells import Cell, fill, in_parallel
from ..machine import environment
from .content import BACKBONES
from .held_out import Place, data, judged, probe
from .target_tables import shrinkage_table, weight_table, write_figure

FORMAT = "sfm_fast targets 1"
SHRINKAGES, SCALES = (1.0, 3.0, 10.0, 30.0, 100.0), (0.8, 1.0, 1.2, 1.5)
WEIGHTS = (0.0, 0.5, 1.0, 4.0)  # of the lengths; the recommended one is among the rows along lambda
PARTS = ("features", "images")
SHORT_STEPS = 500


def chosen_shrinkage(statistics: ClassStatistics) -> float:
    """The lambda of the rule."""
    covariance = statistics.within_covariance
    assert covariance is not None
    return choose_shrinkage(statistics.centers, covariance)


def on_features(place: Place, phi: str) -> list[dict[str, Any]]:
    """The rows of part "features" on one backbone."""
    of = data(place, phi)
    known, labels = of.statistics, torch.arange(of.statistics.num_classes)
    chosen = chosen_shrinkage(known)
    rows = [{"shrinkage": None, "scale": None, "top1": probe(of, known.centers.unsqueeze(0), labels, 0, place.judge())}]
    for shrinkage in (*SHRINKAGES, chosen):
        for scale in SCALES:
            targets = known.discriminant_centers(shrinkage=shrinkage, scale=scale)
            top1 = probe(of, targets.unsqueeze(0), labels, 0, place.judge())
            rows.append({"shrinkage": shrinkage, "scale": scale, "top1": top1, "chosen": shrinkage == chosen})
    return rows


def on_images(place: Place, phi: str, steps: int, shrinkage: float | None, **options: Any) -> dict[str, Any]:
    """The row of part "images" for one lambda; None: the one that the rule chooses."""
    number = chosen_shrinkage(data(place, phi).statistics) if shrinkage is None else shrinkage
    config = ours(steps, 0, shrinkage=number, **options)
    row = judged(place, (phi,), config)
    others = {name: top1 for name, top1 in row["top1"].items() if name != phi}
    row |= {"steps": steps, "seed": 0, "top1": row["top1"][phi], "others": others}
    return row | {"shrinkage": number, "chosen": shrinkage is None, "length_weight": config.length_weight}


def ours(steps: int, seed: int, **options: Any) -> DistillConfig:
    """One setting for all backbones, with which lambda, kappa and the weight of lengths were chosen: from noise, unlike the default."""
    kept: dict[str, Any] = {"centers": "discriminant", "init": "noise", "lr": 0.02}
    return DistillConfig(steps=steps, seed=seed, **(kept | options))


def cells(args: argparse.Namespace, place: Place) -> Iterator[tuple[dict[str, Any], Cell]]:
    """Every cell, whose name has all that its result depends on, with the common fields of its rows."""
    for phi in args.backbones:
        tag = place.tag(phi)
        if "features" in args.parts:
            yield (
                {"part": "features", "backbone": phi},
                Cell(f"features, {tag}", functools.partial(on_features, place, phi)),
            )
        if "images" in args.parts:
            along: list[tuple[float | None, dict[str, float]]] = [(None, {}), *((number, {}) for number in SHRINKAGES)]
            for shrinkage, options in [*along, *((None, {"length_weight": weight}) for weight in WEIGHTS)]:
                name = f"images, {tag}, {shrinkage}, {_key(ours(args.short_steps, 0, **options))}"
                call = functools.partial(on_images, place, phi, args.short_steps, shrinkage, **options)
                yield {"part": "images", "backbone": phi}, Cell(name, call)


def _key(config: DistillConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of targets.json")
    parser.add_argument("--figure", help="file of the figure of parts features and images, .svg or .png")
    parser.add_argument("--work", default="runs/accuracy", help="folder of features and finished cells")
    add_list(parser, "--backbones", default=BACKBONES, help=f"of {', '.join(BACKBONES)}")
    add_list(parser, "--parts", default=PARTS, help=f"of {' and '.join(PARTS)}")
    parser.add_argument("--short-steps", type=int, default=SHORT_STEPS, help="of part images")
    parser.add_argument("--epochs", type=int, default=ProbeConfig().epochs, help="of each probe")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    args.backbones = check_names("--backbones", args.backbones, BACKBONES)
    args.parts = check_names("--parts", args.parts, PARTS)
    panels = set(PARTS) <= set(args.parts)
    if args.figure and not panels:
        raise InputError(f"--parts must have features and images for --figure, got {', '.join(args.parts)}")
    out, work = Path(args.out), Path(args.work).resolve()
    place = Place(args.data, work, tuple(args.backbones), args.epochs)
    for folder in (out, work / "features"):
        folder.mkdir(parents=True, exist_ok=True)
    store = work / "targets-kept.json"
    kept: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    save = functools.partial(write_json, store, kept)
    for phi in args.backbones:  # once, before several processes want them
        data(place, phi)
    wanted = list(cells(args, place))
    # The longest first, so that all processes end at about the same time.
    todo = [cell for about, cell in sorted(wanted, key=lambda one: "efficientnet" not in one[0]["backbone"])]
    run = in_parallel(args.jobs, max(1, (os.cpu_count() or 1) // args.jobs), "targets")
    for _ in fill(kept, todo, save, run=run):
        pass
    values = [(about, kept[cell.name]) for about, cell in wanted]
    result = {
        "format": FORMAT,
        "data": args.data,
        "environment": environment(),
        "settings": ours(args.short_steps, 0).to_dict(),
        "backbones": args.backbones,
        "rows": [about | row for about, value in values for row in (value if isinstance(value, list) else [value])],
    }
    write_json(out / "targets.json", result)
    if args.figure:
        write_figure(result, Path(args.figure))
    if panels:
        print(shrinkage_table(result))
        print(weight_table(result))


if __name__ == "__main__":
    main()
