"""What got worse between two results of `sfm-fast bench`: a verdict on every quantity, and the table of them.

Bytes and operations have a tight limit. Times of separate runs are never compared, only their ratios to baselines of the
same run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sfm_fast.errors import InputError
from sfm_fast.gate.gate import FELL_TO_NOTHING
from sfm_fast.report.tables import text_table
from sfm_fast.units import percent

from .machine import Environment
from .names import KINDS as KINDS
from .rows import Result, Row

REGRESSION, UNCHANGED, IMPROVED = "regression", "unchanged", "improved"
ONLY_BASE, ONLY_HEAD, NOT_COMPARED = "only in base", "only in head", "not compared"
ORDER = (REGRESSION, ONLY_BASE, NOT_COMPARED, ONLY_HEAD, IMPROVED, UNCHANGED)


@dataclass(frozen=True)
class Limits:
    """Changes that aren't regressions, as fractions, 0.01 for 1 %. ``allow_missing``: rows of the base may be missing."""

    tolerance: float = 0.01
    time_tolerance: float = 0.1
    allow_missing: bool = False

    def __post_init__(self) -> None:
        for name, most in (("tolerance", 10), ("time_tolerance", 0.9)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise InputError(f"--{name.replace('_', '-')} must be from 0 to {most} (0.01 is 1 %), got {value}")


@dataclass(frozen=True)
class Change:
    """One quantity. ``change``: head / base - 1. ``limit``: in the same unit."""

    kind: str
    quantity: str
    base: float | None
    head: float | None
    verdict: str
    change: float | None = None
    limit: float | None = None
    note: str = ""


def judge(kind: str, quantity: str, base: float, head: float, tolerance: float) -> Change:
    """More than the base by more than ``tolerance`` (a fraction) is a regression; so is a change from or to zero."""
    allowed, worse = tolerance * base, head - base
    verdict = REGRESSION if worse > allowed else IMPROVED if worse < -allowed else UNCHANGED
    if bool(base) != bool(head):  # no ratio can be computed
        return Change(kind, quantity, base, head, REGRESSION, -1.0 if base else None, tolerance, FELL_TO_NOTHING)
    return Change(kind, quantity, base, head, verdict, worse / base if base else 0.0, tolerance)


def compare_files(
    base: Result, head: Result, limits: Limits, kinds: Sequence[str] = KINDS
) -> tuple[list[Change], list[str]]:
    """The verdict on every quantity, and notes on the comparison itself."""
    if base.preset != head.preset:
        raise InputError(f"two presets can't be compared: {base.preset} and {head.preset}")
    ours, theirs = base.environment, head.environment
    differing = [key for key in ("cpu", "gpu", "torch", "threads") if ours.get(key) != theirs.get(key)]
    notes = []
    if differing:
        text = "; ".join(f"{key} {ours.get(key)} and {theirs.get(key)}" for key in differing)
        notes.append(f"the runs' environments differ ({text}): times are not compared")
    alike = _release(ours) == _release(theirs) and bool(ours.get("gpu")) == bool(theirs.get("gpu"))
    if not alike:
        notes.append("neither are bytes and operations: another kind of device, or another torch")
    changes: list[Change] = []
    before, after = _by_key(base.rows), _by_key(head.rows)
    firsts = {row.key: row.contender for row in reversed([*head.rows, *base.rows])}
    for key in dict.fromkeys([*before, *after]):
        name, old, new = f"{key[0]}: {key[1]}, {key[2]}, {key[3]}", before.get(key), after.get(key)
        if old is None:
            changes.append(Change("rows", name, None, None, ONLY_HEAD))
        elif new is None:
            verdict = ONLY_BASE if limits.allow_missing else REGRESSION
            changes.append(Change("rows", name, None, None, verdict, note=ONLY_BASE))
        elif old.status != new.status:
            changes.append(_status_change(name, old, new))
        else:
            if alike and old.ours:  # a baseline's memory may change with torch
                for kind, pair in (("bytes", (old.peak_bytes, new.peak_bytes)), ("flops", (old.flops, new.flops))):
                    if kind in kinds:
                        changes += _counts(kind, name, *pair, limits)
            if not differing and "times" in kinds and firsts[old.key] != old.contender:
                changes += _ratio_change(name, old, new, limits.time_tolerance)
    return changes, notes


def _release(environment: Environment) -> list[str]:
    return str(environment.get("torch")).split(".")[:2]


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    return {(row.suite, row.case, row.contender, row.mode): row for row in rows}


def _counts(kind: str, name: str, old: int | None, new: int | None, limits: Limits) -> list[Change]:
    if old is None:
        return [] if new is None else [Change(kind, name, None, new, ONLY_HEAD, note="not counted")]
    if new is None:
        return [Change(kind, name, old, None, REGRESSION, note="not counted")]
    return [judge(kind, name, old, new, limits.tolerance)]


def _status_change(name: str, old: Row, new: Row) -> Change:
    note = f"{old.status} -> {new.status}"
    if old.ours and (old.measured or old.predicted) and not (new.measured or new.predicted):
        return Change("rows", name, None, None, REGRESSION, note=note)
    return Change("rows", name, None, None, IMPROVED if old.ours and new.measured else NOT_COMPARED, note=note)


def _ratio_change(name: str, old: Row, new: Row, tolerance: float) -> list[Change]:
    """A baseline's ratio to our first row: if it shrank, we got slower. Another row of ours: if its ratio grew, it got slower."""
    before, after = old.ratio, new.ratio
    if before is None or after is None:
        return []
    shrank, grew = after.high < before.low * (1 - tolerance), after.low > before.high * (1 + tolerance)
    worse, better = (
        (grew, shrank) if old.ours else (shrank, grew)
    )  # another of our rows relative to our first: less is better
    verdict = REGRESSION if worse else IMPROVED if better else UNCHANGED
    note = "times ours over our first" if old.ours else "times theirs over ours"
    limit = tolerance if old.ours else -tolerance
    change = after.median / before.median - 1
    return [Change("ratio", name, before.median, after.median, verdict, change, limit, note)]


def count(changes: Iterable[Change], verdict: str) -> int:
    return sum(change.verdict == verdict for change in changes)


def summary(changes: Sequence[Change]) -> str:
    """One line."""
    parts = [f"{number} {verdict}" for verdict in ORDER if (number := count(changes, verdict))]
    return f"{len(changes)} quantities: {', '.join(parts) or 'none'}"


def to_json(changes: Sequence[Change], notes: Sequence[str], base: str, head: str) -> dict[str, object]:
    """The whole comparison."""
    rows = [asdict(change) for change in _sorted(changes)]
    return {"base": base, "head": head, "rows": rows, "regressions": count(changes, REGRESSION), "notes": list(notes)}


def table(changes: Sequence[Change]) -> str:
    """All changed quantities, the regressions first; "" if there are none."""
    rows = [
        [
            f"{change.kind}: {change.quantity}",
            _number(change.base),
            _number(change.head),
            _percent(change.change),
            _percent(change.limit),
            change.verdict + (f" ({change.note})" if change.note else ""),
        ]
        for change in _sorted(changes)
        if change.verdict != UNCHANGED
    ]
    return text_table(["quantity", "base", "head", "change", "limit", "verdict"], rows) if rows else ""


def _sorted(changes: Sequence[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: (ORDER.index(change.verdict), -abs(change.change or 0)))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if not float(value).is_integer() else f"{int(value):,}".replace(",", " ")


def _percent(value: float | None) -> str:
    return "–" if value is None else percent(value)
