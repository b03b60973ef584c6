"""Write the tables of README and docs from the committed results; `--check` fails where they differ.

python scripts/readme_tables.py
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfm_fast.benchmarks.accuracy.setting_tables import settings_table
from sfm_fast.benchmarks.accuracy.tables import full_tables, stored_table, summary
from sfm_fast.benchmarks.accuracy.target_tables import shrinkage_table, weight_table
from sfm_fast.benchmarks.derivation.figure import findings_table
from sfm_fast.benchmarks.gpu.tables import gpu_step_table, kernel_table, read_all, shown_kernels
from sfm_fast.benchmarks.report.tables import (
    backbone_table,
    claims_table,
    image_table,
    loss_table,
    step_table,
    where_we_lose,
)
from sfm_fast.benchmarks.rows import Row, read_claims, read_result
from sfm_fast.demo.page import cost_table
from sfm_fast.report.tables import plan_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def accuracy() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / "accuracy.json").read_text())
    return result


def accuracy_summary() -> str:
    result = accuracy()
    machine = result["environment"]
    note = f"Top-1 accuracy in percent, mean ± standard deviation over 3 seeds; steps and time of one run ({machine['cpu']}, one thread, torch {machine['torch']}, fp32). LGM is its fastest variant, closed-form, with A = 10 views."
    return f"{summary(result)}\n\n{note}"


def cost() -> str:
    result = json.loads((RESULTS / "demo.json").read_text())
    facts = result["facts"]
    return f"{cost_table(result['costs'])}\n\n{facts['machine']}, torch {facts['torch']}; the whole demo took {result['seconds']:.0f} s."


def laptop(suite: str) -> tuple[list[Row], str]:
    """Rows of a suite of the committed result, and a description of the machine."""
    result = read_result(RESULTS / "laptop.json")
    machine = result.environment
    rows = [row for row in result.rows if row.suite == suite]
    return rows, f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"


def losses() -> str:
    """Forward + backward at two sizes; all sizes are in the table next to the JSON file."""
    rows, machine = laptop("losses")
    rows += read_result(RESULTS / "full.json").rows
    shown = [f"{kind} {size}" for kind in ("global", "class", "pair") for size in ("1000x768", "21841x1024")]
    rows = [row for row in rows if row.case in shown]
    copy = statistics.median(row.copy_bandwidth for row in rows if row.copy_bandwidth) / 1e9
    product = statistics.median(row.matmul_rate for row in rows if row.matmul_rate) / 1e9
    note = f"{machine}, fp32; median of the ceilings measured with each shape: copy {copy:.0f} GB/s, matrix product {product:.0f} GFLOP/s."
    return f"{loss_table(rows)}\n\n{note}"


def images() -> str:
    rows, machine = laptop("images")
    copy = statistics.median(row.copy_bandwidth for row in rows if row.copy_bandwidth) / 1e9
    shown = [row for row in rows if row.canvas == 256]
    return f"{image_table(shown)}\n\n{machine}; copy {copy:.0f} GB/s. Every size: `benchmarks/results/cpu/laptop.md`."


def step() -> str:
    rows, machine = laptop("step")
    return f"{step_table(row for row in rows if row.mode == 'step')}\n\n{machine}, fp32."


def prepared(kind: str) -> str:
    """The batches or the steps of the suite of prepared backbones."""
    result = read_result(RESULTS / "cpu.json")
    machine = result.environment
    rows = [row for row in result.rows if row.suite == "backbones" and row.mode == kind]
    table = backbone_table(rows) if kind == "both" else step_table(rows)
    return f"{table}\n\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, fp32."


def claims() -> str:
    machine = json.loads((RESULTS / "claims.json").read_text())["environment"]
    table = claims_table(read_claims(RESULTS / "claims.json"))
    return f"{table}\n\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}."


def losing() -> str:
    return where_we_lose(read_result(RESULTS / "laptop.json"))


def plan(classes: int) -> str:
    result = json.loads((RESULTS.parent / "predicted" / f"plan_{classes}.json").read_text())
    return plan_table(result["rows"])


def gpu_kernels(table: Callable[..., str]) -> str:
    return table(read_all(RESULTS.parent, "kernels.json"))


def gpu_steps() -> str:
    return gpu_step_table(read_all(RESULTS.parent, "steps.json"))


def derivation() -> str:
    return findings_table(json.loads((RESULTS / "derivation.json").read_text()))


def targets(table: Callable[[dict[str, Any]], str]) -> str:
    return table(json.loads((RESULTS / "targets.json").read_text()))


def settings() -> str:
    return settings_table(json.loads((RESULTS / "settings.json").read_text()))


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "accuracy": accuracy_summary,
        "cost": cost,
        "claims": claims,
        "losses": losses,
        "images": images,
        "step": step,
        "gpu": functools.partial(gpu_kernels, shown_kernels),
        **{f"plan-{classes}": functools.partial(plan, classes) for classes in (100, 1000)},
    },
    "docs/cpu.md": {
        "backbones": functools.partial(prepared, "both"),
        "prepared-steps": functools.partial(prepared, "step"),
    },
    "docs/gpu.md": {"gpu-kernels": functools.partial(gpu_kernels, kernel_table), "gpu-steps": gpu_steps},
    "docs/benchmarks.md": {"losing": losing},
    "docs/accuracy.md": {
        "accuracy-full": lambda: full_tables(accuracy()),
        "settings": settings,
    },
    "docs/evaluation.md": {"accuracy-stored": lambda: stored_table(accuracy())},
    "docs/derivation.md": {
        "derivation": derivation,
        "targets-shrinkage": functools.partial(targets, shrinkage_table),
        "targets-weight": functools.partial(targets, weight_table),
    },
}


def fill(text: str, tables: dict[str, Callable[[], str]], page: str) -> str:
    """``text`` with new contents between the markers of every table."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=make(): f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            sys.exit(f"{page}: must have one place for the table {name!r}, got {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page differs")
    args = parser.parse_args()
    for page, tables in PAGES.items():
        old = (ROOT / page).read_text(encoding="utf-8")
        new = fill(old, tables, page)
        if not args.check:
            (ROOT / page).write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{page}: its tables differ from the committed results; run make readme")


if __name__ == "__main__":
    main()
