"""Accuracy of distilled images: methods x images a class x distilling and evaluating backbones x modes, references and cost beside them.

    python -m benchmarks.accuracy --data fashion-mnist --out benchmarks/results/cpu

Every run's images, and the rows of everything evaluated, are kept in WORK as soon as they are made, so an interrupted table continues where
it stopped. Mean ± std is over distillation seeds, each with an evaluation of its own; for references over evaluation seeds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from sfm_fast.arguments import add_list, check_names
from sfm_fast.demo.cost import Cost, compare_methods
from sfm_fast.distill.config import DistillConfig
from sfm_fast.files import write_json

from ..cells import Cell, Runner, fill, in_parallel, in_turn
from ..machine import environment
from . import runs
from .tables import Row, summary, verdicts

Value = TypeVar("Value")
Costs = Mapping[str, Cost]  # by label


def kept_in(path: Path, cells: list[Cell[str, Value]], run: Runner[str, Value] = in_turn) -> list[Value]:
    """The results of ``cells`` in their order: read from the JSON file ``path``, or computed and stored there."""
    kept: dict[str, Value] = json.loads(path.read_text()) if path.exists() else {}
    for _ in fill(kept, cells, lambda: write_json(path, kept), run=run):
        pass
    return [kept[cell.name] for cell in cells]


def measure_costs(table: runs.Table, phi: str, ipc: int, rounds: int) -> Costs:
    """Seconds and peak bytes of a step by label, with runs in turn; stored in WORK, since runs of equal time depend on it."""
    # A run of equal time differs from the one of equal steps only in the number of steps.
    wanted = {run.label: run for run in runs.RUNS[ipc] if run.equal_time is None}
    configs = {label: DistillConfig.paper(method=run.method, ipc=ipc, **run.options) for label, run in wanted.items()}
    key = json.dumps([rounds, {label: config.to_dict() for label, config in configs.items()}])
    name = f"{table.slug}, {runs.backbone(phi).fingerprint}, {ipc}: {hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def measure() -> list[Cost]:
        # The time of a step doesn't depend on the values of the centres.
        centers = runs.statistics(table, phi, ipc if ipc > 1 else 0)
        return compare_methods(configs, runs.backbone(phi), runs.source(table.data, "train"), centers, rounds=rounds)

    (rows,) = kept_in(table.work / "costs.json", [Cell(name, measure)])
    by_label = {row["name"]: row for row in rows}
    for run in runs.RUNS[ipc]:
        if run.equal_time is not None:
            by_label[run.label] = by_label[run.method]
    print(f"costs: {phi}, {ipc} images a class", flush=True)
    return by_label


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"wanted a whole number, at least 1, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--out", required=True, help="folder of accuracy.json")
    parser.add_argument("--work", default="runs/accuracy", help="folder of the runs' images, features and rows")
    add_list(parser, "--backbones", default=runs.BACKBONES, help=f"of {', '.join(runs.BACKBONES)}")
    add_list(parser, "--ipc", int, default=list(runs.RUNS), help=f"of {', '.join(map(str, runs.RUNS))}")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, help="instead of the table's own")
    parser.add_argument("--epochs", type=positive, default=1000, help="of the probes")
    parser.add_argument("--rounds", type=positive, default=5, help="interleaved steps when measuring times")
    parser.add_argument("--finished", action="store_true", help="a table of what is finished, nothing new")
    parser.add_argument(
        "--everything", action="store_true", help="also the three runs that take longest, on EfficientNet-lite0"
    )
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, help="processes; the cores are divided among them"
    )
    args = parser.parse_args()
    backbones = check_names("--backbones", args.backbones, runs.BACKBONES)
    ipcs = check_names("--ipc", args.ipc, list(runs.RUNS))
    out, work = Path(args.out), Path(args.work)
    table = runs.Table(args.data, work.resolve(), tuple(backbones), tuple(ipcs), args.seeds, args.steps, args.epochs)
    for folder in (out, *(work / name for name in ("images", "features"))):
        folder.mkdir(parents=True, exist_ok=True)
    pool = functools.partial(in_parallel, args.jobs, max(1, (os.cpu_count() or 1) // args.jobs))

    prepared = [Cell(phi, functools.partial(runs.prepare, table, phi)) for phi in table.backbones]
    list(pool("features and classifiers")(prepared))
    costs = {(phi, ipc): measure_costs(table, phi, ipc, args.rounds) for phi in table.backbones for ipc in table.ipcs}
    configs = {
        (phi, ipc): {
            run.label: tuple(runs.config_of(table, run, phi, ipc, seed, costs[phi, ipc]) for seed in range(table.seeds))
            for run in runs.RUNS[ipc]
            if args.everything or (phi, ipc, run.label) not in runs.SLOW_RUNS
        }
        for phi, ipc in costs
    }
    cells = [
        Cell(runs.name_of(table, job), functools.partial(runs.evaluate, table, job))
        for job in runs.jobs(table, configs)
    ]
    rows_file = work / "rows.json"
    if args.finished:
        known = json.loads(rows_file.read_text()) if rows_file.exists() else {}
        cells = [cell for cell in cells if cell.name in known]
        print(f"{len(cells)} cells are finished")
    else:
        to_distil = [(phi, c) for (phi, _), by_label in configs.items() for group in by_label.values() for c in group]
        # The longest first, so that all processes end at about the same time.
        to_distil.sort(key=lambda one: -one[1].steps * one[1].ipc * one[1].views_per_step)
        list(pool("distilled")(Cell(one, functools.partial(runs.keep_images, table, *one)) for one in to_distil))
    evaluated = kept_in(rows_file, cells, pool("evaluated"))
    result = {
        "data": args.data,
        "backbones": [runs.backbone(name).describe() for name in table.backbones],
        "classifiers": {phi: runs.classifier(table, phi).metadata for phi in table.backbones},
        "lr": runs.LR,
        "environment": environment(),
        "rows": [row | cost_of(row, costs) for rows in evaluated for row in rows],
        "costs": [
            {**row, "backbone": phi, "label": label}
            for (phi, _), group in costs.items()
            for label, row in group.items()
        ],
    }
    write_json(out / "accuracy.json", result)
    print(summary(result))  # type: ignore[arg-type]
    print(verdicts(result))  # type: ignore[arg-type]


def cost_of(row: Row, costs: Mapping[tuple[str, int], Costs]) -> Row:
    """The cost of distilling, added to a row of distilled images."""
    cost = costs.get((row["distilled_on"], row["ipc"]), {}).get(row["label"])
    if cost is None or row["steps"] is None:
        return {"peak_bytes": None, "distillation_seconds": None}
    return {"peak_bytes": cost["peak_bytes"], "distillation_seconds": round(cost["step_seconds"] * row["steps"], 1)}


if __name__ == "__main__":
    main()
