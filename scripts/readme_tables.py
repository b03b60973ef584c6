"""Write the README's tables from the committed results; `--check` fails where they differ.

python scripts/readme_tables.py
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from sfm_fast.report.demo import cost_table
from sfm_fast.report.tables import image_table, loss_table, plan_table, step_table, text_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def accuracy() -> str:
    result = json.loads((RESULTS / "accuracy.json").read_text())

    def row(values: dict[str, Any]) -> tuple[str, ...]:
        steps = str(values["steps"]) if values["steps"] else ""
        seconds = f"{values['distillation_seconds']:.0f} s" if values["steps"] else ""
        top1 = f"{100 * values['top1_mean']:.1f} ± {100 * values['top1_std']:.1f}"
        return values["method"] or values["images"], str(values["ipc"]), top1, steps, seconds

    table = text_table(("trained on", "images a class", "top-1 %", "steps", "distillation"), map(row, result["rows"]))
    machine = result["environment"]
    note = (
        f"Distillation time is the steps times a step's time, measured in turn in one run ({machine['cpu']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, fp32). LGM in closed form, the fastest, with A = 10 views."
    )
    return f"{table}\n\n{note}"


def cost() -> str:
    result = json.loads((RESULTS / "demo.json").read_text())
    facts = result["facts"]
    return f"{cost_table(result['costs'])}\n\n{facts['machine']}, torch {facts['torch']}; the whole demo took {result['seconds']:.0f} s."


def losses() -> str:
    """The shapes at both ends and the ones users have; the whole table stands beside its JSON."""
    result = json.loads((RESULTS / "flow_alignment.json").read_text())
    shown = {
        ("global", 1000, 768),
        ("global", 21841, 1024),
        ("class", 21841, 1024),
        ("pair", 1000, 768),
        ("pair", 21841, 1024),
    }
    rows = [
        row for row in result["rows"] if (row["alignment"], row["classes"], row["dim"]) in shown and row["ipc"] == 1
    ]
    machine = result["environment"]
    copy, product = (statistics.median(row[key] for row in rows) / 1e9 for key in ("copy_bandwidth", "matmul_rate"))
    note = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, fp32; median of the ceilings measured beside "
        f"each shape: copy {copy:.0f} GB/s, matrix product {product:.0f} GFLOP/s."
    )
    return f"{loss_table(rows)}\n\n{note}"


def images() -> str:
    result = json.loads((RESULTS / "render_augment.json").read_text())
    rows = [row for row in result["rows"] if row["images"] == 100]
    machine = result["environment"]
    copy = statistics.median(row["copy_bandwidth"] for row in rows) / 1e9
    return (
        f"{image_table(rows)}\n\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; copy {copy:.0f} GB/s. "
        "Every size: `benchmarks/results/cpu/render_augment.md`."
    )


def step() -> str:
    result = json.loads((RESULTS / "step.json").read_text())
    machine = result["environment"]
    return f"{step_table(result['rows'])}\n\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {result['precision']}."


def plan(classes: int) -> str:
    result = json.loads((RESULTS.parent / "predicted" / f"plan_{classes}.json").read_text())
    return plan_table(result["rows"])


TABLES = {"accuracy": accuracy, "cost": cost, "losses": losses, "images": images, "step": step}
TABLES |= {f"plan-{classes}": functools.partial(plan, classes) for classes in (100, 1000)}


def fill(text: str) -> str:
    """``text`` with every table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, made=make(): f"{found[1]}{made}\n{found[2]}", text)
        if count != 1:
            sys.exit(f"README.md: wanted one place for the table {name!r}, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the README differs")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = fill(old)
    if args.check:
        sys.exit(0 if new == old else "README.md: its tables are not those of the committed results; run make readme")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
