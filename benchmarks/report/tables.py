"""Benchmark results as Markdown tables and CSV: every row of every suite, where we lose, and the smaller tables of the README."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfm_fast.errors import InputError
from sfm_fast.report.tables import megabytes, text_table

from .cells import (
    LEGEND,
    NO_LOSSES,
    NOTHING_RUN,
    describe,
    images_a_second,
    only_predicted,
    status,
    suite_tables,
    warning,
)
from .losing import HEADER as LOSING_HEADER
from .losing import losses
from .rows import Row, ceiling, check_result, groups, is_measured, milliseconds, predicted_delta, ratio


def _cell(text: str) -> str:
    # A bar would end the cell and a < would start raw HTML; a line break would end the row.
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return text_table(header, [[_cell(text) for text in row] for row in rows])


def markdown(result: dict[str, Any]) -> str:
    """Everything of one result: what it was made on, a table a suite, and where we lose.

    Raises ``InputError`` naming the key that isn't as the format has it.
    """
    check_result(result)
    parts = [f"# Benchmarks: {_cell(result['preset'])}", _cell(describe(result)), LEGEND]
    if warning(result):
        parts.append(f"**{warning(result)}**")
    for table in suite_tables(result):
        parts += [f"## {_cell(table.title)}", _markdown_table(table.header, table.rows)]
    return "\n\n".join([*parts, "## Where we lose", where_we_lose(result)]) + "\n"


def rows_table(rows: Iterable[Row]) -> str:
    """Any rows as full tables, one a suite."""
    tables = suite_tables({"rows": list(rows)})
    return "\n\n".join(_markdown_table(table.header, table.rows) for table in tables)


def where_we_lose(result: dict[str, Any]) -> str:
    """What is slower, larger or longer to start than another contender, kind by kind, the worst first; says so where nothing is."""
    check_result(result)
    if only_predicted(result):
        return NOTHING_RUN
    parts = []
    for kind in losses(result):
        parts += [f"**{kind.kind}.** {kind.explanation}", _markdown_table(LOSING_HEADER, kind.rows)]
    return "\n\n".join(parts) or NO_LOSSES


def csv_text(*results: dict[str, Any]) -> str:
    """Every row of every result as a line of CSV, with its preset; ``ratio`` becomes ratio_median, ratio_low and ratio_high, other objects their keys likewise.

    Columns: those every result has, then the union of all other keys by name. Missing values are empty.
    """
    first = (
        "preset", "suite", "case", "contender", "mode", "status", "median", "p20", "p80", "rounds", "ratio_median", "ratio_low",
        "ratio_high", "first_seconds", "peak_bytes", "absolute_bytes", "flops", "copy_fraction", "matmul_fraction",
    )  # fmt: skip
    rows = [
        _flat({"preset": result["preset"], **row}) for result in map(check_result, results) for row in result["rows"]
    ]
    others = sorted({key for row in rows for key in row} - set(first))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *others], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(values: Row, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}_")
        else:
            text = json.dumps(value) if isinstance(value, list) else value
            # A spreadsheet would take it for a formula.
            formula = isinstance(text, str) and text.startswith(("=", "+", "-", "@"))
            flat[prefix + key] = "'" + text if formula else text
    return flat


def loss_table(rows: Iterable[Row]) -> str:
    """Forward + backward of every contender on every shape: time, times the first, share of the ceiling, memory."""
    lines = []
    for row in rows:
        if row["mode"] != "both":
            continue
        name = row["case"]
        if {"alignment", "classes", "dim"} <= row.keys():
            several = f", ipc {row['ipc']}" if (row.get("ipc") or 1) > 1 else ""
            name = f"{row['alignment']} {row['classes']} x {row['dim']}{several}"
        if not is_measured(row):
            lines.append([name, row["contender"], status(row), "", "", ""])
            continue
        cells = [milliseconds(row["median"]), ratio(row), ceiling(row), _size(row, "peak_bytes")]
        lines.append([name, row["contender"], *cells])
    return _markdown_table(("loss, C x D", "contender", "ms", "x ours", "of ceiling", "memory"), lines)


def _size(row: Row, key: str) -> str:
    return "" if row.get(key) is None else megabytes(row[key])


def image_table(rows: Iterable[Row]) -> str:
    """Every contender of the image path: forward, forward + backward, times the first, share of the ceiling, memory."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["contender"]), {})[row["mode"]] = row
    lines = []
    for (name, contender), modes in cases.items():
        any_row = next(iter(modes.values()))
        if {"images", "channels", "canvas", "size", "dtype"} <= any_row.keys():
            name = "{images} x {channels} x {canvas}² to {size}², {dtype}".format_map(any_row)
        both, forward = modes.get("both", any_row), modes.get("forward")
        alone = "" if forward is None else milliseconds(forward["median"]) if is_measured(forward) else status(forward)
        if not is_measured(both):
            lines.append([name, contender, alone, status(both), "", "", "", ""])
            continue
        cells = [milliseconds(both["median"]), ratio(both), ceiling(both)]
        lines.append([name, contender, alone, *cells, _size(both, "extra_bytes"), _size(both, "peak_bytes")])
    header = ("images", "contender", "forward ms", "both ms", "x ours", "of ceiling", "extra memory", "with results")
    return _markdown_table(header, lines)


def step_table(rows: Iterable[Row]) -> str:
    """Whole steps: time, images a second, memory beyond weights and state measured and predicted, each beside the first's."""
    found = groups(rows)
    lines = []
    for group in found:
        first = next((row for row in group if is_measured(row)), None)
        for row in group:
            name = row["contender"] if len(found) == 1 else f"{row['case']}, {row['mode']}: {row['contender']}"
            delta = predicted_delta(row)
            predicted = "" if delta is None else megabytes(delta)
            if not is_measured(row) or first is None:
                lines.append([name, status(row), "", "", "", predicted, ""])
                continue
            share = ""
            if row.get("peak_bytes") is not None and first.get("peak_bytes"):
                share = f"{row['peak_bytes'] / first['peak_bytes']:.2f}"
            cells = [
                milliseconds(row["median"]),
                ratio(row),
                images_a_second(row),
                _size(row, "peak_bytes"),
                predicted,
                share,
            ]
            lines.append([name, *cells])
    header = ("one step", "ms", "time x", "images/s", "memory of a step", "predicted", "memory x")
    return _markdown_table(header, lines)


CLAIMS_HEADER = ("claim", "setting", "contender", "paper: at least", "own goal", "found", "how")


def claim_cells(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Claims under `CLAIMS_HEADER`. Raises ``InputError`` naming the row and the key that is missing or of the wrong kind."""
    found = []
    for place, row in enumerate(rows):
        wanted = ("claim", "setting", "contender", "kind", "unit", "paper", "goal", "measured", "met_paper", "met_goal")
        missing = [key for key in wanted if not isinstance(row, Mapping) or key not in row]
        if missing:
            raise InputError(f"claims[{place}]: key {missing[0]!r} is missing")
        for key in ("paper", "goal", "measured", "standard_error"):
            if not isinstance(row.get(key), int | float | None) or isinstance(row.get(key), bool):
                raise InputError(f"claims[{place}]: key {key!r}: wanted a number, got {row[key]!r}")
        for key in ("met_paper", "met_goal"):
            if not isinstance(row[key], bool | None):
                raise InputError(f"claims[{place}]: key {key!r}: wanted true, false or null, got {row[key]!r}")
        met = {None: "", True: " (met)", False: " (missed)"}
        wishes = ["" if row[key] is None else f"{row[key]:g}{met[row[f'met_{key}']]}" for key in ("paper", "goal")]
        names = [str(row[key]) for key in ("claim", "setting", "contender")]
        found.append((*names, *wishes, _found(row), str(row["kind"])))
    return found


def _found(claim: Row) -> str:
    """ "54.6x less memory", "-0.31 ± 0.12 points": three digits, the standard error where there is one."""
    if claim["measured"] is None:
        return ""
    error = f" ± {claim['standard_error']:.2g}" if claim.get("standard_error") is not None else ""
    unit = str(claim["unit"] or "")
    return f"{claim['measured']:.3g}{error}{'' if unit[:1] in ('', 'x') else ' '}{unit}"


def claims_table(rows: Iterable[Row]) -> str:
    """Each claim with the paper's figure, our goal, and what was measured, predicted or counted."""
    return _markdown_table(CLAIMS_HEADER, claim_cells(rows))
