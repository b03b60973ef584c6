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
from sfm_fast.distill.compare import compare_methods
from sfm_fast.distill.config import DistillConfig
from sfm_fast.distill.prepare import make_distiller
from sfm_fast.files import load_tensors, save_tensors, write_json
from sfm_fast.probe.evaluate import Evaluator, ProbeConfig
from sfm_fast.probe.features import class_statistics
from sfm_fast.report.tables import accuracy_table
from sfm_fast.statistics import ClassStatistics

# (method, views a step): None is the method's own number, 1 for SFM and 10 for LGM.
METHODS = (("sfm", None), ("sfm-decoupled", None), ("sfm-decoupled", 4), ("lgm", None))
# Steps of every method, step size, and (SFM alone) more steps that still take less time than LGM's.
SETTINGS: dict[int, dict[str, Any]] = {
    1: {"steps": 1500, "lr": 0.02, "more_steps": None},
    10: {"steps": 200, "lr": 0.02, "more_steps": 1000},
}


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


def settings(ipc: int) -> dict[str, Any]:
    """The settings of ``ipc``; those of 10 where the table has none."""
    return SETTINGS.get(ipc, SETTINGS[10])


def plan(ipc: int, steps: int | None) -> list[tuple[str, int | None, int]]:
    """(method, views, steps) of every run, LGM last: it is looked at when SFM's time is up, too."""
    same, more = (steps, None) if steps is not None else (settings(ipc)["steps"], settings(ipc)["more_steps"])
    once = [(method, views, same) for method, views in METHODS]
    longer = [(method, views, more) for method, views in METHODS if more and method != "lgm" and views is None]
    return once[:-1] + longer + once[-1:]


def distilled_row(
    evaluator: Evaluator, key: str, done: list[dict[str, Any]], step_seconds: dict[str, float]
) -> dict[str, Any]:
    """One row over distillation seeds: of the images at the end, or of LGM's when SFM's time was up ("snapshot")."""
    row = evaluator.probe(
        done[0]["config"]["method"].split("-")[0], [r[key] for r in done], [r["labels"] for r in done]
    )
    config = DistillConfig.from_dict(done[0]["config"])
    steps = statistics.fmean(r["snapshot_steps"] if key == "snapshot" else r["config"]["steps"] for r in done)
    name = label(config.method, config.views)
    return row | {
        "method": name + (" at equal time" if key == "snapshot" else ""),
        "steps": round(steps),
        "distillation_seconds": round(steps * step_seconds[name], 1),
        "step_seconds": round(step_seconds[name], 5),
    }


def label(method: str, views: int | None) -> str:
    """A method's name in the table."""
    return method + (f", {views} views" if views else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of accuracy.json")
    parser.add_argument("--work", default="runs/accuracy", help="folder of the runs' images")
    parser.add_argument("--ipc", type=int, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the table's own")
    parser.add_argument("--epochs", type=int, default=1000, help="of the probes")
    parser.add_argument(
        "--only", type=int, help="distil this seed alone and evaluate nothing (to use several processes)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved steps when measuring times")
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
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for ipc in args.ipc:
        for seed in range(args.seeds) if args.only is None else [args.only]:
            limit = 0.0
            for method, views, steps in plan(ipc, args.steps):
                config = DistillConfig(
                    method=method,
                    ipc=ipc,
                    steps=steps,
                    lr=settings(ipc)["lr"],
                    grow_every=max(1, steps // 15),
                    seed=seed,
                    views=views,
                )
                kind = method + (f"-views{views}" if views else "")
                path = work / f"{backbone.fingerprint}-{args.data}-{kind}-{ipc}-{steps}-{seed}.safetensors"
                done = distil(path, config, backbone, train, found, limit if method == "lgm" else None)
                runs.setdefault((ipc, method, views, steps), []).append(done)
                limit = max(limit, done["seconds"]) if views is None else limit
                print(f"{kind} ipc {ipc} seed {seed}: {steps} steps in {done['seconds']:.0f} s", flush=True)
    if args.only is not None:
        return

    evaluator = Evaluator(backbone, test, train, config=ProbeConfig(seeds=args.seeds, epochs=args.epochs))
    none = {"method": None, "steps": None, "distillation_seconds": None, "step_seconds": None}
    rows = [evaluator.full() | none]
    size = backbone.image_size
    costs: list[dict[str, Any]] = []
    for ipc in args.ipc:
        rows += [row | none for row in (evaluator.random_real(ipc, size), evaluator.nearest_real(ipc, size))]
        # Times come from steps taken in turn: the runs themselves may have shared the machine.
        configs = {label(m, v): DistillConfig(method=m, ipc=ipc, views=v) for m, v in METHODS}
        measured = compare_methods(configs, backbone, train, found, rounds=args.rounds)
        step_seconds = {row["name"]: row["step_seconds"] for row in measured}
        costs += measured
        for method, views, steps in plan(ipc, args.steps):
            done = runs[ipc, method, views, steps]
            rows.append(distilled_row(evaluator, "images", done, step_seconds))
            if all("snapshot" in run for run in done):
                rows.append(distilled_row(evaluator, "snapshot", done, step_seconds))
    result = {
        "data": args.data,
        "backbone": backbone.describe(),
        "settings": {str(k): v for k, v in SETTINGS.items()},
        "environment": environment(),
        "rows": rows,
        "costs": costs,
    }
    write_json(out / "accuracy.json", json.loads(json.dumps(result)))
    print(accuracy_table(rows))


if __name__ == "__main__":
    main()
