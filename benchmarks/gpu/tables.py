"""Tables of measurements on GPUs: times of the kernels and of whole steps, or a line that says that there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfm_fast.report.tables import text_table

NOTHING = "No GPU has run these kernels yet: no figure here is one of a GPU (`make gpu` measures them)."
SHOWN = (
    "pair 21841",
    "render_augment 1000",
    "global 1000",
    "global 21841",
    "class 21841",
)  # of the kernels, in the README
Row = Mapping[str, Any]


def read_all(results: Path, name: str) -> dict[str, Mapping[str, Any]]:
    """Card -> the result ``name`` ("kernels.json", "steps.json") of each folder under ``results`` that has one."""
    every = (json.loads(path.read_text()) for path in sorted(results.glob(f"*/{name}")))
    return {str(result["environment"]["gpu"]): result for result in every}


def kernel_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Forward + backward of every case: time, the floor and its share, memory; one row per contender."""
    if not results:
        return NOTHING
    return "\n\n".join(f"{_machine(card, result)}\n\n{_kernels(result['rows'])}" for card, result in results.items())


def shown_kernels(results: Mapping[str, Mapping[str, Any]]) -> str:
    """`kernel_table` of the most important cases with the fastest contender of each."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for card, result in results.items():
        best: dict[str, Row] = {}
        for row in result["rows"]:
            right = row["status"] == "ok" and row["seconds"] is not None and row["case"].startswith(SHOWN)
            if right and (row["case"] not in best or row["seconds"] < best[row["case"]]["seconds"]):
                best[row["case"]] = row
        chosen[card] = {**result, "rows": list(best.values())}
    return kernel_table(chosen)


def _kernels(rows: Sequence[Row]) -> str:
    cells = [[row["case"], row["contender"], *_times(row)] for row in rows]
    return text_table(["case", "kernels", "ms", "floor, ms", "share", "memory, MB"], cells)


def _times(row: Row) -> list[str]:
    if row["seconds"] is None or row["status"] != "ok":
        return [row["status"], "", "", ""]
    floor, share, peak = row["floor_seconds"], row["share"], row["peak_bytes"]
    return [
        f"{row['seconds'] * 1e3:.3g}",
        "" if floor is None else f"{floor * 1e3:.3g}",
        "" if share is None else f"{100 * share:.0f} %",
        "" if peak is None else f"{peak / 1e6:.0f}",
    ]


def gpu_step_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Whole steps: time and its ratio to SFM in one shot, images a second, share of the products' rate, peak memory."""
    if not results:
        return NOTHING
    return "\n\n".join(f"{_machine(card, result)}\n\n{_steps(result['rows'])}" for card, result in results.items())


def _steps(rows: Sequence[Row]) -> str:
    base = {row["preset"]: row["seconds"] for row in reversed(rows) if row["contender"] == "SFM one-shot"}
    cells = []
    for row in rows:
        if row["seconds"] is None or row["status"] != "ok":
            cells.append([row["preset"], row["contender"], row["status"], "", "", "", ""])
            continue
        first, mfu, peak = base.get(row["preset"]), row["mfu"], row["peak_bytes"]
        cells.append(
            [
                row["preset"],
                row["contender"],
                f"{row['seconds'] * 1e3:.4g}",
                f"{row['seconds'] / first:.2f}x" if first else "",
                f"{row['images_per_second']:.4g}",
                "" if mfu is None else f"{100 * mfu:.0f} %",
                "" if peak is None else f"{peak / 1e9:.2f}",
            ]
        )
    return text_table(["preset", "step", "ms", "to one-shot", "images/s", "of products' rate", "peak, GB"], cells)


def _machine(card: str, result: Mapping[str, Any]) -> str:
    environment, ceilings = result["environment"], result.get("ceilings", {})
    words = f"{card}, torch {environment['torch']}, triton {environment['triton']}, commit {environment['commit']}"
    if "copy_bandwidth" in ceilings:
        words += f"; copy {ceilings['copy_bandwidth'] / 1e12:.2f} TB/s, TF32 {ceilings['tf32_rate'] / 1e12:.0f} TFLOP/s"
    return f"{words}:"
