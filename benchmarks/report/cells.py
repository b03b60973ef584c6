"""Benchmark rows as cells of text: one table a suite, what the result was made on, and the words around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .rows import (
    SUITES,
    Row,
    ceiling,
    digits,
    dtypes,
    duration,
    hardware,
    is_measured,
    is_predicted,
    memory,
    milliseconds,
    of_suite,
    predicted_delta,
    predicted_total,
    ratio,
    versions,
)

TITLES = {
    "losses": "Losses",
    "images": "Rendering and augmenting",
    "step": "Whole steps",
    "loading": "Data loading",
    "scaling": "Scaling of whole steps",
    "startup": "Start-up",
}
NO_LOSSES = "Nothing to list: in no case was another contender surely faster, smaller, or quicker to start."
NOTHING_RUN = "Nothing was run, so nothing is known of times and first calls. What micro-batches cost in operations stands in the rows."
_NO_ROWS = "This result has no measured row: nothing ran to its end, see the status of each row."
_PREDICTED = "Predicted, not measured: nothing of this result was run."
LEGEND = (
    "ms: median time of a call, with the 20th and 80th percentile. Modes: both is forward + backward, step one step, steps five in a row. "
    "x first: time over the case's first contender's (ours, where ours takes part): the median of the rounds' ratios, not the quotient of the medians, with its 95 % "
    "bootstrap interval, which with fewer than 6 rounds is no more than their range. Of ceiling: share of the copy or matrix-product rate "
    "measured in the same run (above 100 %: what stays in the caches, or a kernel quicker than torch's product). Memory: peak beyond what stood before the call; "
    "absolute: everything the process held at that peak, other contenders' tensors too. images/s: synthetic images, in loading real ones. First call: at this size, with compiling and tuning; of a whole process: start-up."
)
_STATUS_LENGTH = 160  # a failure can bring a whole traceback; the CSV has it all


@dataclass(frozen=True)
class Table:
    """Cells as plain text, to be escaped by whoever writes them."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def status(row: Row) -> str:
    """The row's status in one line of bounded length."""
    text = " ".join(row["status"].split())
    return text if len(text) <= _STATUS_LENGTH else text[: _STATUS_LENGTH - 1] + "…"


def suite_tables(result: dict[str, Any]) -> list[Table]:
    """One table a suite that has rows, known suites first; columns nobody fills are left out."""
    names = dict.fromkeys([*SUITES, *(row["suite"] for row in result["rows"])])
    found = []
    for suite in names:
        rows = of_suite(result["rows"], suite)
        if rows:
            found.append(_without_empty(TITLES.get(suite, suite), [_cells(row) for row in rows]))
    return found


def _cells(row: Row) -> dict[str, str]:
    """Every column of a row in the full tables."""

    def written(key: str, write: Any) -> str:
        return "" if row.get(key) is None else write(row[key])

    cells = dict.fromkeys(("ms", "p20–p80", "rounds", "x first", "of ceiling", "images/s"), "")
    if is_measured(row):
        cells = {
            "ms": milliseconds(row["median"]),
            "p20–p80": f"{milliseconds(row['p20'])}–{milliseconds(row['p80'])}",
            "rounds": written("rounds", str),
            "x first": ratio(row),
            "of ceiling": ceiling(row),
            "images/s": images_a_second(row),
        }
    else:
        cells["ms"] = status(row)
    total, delta = predicted_total(row), predicted_delta(row)
    sizes = {"memory": written("peak_bytes", memory), "absolute": written("absolute_bytes", memory)}
    if is_predicted(row):
        sizes = dict.fromkeys(sizes, "")
    return {
        "case": row["case"],
        "contender": row["contender"],
        "mode": row["mode"],
        **cells,
        **sizes,
        "predicted memory": "" if delta is None else memory(delta),
        "predicted absolute": "" if total is None else memory(total),
        "GFLOP": written("flops", lambda count: digits(count / 1e9)),
        "first call": written("first_seconds", duration),
    }


def images_a_second(row: Row) -> str:
    """Throughput of a measured row of whole steps or of loading; empty elsewhere."""
    steps = row["suite"] in ("step", "loading", "scaling")
    count = (row.get("images") or 0) * (row.get("steps") or 1)
    return digits(count / row["median"]) if steps and count and row["median"] else ""


def _without_empty(title: str, rows: Sequence[dict[str, str]]) -> Table:
    header = tuple(name for name in rows[0] if any(row[name] for row in rows))
    return Table(title, header, [tuple(row[name] for name in header) for row in rows])


def only_predicted(result: dict[str, Any]) -> bool:
    """Whether the result has predictions and nothing that was run."""
    rows = result["rows"]
    return any(map(is_predicted, rows)) and not any(map(is_measured, rows))


def warning(result: dict[str, Any]) -> str:
    """What a reader must know first of a result without a measured row; empty where there is one."""
    return "" if any(map(is_measured, result["rows"])) else _PREDICTED if only_predicted(result) else _NO_ROWS


def environment_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the result was made on and with, name by name."""
    rows = [("preset", result["preset"])]
    for name, value in result["environment"].items():
        if name == "dirty":
            rows.append(("uncommitted changes", "yes" if value else "no"))
        elif name.endswith("_bytes") and isinstance(value, int | float):
            rows.append((name.removesuffix("_bytes"), memory(value)))
        elif value is not None:
            rows.append((name, str(value)))
    return rows


def describe(result: dict[str, Any]) -> str:
    """Hardware, versions and number format in one sentence."""
    environment = result["environment"]
    return f"{hardware(environment)}; {versions(environment)}; {dtypes(result['rows'])}."
