"""Accuracy of distilled images beside the references, LGM at equal steps and at equal time: one table.

    python benchmarks/accuracy.py --data fashion-mnist --out benchmarks/results/cpu

Every run's images are kept in WORK as soon as they are made, so an interrupted table continues where it stopped.
Mean ± std is over distillation seeds (each with a probe of its own), for the references over probe seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sfm_fast.benchmarks.machine import environment
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

LR = 0.02
# For each ipc: (method, views a step, steps). Views None is the method's own number, 1 for SFM and 10 for LGM. At ipc 1 the last
# LGM run has as many steps as fit into SFM's time, and a schedule of its own; at ipc 10 SFM's longer run takes less time
# than LGM's.
RUNS: dict[int, tuple[tuple[str, int | None, int], ...]] = {
    1: (
        ("sfm", None, 1500),
        ("sfm-decoupled", None, 1500),
        ("sfm-decoupled", 4, 1500),
        ("lgm", None, 1500),
        ("lgm", None, 130),
    ),
    10: (
        ("sfm", None, 200),
        ("sfm-decoupled", None, 200),
        ("sfm", None, 1000),
        ("sfm-decoupled", None, 1000),
        ("lgm", None, 200),
    ),
}


def distil(
    path: Path, config: DistillConfig, backbone: Backbone, source: ImageSource, found: ClassStatistics
) -> dict[str, Any]:
    """Images, labels and configuration of a run: read from ``path``, or distilled and kept there."""
    if not path.exists() or DistillConfig.from_dict(load_tensors(path)[1]["config"]) != config:
        distiller = make_distiller(config, backbone, source, found)
        while distiller.steps_done < config.steps:
            distiller.step()
        result = distiller.result()
        save_tensors(path, {"images": result.images, "labels": result.labels}, {"config": config.to_dict()})
    tensors, metadata = load_tensors(path)
    return {**tensors, **metadata}


def label(method: str, views: int | None) -> str:
    """A method's name in the table."""
    return method + (f", {views} views" if views else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of accuracy.json")
    parser.add_argument("--work", default="runs/accuracy", help="folder of the runs' images")
    parser.add_argument("--ipc", type=int, nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the table's own")
    parser.add_argument("--epochs", type=int, default=1000, help="of the probes")
    parser.add_argument(
        "--only", type=int, nargs="+", help="distil these seeds alone and evaluate nothing (to use several processes)"
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
    found = class_statistics(train, backbone)
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for ipc in args.ipc:
        for seed in args.only or range(args.seeds):
            for method, views, table_steps in RUNS[ipc]:
                steps = args.steps or table_steps
                config = DistillConfig(
                    method=method, ipc=ipc, steps=steps, lr=LR, grow_every=max(1, steps // 15), seed=seed, views=views
                )
                kind = method + (f"-views{views}" if views else "")
                path = work / f"{backbone.fingerprint}-{args.data}-{kind}-{ipc}-{steps}-{seed}.safetensors"
                done = distil(path, config, backbone, train, found)
                runs.setdefault((ipc, method, views, table_steps), []).append(done)
                print(f"{kind} ipc {ipc} seed {seed}: {steps} steps", flush=True)
    if args.only is not None:
        return

    evaluator = Evaluator(backbone, test, train, config=ProbeConfig(seeds=args.seeds, epochs=args.epochs))
    none = {"method": None, "steps": None, "distillation_seconds": None}
    rows = [evaluator.full() | none]
    costs: list[dict[str, Any]] = []
    for ipc in args.ipc:
        size = backbone.image_size
        rows += [row | none for row in (evaluator.random_real(ipc, size), evaluator.nearest_real(ipc, size))]
        # Times come from steps taken in turn: the runs themselves may have shared the machine.
        configs = {label(m, v): DistillConfig(method=m, ipc=ipc, views=v) for m, v, _ in RUNS[ipc]}
        measured = compare_methods(configs, backbone, train, found, rounds=args.rounds)
        costs += measured
        seconds = {row["name"]: row["step_seconds"] for row in measured}
        for method, views, table_steps in RUNS[ipc]:
            done = runs[ipc, method, views, table_steps]
            row = evaluator.probe(method.split("-")[0], [r["images"] for r in done], [r["labels"] for r in done])
            name, steps = label(method, views), done[0]["config"]["steps"]
            rows.append(row | {"method": name, "steps": steps, "distillation_seconds": round(steps * seconds[name], 1)})
    result = {
        "data": args.data,
        "backbone": backbone.describe(),
        "lr": LR,
        "environment": environment(),
        "rows": rows,
        "costs": costs,
    }
    write_json(out / "accuracy.json", result)
    print(accuracy_table(rows))


if __name__ == "__main__":
    main()
