"""Runs and references, made and evaluated: the cells of the accuracy table."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from typing import Any

import torch

from sfm_fast.distill.config import DistillConfig
from sfm_fast.evaluation.modes import fit
from sfm_fast.features.statistics import ClassStatistics

from . import places
from .content import EQUAL, EQUAL_STEPS, OURS, Run
from .held_out import EVERY
from .places import Table
from .trajectory import Images, Point, best, follow, images_at, path_of, told

Row = dict[str, Any]
REFERENCES = ("full", "class-means", "random-real", "nearest-real")
MODES = ("probe", "inherit", "kd")


def config_of(run: Run, seed: int, steps: int | None) -> DistillConfig:
    """The configuration of a run; ``steps``: instead of its own."""
    config = run.config(seed)
    return config if steps is None else replace(config, steps=steps)


def key_of(table: Table, run: Run, seed: int, steps: int | None) -> str:
    """The name of a cell, with a digest of all that its result depends on."""
    prints = [places.backbone(name).fingerprint for name in (*run.made_for, *table.backbones)]
    about = [table.data, table.epochs, prints, config_of(run, seed, steps).to_dict(), run.until, run.wide]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return f"{run.label}, {run.ipc} a class, {' + '.join(run.made_for)}, seed {seed}: {digest}"


def look(table: Table, run: Run, seed: int, images: Images) -> tuple[float, float]:
    """Top-1 of a probe on validation and on test images, the mean over the backbones that the images are made for."""
    scores = []
    for name in run.made_for:
        judge = places.evaluator(table, name, name, run.ipc, 1)
        features = judge.sets.of_views(*images, seed, ("probe",))
        fitted = fit("probe", features, judge.num_classes, None, judge.config, seed)
        real, labels = judge.sets.real(judge.backbone)
        held = torch.arange(len(labels)) % EVERY == 0
        scores.append((fitted.score(real[held], labels[held])[0], fitted.score(*judge.sets.tested)[0]))
    return sum(one for one, _ in scores) / len(scores), sum(two for _, two in scores) / len(scores)


def points_of(table: Table, run: Run, seed: int, steps: int | None) -> list[Point]:
    """The run, distilled or read from its file."""
    config = config_of(run, seed, steps)
    clusters = config.ipc if config.level == "cluster" else 0
    known: list[ClassStatistics] | None = None
    if config.method != "lgm":
        known = [places.statistics(table, name, clusters) for name in run.made_for]
    return follow(
        path_of(table.work, key_of(table, run, seed, steps)),
        config,
        [places.backbone(name) for name in run.made_for],
        places.source(table.data, "train"),
        known,
        functools.partial(look, table, run, seed),
        converged=run.until == "converged",
    )


def judged(table: Table, run: Run, seed: int, steps: int | None = None) -> list[Row]:
    """The rows of a run with one seed: of its last images, or its best ones by validation if it runs until convergence."""
    points = points_of(table, run, seed, steps)
    chosen = best(points) if run.until == "converged" else points[-1]
    about = {"name": run.name, "ipc": run.ipc, "made_for": list(run.made_for), "seed": seed}
    images = images_at(path_of(table.work, key_of(table, run, seed, steps)), chosen["steps"])
    rows = []
    for psi in table.backbones if run.wide else run.made_for:
        for phi in run.made_for:
            modes = [
                mode
                for mode in MODES
                if (mode != "probe" or phi == run.made_for[0]) and (mode != "inherit" or phi != psi)
            ]
            judge = places.evaluator(table, phi, psi, run.ipc, 1)
            for row in judge.evaluate(
                run.name, [images[0]], [images[1]], modes=modes if run.wide else ("probe",), seed=seed
            ):
                rows.append(about | told(points) | {"label": run.label, "distilled_on": phi, **_scores(row)})
    if run.name == OURS and run.until == "converged" and run.ipc in EQUAL:
        (equal,) = [point for point in points if point["steps"] == EQUAL[run.ipc]] or points[-1:]
        (own,) = run.made_for
        probed = {"backbone": own, "distilled_on": own, "mode": "probe", "top1": equal["test"]}
        rows.append(about | told([equal]) | {"label": OURS + EQUAL_STEPS, **probed})
    return rows


def referred(table: Table, name: str, phi: str, psi: str, ipc: int, seeds: int) -> list[Row]:
    """The rows of a reference, one per mode, with mean and standard deviation over evaluation seeds."""
    judge = places.evaluator(table, phi, psi, ipc, seeds)
    modes = ("probe", "inherit") if name == "full" and phi == psi else ("inherit",) if name == "full" else MODES
    rows = judge.reference(name, ipc, modes=modes)
    return [
        {
            "name": name,
            "label": row["images"],
            "ipc": 0 if name == "full" else ipc,
            "made_for": [phi],
            "distilled_on": phi,
        }
        | _scores(row)
        | {"std": row["top1_std"]}
        for row in rows
    ]


def _scores(row: Any) -> Row:
    kept = (
        "backbone",
        "mode",
        "parameters",
        "parameters_folded",
        "bytes_fp32",
        "bytes_bf16",
        "fit_seconds",
        "penalties",
    )
    return {"top1": row["top1_mean"]} | {name: row[name] for name in kept if name in row}
