"""Rows of results as text tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..units import megabytes as megabytes


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (width + 1) + ("-" if place == 0 else ":") for place, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def accuracy_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of `Evaluator` as a table: accuracies in percent, mean ± std over seeds; time of a fit; float32 bytes needed for
    prediction besides the backbone."""
    rows = list(rows)

    def percent(row: Mapping[str, Any], key: str) -> str:
        spread = f" ± {100 * row[key + '_std']:.1f}" if row.get("seeds", 2) > 1 else ""
        return f"{100 * row[key + '_mean']:.1f}{spread}"

    header, cells = ["images", "mode", "per class", "top-1 %", "top-5 %", "one fit", "stored, fp32", "tested on"], []
    for row in rows:
        seconds, stored = row.get("fit_seconds"), row.get("bytes_fp32")
        cells.append(
            [
                row.get("method") or row["images"],
                row.get("mode", "probe"),
                str(row["ipc"]),
                percent(row, "top1"),
                percent(row, "top5"),
                "" if seconds is None else f"{1e3 * seconds:.0f} ms",
                "" if stored is None else f"{stored / 1e3:.1f} kB",
                row["backbone"],
            ]
        )
    if any("run" in row for row in rows):
        header.append("run")
        cells = [[*cell, row.get("run", "")] for cell, row in zip(cells, rows, strict=True)]
    return text_table(header, cells)


def plan_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Predicted steps: peak and its parts in GB, operations, and memory relative to the recommended way of SFM."""
    rows = list(rows)
    ours = next((row["peak_bytes"] for row in rows if row["recommended"]), min(row["peak_bytes"] for row in rows))
    cells = []
    for row in rows:
        name = f"{row['method'].upper()} {row['variant']}" + (", recommended" if row["recommended"] else "")
        parts = row["by_category"]
        images = (parts["pyramid"] + parts["adam"]) / 1e9
        cells.append(
            [
                name,
                "all" if row["micro_batch"] is None else str(row["micro_batch"]),
                str(row["views"]),
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['peak_bytes'] / ours:.1f}",
                f"{parts['parameters'] / 1e9:.2f}",
                f"{images:.2f}",
                f"{parts['activations'] / 1e9:.2f}",
                f"{parts['workspace'] / 1e9:.2f}",
                f"{row['host_bytes'] / 1e9:.2f}",
                f"{row['flops_per_step'] / 1e12:,.{0 if row['flops_per_step'] >= 1e14 else 2}f}",
            ]
        )
    header = (
        "one step, GB", "micro-batch", "views", "peak", "x recommended", "parameters", "pyramid + Adam", "activations",
        "workspace", "on host", "TFLOP",
    )  # fmt: skip
    return text_table(header, cells)
