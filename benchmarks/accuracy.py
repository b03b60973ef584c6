"""Accuracy of distilled images beside the references, LGM at equal steps and at equal time: one table.

    python benchmarks/accuracy.py --data fashion-mnist --out benchmarks/results/cpu

Every run's images are kept in WORK as soon as they are made, so an interrupted table continues where it stopped.
Mean ± std is over distillation seeds (each with a probe of its own), for the references over probe seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import environment

from sfm_fast.data.backbones import Backbone, load_backbone
from sfm_fast.data.datasets import open_dataset
from sfm_fast.data.sources import ImageSource
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.prepare import make_distiller
from sfm_fast.files import load_tensors, save_tensors, write_json
from sfm_fast.probe.evaluate import Evaluator, ProbeConfig
from sfm_fast.probe.features import class_statistics
from sfm_fast.report.tables import accuracy_table
from sfm_fast.statistics import ClassStatistics

# Steps and step size for each ipc. LGM runs as many steps as SFM, and is also looked at when SFM's time is up.
SETTINGS: dict[int, dict[str, Any]] = {1: {"steps": 1500, "lr": 0.02}, 10: {"steps": 300, "lr": 0.02}}


def distil(
    path: Path,
    config: DistillConfig,
    backbone: Backbone,
    source: ImageSource,
    found: ClassStatistics,
    snapshot_after: float | None = None,
) -> dict[str, Any]:
    """Run ``config`` (or read it back from ``path``): images at the end, and at ``snapshot_after`` seconds."""
    if not path.exists():
        distiller = make_distiller(config, backbone, source, found)
        tensors: dict[str, torch.Tensor] = {}
        metadata: dict[str, Any] = {"config": config.to_dict(), "snapshot_steps": None}
        started = time.perf_counter()
        while distiller.steps_done < config.steps:
            distiller.step()
            elapsed = time.perf_counter() - started
            if snapshot_after is not None and "snapshot" not in tensors and elapsed >= snapshot_after:
                tensors["snapshot"] = distiller.result().images
                metadata["snapshot_steps"] = distiller.steps_done
        metadata["seconds"] = time.perf_counter() - started
        tensors["images"], tensors["labels"] = distiller.result().images, distiller.result().labels
        save_tensors(path, tensors, metadata)
    tensors, metadata = load_tensors(path)
    return {**tensors, **metadata}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of accuracy.json")
    parser.add_argument("--work", default="runs/accuracy", help="folder of the runs' images")
    parser.add_argument("--ipc", type=int, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the table's own")
    parser.add_argument("--epochs", type=int, default=1000, help="of the probes")
    parser.add_argument("--only", type=int, help="distil this seed alone and evaluate nothing (to use several processes)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    out, work = Path(args.out), Path(args.work)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)

    backbone = load_backbone()
    train, test = open_dataset(args.data, "train"), open_dataset(args.data, "test")
    found, provenance = class_statistics(train, backbone)
    found.provenance = provenance
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for ipc in args.ipc:
        settings = SETTINGS.get(ipc, SETTINGS[10])
        steps = args.steps or settings["steps"]
        for seed in range(args.seeds) if args.only is None else [args.only]:
            options: dict[str, Any] = {
                "ipc": ipc,
                "steps": steps,
                "lr": settings["lr"],
                "grow_every": max(1, steps // 15),
                "seed": seed,
            }
            limit = None
            for method in ("sfm", "sfm-decoupled", "lgm"):
                config = DistillConfig(method=method, **options)
                path = work / f"{backbone.fingerprint}-{args.data}-{method}-{ipc}-{steps}-{seed}.safetensors"
                done = distil(path, config, backbone, train, found, limit)
                runs.setdefault((ipc, method), []).append(done)
                limit = done["seconds"] if method == "sfm" else limit
                print(f"{method} ipc {ipc} seed {seed}: {steps} steps in {done['seconds']:.0f} s", flush=True)
    if args.only is not None:
        return

    evaluator = Evaluator(backbone, test, train, config=ProbeConfig(seeds=args.seeds, epochs=args.epochs))
    rows = [evaluator.full() | {"steps": None, "distillation_seconds": None, "step_seconds": None}]
    size = backbone.image_size
    for ipc in args.ipc:
        for row in (evaluator.random_real(ipc, size), evaluator.nearest_real(ipc, size)):
            rows.append(row | {"steps": None, "distillation_seconds": None, "step_seconds": None})
        for method, name, key in (
            ("sfm", "sfm", "images"),
            ("sfm-decoupled", "sfm-decoupled", "images"),
            ("lgm", "lgm at equal steps", "images"),
            ("lgm", "lgm at equal time", "snapshot"),
        ):
            done = [run for run in runs[ipc, method] if key in run]
            if len(done) != args.seeds:
                continue  # LGM finished before SFM: there is no earlier moment to look at
            row = evaluator.probe(name, [run[key] for run in done], [run["labels"] for run in done])
            steps = [run["snapshot_steps"] if key == "snapshot" else run["config"]["steps"] for run in done]
            per_step = statistics.median(run["seconds"] / run["config"]["steps"] for run in done)
            rows.append(
                row
                | {
                    "steps": round(statistics.fmean(steps)),
                    "distillation_seconds": round(statistics.fmean(steps) * per_step, 1),
                    "step_seconds": round(per_step, 5),
                }
            )
    result = {
        "data": args.data,
        "backbone": backbone.describe(),
        "settings": {str(k): v for k, v in SETTINGS.items()},
        "environment": environment(),
        "rows": rows,
    }
    write_json(out / "accuracy.json", json.loads(json.dumps(result)))
    print(accuracy_table(rows))


if __name__ == "__main__":
    main()
