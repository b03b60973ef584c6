"""Accuracy of distilled images: methods x images a class x distilling and evaluating backbones x modes, references and cost beside them.

    python -m benchmarks.accuracy --data fashion-mnist --out benchmarks/results/cpu

Every run's images and every cell's rows are kept in WORK as soon as they are made, so an interrupted table continues where it
stopped. Mean ± std is over distillation seeds, each with an evaluation of its own; for references over evaluation seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from sfm_fast.cli.common import add_list_argument, check_names
from sfm_fast.demo.cost import compare_methods
from sfm_fast.distill.config import DistillConfig
from sfm_fast.files import write_json

from ..machine import environment
from . import runs
from .tables import summary, verdicts


def measure_costs(table: runs.Table, phi: str, ipc: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and peak bytes of a step by label, all runs in turn; kept in WORK, since equal time depends on it."""
    # A run of equal time differs from the one of equal steps in the number of them alone.
    wanted = {run.label: run for run in runs.RUNS[ipc] if run.equal_time is None}
    configs = {label: DistillConfig(method=run.method, ipc=ipc, **run.options) for label, run in wanted.items()}
    key = json.dumps([rounds, {label: config.to_dict() for label, config in configs.items()}])
    name = (
        f"costs-{table.slug}-{runs.backbone(phi).fingerprint}-{ipc}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"
    )
    path = table.work / name
    if not path.exists():
        train = runs.source(table.data, "train")
        # No step's time depends on what the centres are.
        found = runs.statistics(table, phi, ipc if ipc > 1 else 0)
        write_json(path, {"rows": compare_methods(configs, runs.backbone(phi), train, found, rounds=rounds)})
    by_label = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    for run in runs.RUNS[ipc]:
        if run.equal_time is not None:
            by_label[run.label] = by_label[run.method]
    return by_label


def in_parallel(jobs: int, threads: int, work: Iterable[tuple[Any, ...]], what: str) -> list[Any]:
    """Results of ``function(*arguments)`` for (function, *arguments), in the order given, by ``jobs`` processes."""
    tasks, started = list(work), time.perf_counter()
    results: list[Any] = [None] * len(tasks)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        places = {pool.submit(task[0], *task[1:]): place for place, task in enumerate(tasks)}
        try:
            for done, future in enumerate(as_completed(places), 1):
                results[places[future]] = future.result()
                print(f"{what}: {done} of {len(tasks)}, {time.perf_counter() - started:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"wanted a whole number, at least 1, got {text!r}")
    return int(text)


def distil_only(table: runs.Table, phi: str, config: DistillConfig) -> None:
    runs.distil(table, phi, config)  # its file is what counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of accuracy.json")
    parser.add_argument(
        "--work", default="runs/accuracy", help="folder of the runs' images, features and finished cells"
    )
    add_list_argument(parser, "--backbones", default=runs.BACKBONES, help=f"of {', '.join(runs.BACKBONES)}")
    add_list_argument(parser, "--ipc", int, default=list(runs.RUNS), help=f"of {', '.join(map(str, runs.RUNS))}")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, help="instead of the table's own")
    parser.add_argument("--epochs", type=positive, default=1000, help="of the probes")
    parser.add_argument("--rounds", type=positive, default=5, help="interleaved steps when measuring times")
    parser.add_argument("--finished", action="store_true", help="a table of the cells that are finished, nothing new")
    parser.add_argument(
        "--everything", action="store_true", help="also the three runs that take longest, on EfficientNet-lite0"
    )
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, help="processes; the cores are divided among them"
    )
    args = parser.parse_args()
    backbones = check_names("--backbones", args.backbones, runs.BACKBONES)
    ipc = check_names("--ipc", args.ipc, list(runs.RUNS))
    out, work = Path(args.out), Path(args.work)
    table = runs.Table(args.data, work.resolve(), tuple(backbones), tuple(ipc), args.seeds, args.steps, args.epochs)
    for folder in (out, *(work / name for name in ("images", "rows", "features"))):
        folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def pool(tasks: Iterable[tuple[Any, ...]], what: str) -> list[Any]:
        return in_parallel(args.jobs, threads, tasks, what)

    pool([(runs.prepare, table, phi) for phi in table.backbones], "features and classifiers")
    costs: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for phi in table.backbones:
        for ipc in table.ipcs:
            costs[phi, ipc] = measure_costs(table, phi, ipc, args.rounds)
            print(f"costs: {phi}, {ipc} images a class", flush=True)
    configs = {
        (phi, ipc): {
            run.label: tuple(runs.config_of(table, run, phi, ipc, seed, costs[phi, ipc]) for seed in range(table.seeds))
            for run in runs.RUNS[ipc]
            if args.everything or (phi, ipc, run.label) not in runs.DEAR
        }
        for phi, ipc in costs
    }
    to_distil = [(phi, c) for (phi, _), by_label in configs.items() for group in by_label.values() for c in group]
    # The longest first, so that no process ends alone.
    to_distil.sort(key=lambda one: -one[1].steps * one[1].ipc * one[1].views_per_step)
    todo = list(runs.cells(table, configs))
    if args.finished:
        todo = [cell for cell in todo if runs.file_of(table, cell)[0].exists()]
        print(f"{len(todo)} cells are finished")
    else:
        pool([(distil_only, table, *one) for one in to_distil], "distilled")
    found = pool([(runs.evaluate, table, cell) for cell in todo], "evaluated")
    rows = [row | cost_of(row, costs) for group in found for row in group]
    result = {
        "data": args.data,
        "backbones": [runs.backbone(name).describe() for name in table.backbones],
        "classifiers": {phi: runs.classifier(table, phi).metadata for phi in table.backbones},
        "lr": runs.LR,
        "environment": environment(),
        "rows": rows,
        "costs": [
            row | {"backbone": phi, "label": label} for (phi, _), group in costs.items() for label, row in group.items()
        ],
    }
    write_json(out / "accuracy.json", result)
    print(summary(result))
    print(verdicts(result))


def cost_of(row: dict[str, Any], costs: dict[tuple[str, int], dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What distilling took, where a row is of distilled images."""
    cost = costs.get((row["distilled_on"], row["ipc"]), {}).get(row["label"])
    if cost is None or row["steps"] is None:
        return {"peak_bytes": None, "distillation_seconds": None}
    return {"peak_bytes": cost["peak_bytes"], "distillation_seconds": round(cost["step_seconds"] * row["steps"], 1)}


if __name__ == "__main__":
    main()
