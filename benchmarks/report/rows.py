"""Benchmark results as read from JSON: their check, the order of their rows, who competes with whom, and how numbers are written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfm_fast.errors import InputError
from sfm_fast.files import parse_json

FORMAT = "sfm_fast bench 1"
SUITES = ("losses", "images", "step", "loading", "scaling", "startup")
Row = Mapping[str, Any]
_TEXTS = ("suite", "case", "contender", "mode", "status")
_TIMES = ("median", "p20", "p80")
# Facts that are numbers wherever they stand; anything else in a row is shown or ignored, never computed with.
_NUMBERS = (*_TIMES, "first_seconds", "peak_bytes", "absolute_bytes", "extra_bytes", "predicted_bytes", "flops",
            "copy_fraction", "matmul_fraction", "images", "classes", "dim", "ipc", "views", "steps")  # fmt: skip
_NAMES = ("alignment", "metric", "dtype", "precision", "backbone", "image_size", "channels", "canvas", "size", "varied")
# What stands before a step and stays after it; a step's own memory is the rest.
_MOST = 1e30  # beyond any seconds, bytes and operations, and far enough from infinity to compute with
STANDING = ("parameters", "pyramid", "adam")


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The result in the JSON file ``path``, checked. Raises ``InputError`` naming the file and what is wrong in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from error
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON ({error})") from error
    return check_result(value, str(path))


def check_result(result: Any, name: str = "result") -> dict[str, Any]:
    """``result`` itself, or ``InputError`` naming ``name`` and the first key that isn't as the format has it."""
    if not isinstance(result, dict):
        raise InputError(f"{name}: wanted a benchmark result (a JSON object), got {type(result).__name__}")
    if result.get("format") != FORMAT:
        raise InputError(f"{name}: key 'format': wanted {FORMAT!r}, got {result.get('format')!r}")
    if not isinstance(result.get("preset"), str):
        raise InputError(f"{name}: key 'preset': wanted a name, got {result.get('preset')!r}")
    if not isinstance(result.get("environment"), dict):
        raise InputError(f"{name}: key 'environment': wanted an object, got {result.get('environment')!r}")
    if not isinstance(result.get("rows"), list):
        raise InputError(f"{name}: key 'rows': wanted a list, got {type(result.get('rows')).__name__}")
    for place, row in enumerate(result["rows"]):
        _check_row(row, f"{name}: rows[{place}]")
    return result


def _check_row(row: Any, name: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{name}: wanted an object, got {type(row).__name__}")
    for key in _TEXTS:
        if not isinstance(row.get(key), str) or not row[key]:
            raise InputError(f"{name}: key {key!r}: wanted a text, got {row.get(key)!r}")
    for key in _NUMBERS:
        if row.get(key) is not None and not _is_amount(row[key]):
            raise InputError(f"{name}: key {key!r}: wanted a finite number, at least 0, got {row[key]!r}")
    for key in _NAMES:
        if not isinstance(row.get(key), str | int | float | None):
            raise InputError(f"{name}: key {key!r}: wanted a text or a number, got {row[key]!r}")
    if row["status"] == "ok":
        for key in _TIMES:
            if row.get(key) is None:
                raise InputError(f"{name}: key {key!r}: wanted seconds, since the row's status is ok")
    spread = row.get("ratio")
    if spread is not None:
        wanted = ("median", "low", "high")
        if (
            not isinstance(spread, dict)
            or not all(_is_amount(spread.get(key)) for key in wanted)
            or not spread["median"]
        ):
            raise InputError(f"{name}: key 'ratio': wanted {wanted}, got {spread!r}")
    parts = row.get("by_category")
    if parts is not None and not (isinstance(parts, dict) and all(_is_amount(value) for value in parts.values())):
        raise InputError(f"{name}: key 'by_category': wanted names and bytes, got {parts!r}")


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST


def of_suite(rows: Iterable[Row], suite: str) -> list[Row]:
    """The rows of one suite, in order."""
    return [row for row in rows if row["suite"] == suite]


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were measured against each other: of one suite, case and mode, the first contender's row first."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["suite"], row["case"], row["mode"]), []).append(row)
    return list(found.values())


def is_ours(name: str) -> bool:
    """Whether a contender is this package's own, going by its name; a plain torch step is what a user writes without it."""
    return name.startswith(("sfm_fast", "SFM")) and "plain torch" not in name


def rivals(group: Sequence[Row]) -> list[Row]:
    """The rows of a group that compete with ours, its first contender."""
    ours = group[0]["contender"]
    return [row for row in group if row["contender"] != ours and not is_ours(row["contender"])]


def is_measured(row: Row) -> bool:
    """Whether the row has times."""
    return bool(row["status"] == "ok")


def is_predicted(row: Row) -> bool:
    """Whether the row's memory was counted without running anything."""
    return bool(row["status"] == "predicted")


def predicted_total(row: Row) -> float | None:
    """Predicted peak of everything in memory, in bytes, of a row that predicts or holds a prediction beside its measurement."""
    if is_predicted(row):
        found = row.get("absolute_bytes") if row.get("absolute_bytes") is not None else row.get("peak_bytes")
    else:
        found = row.get("predicted_bytes")
    return None if found is None else float(found)


def predicted_delta(row: Row) -> float | None:
    """Predicted peak beyond what stands before the step, in bytes; None where the row doesn't say what stands."""
    if is_predicted(row) and row.get("absolute_bytes") is not None and row.get("peak_bytes") is not None:
        return float(row["peak_bytes"])
    total, parts = predicted_total(row), row.get("by_category")
    if total is None or parts is None or not all(name in parts for name in STANDING):
        return None
    return float(total - sum(parts[name] for name in STANDING))


def hardware(environment: Row) -> str:
    """The machine in a few words: GPU where one was used, else the CPU, its cores and threads."""
    threads = environment.get("threads")
    counted = f", {threads} thread{'' if threads == 1 else 's'}" if threads is not None else ""
    if environment.get("gpu"):
        return f"{environment['gpu']} (host: {environment.get('cpu') or 'CPU not recorded'}{counted})"
    cores = f", {environment['cores']} cores" if environment.get("cores") is not None else ""
    return f"{environment.get('cpu') or 'CPU not recorded'}{cores}{counted}"


def versions(environment: Row) -> str:
    """torch, triton and python with their versions, the package with its commit."""
    told = [f"{name} {environment[name]}" for name in ("torch", "triton", "python") if environment.get(name)]
    commit = f" at commit {environment['commit']}" if environment.get("commit") else ""
    changed = " with uncommitted changes" if environment.get("dirty") else ""
    return ", ".join([*told, f"sfm_fast {environment.get('sfm_fast') or 'of unknown version'}{commit}{changed}"])


def dtypes(rows: Iterable[Row]) -> str:
    """The number formats the rows name, or that they name none."""
    long = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    named = (str(row.get("dtype") or row.get("precision")) for row in rows)
    found = sorted({long.get(name, name) for name in named} - {"None"})
    return ", ".join(found) if found else "dtype not recorded"


def digits(value: float) -> str:
    """Three significant digits, more only before the point: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, without the unit."""
    return digits(seconds * 1e3)


def duration(seconds: float) -> str:
    """Seconds with the unit that suits them: µs, ms or s."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def memory(count: float) -> str:
    """Bytes in decimal units: B, kB, MB or GB."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.{2 if scale == 1e9 else 1}f} {unit}"
    return f"{count:.0f} B"


def times(value: float, low: float | None = None, high: float | None = None) -> str:
    """A factor with its interval: 3.1x (2.9–3.3); two digits behind the point below 2, where they matter."""
    places = 2 if value < 2 else 1 if value < 100 else 0
    interval = "" if low is None or high is None else f" ({low:.{places}f}–{high:.{places}f})"
    return f"{value:.{places}f}x{interval}"


def ratio(row: Row) -> str:
    """The row's time over the first contender's, with its interval; empty where it has none, 1x for the first itself."""
    spread = row.get("ratio")
    if spread and spread["low"] == spread["high"] == spread["median"] == 1:
        return "1x"
    if not spread:
        return ""
    single = row.get("rounds") == 1  # of a call of minutes: one sample has no interval
    return times(spread["median"]) if single else times(spread["median"], spread["low"], spread["high"])


def ceiling(row: Row) -> str:
    """The share of the ceiling that binds, the larger one: "copy 12 %" or "matmul 45 %"."""
    shares = [(row[f"{name}_fraction"], name) for name in ("copy", "matmul") if row.get(f"{name}_fraction") is not None]
    if not shares:
        return ""
    share, name = max(shares)
    return f"{name} {100 * share:.{0 if share >= 0.01 else 1}f} %"
