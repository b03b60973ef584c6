"""The table of ``settings.json``: one change of the base in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfm_fast.report.tables import text_table

from .tables import short_name


def settings_table(result: Mapping[str, Any]) -> str:
    """Top-1 on held-out training images, one row per change: on each backbone that images were made for and, behind a slash, the mean of the others."""
    rows = result["rows"]
    groups = list(dict.fromkeys((row["ipc"], tuple(row["made_for"])) for row in rows))
    header = ["change of the base", *(f"{ipc}, {' + '.join(map(short_name, names))}" for ipc, names in groups)]
    lines = []
    for change in dict.fromkeys(row["change"] for row in rows):
        cells = [change]
        for ipc, names in groups:
            row = next(
                (one for one in rows if (one["change"], one["ipc"], tuple(one["made_for"])) == (change, ipc, names)),
                None,
            )
            cells.append("" if row is None else _cell(row))
        lines.append(cells)
    return text_table(header, lines)


def _cell(row: Mapping[str, Any]) -> str:
    own = [f"{row['top1'][name]:.1f}" for name in row["made_for"]]
    others = [top1 for name, top1 in row["top1"].items() if name not in row["made_for"]]
    return ", ".join(own) + (f" / {sum(others) / len(others):.1f}" if others else "")
