"""What got worse: one quantity of a base and a head judged, two result files compared, and the table that says so.

Deterministic quantities have a tight limit. Times of two separate runs never meet: a result file holds ratios to baselines of the
same run, and only these are compared. (Two commits are timed together, in turn: `compare_times`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sfm_fast.errors import InputError
from sfm_fast.gate.gate import FELL_TO_NOTHING
from sfm_fast.report.tables import text_table

from .report.rows import is_ours

REGRESSION, INCONCLUSIVE, UNCHANGED, IMPROVED = "regression", "inconclusive", "unchanged", "improved"
ONLY_BASE, ONLY_HEAD, DIFFERS, NOT_COMPARED = "only in base", "only in head", "results differ", "not compared"
ORDER = (REGRESSION, INCONCLUSIVE, DIFFERS, ONLY_BASE, NOT_COMPARED, ONLY_HEAD, IMPROVED, UNCHANGED)
KINDS = ("bytes", "flops", "instructions", "kernels", "times")
COUNTED = ("bytes", "flops", "instructions")  # of which a side has none only where its work isn't counted
UNITS = {"times": "s", "bytes": "bytes", "library": "bytes"}


@dataclass(frozen=True)
class Limits:
    """What may get worse without being a regression: fractions, 0.01 for 1 %. ``allow_missing``: a row only the base has may go."""

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
    """One quantity. ``change``: head over base, less 1; for times of the ratio of both in the same rounds. ``limit`` as change."""

    kind: str
    quantity: str
    base: float | None
    head: float | None
    verdict: str
    change: float | None = None
    limit: float | None = None
    note: str = ""


def judge(
    kind: str,
    quantity: str,
    base: float,
    head: float,
    tolerance: float,
    *,
    slack: float = 0,
    more_is_worse: bool = True,
) -> Change:
    """Worse by more than ``tolerance`` (a fraction) of the base and ``slack`` (absolute) is a regression; so is a count of nothing."""
    allowed = tolerance * abs(base) + slack
    worse = head - base if more_is_worse else base - head
    verdict = REGRESSION if worse > allowed else IMPROVED if worse < -allowed else UNCHANGED
    note = ""
    if kind in COUNTED and bool(base) != bool(head):  # of no use as a measure, in whichever direction
        verdict, note = REGRESSION, FELL_TO_NOTHING
    change = (head - base) / base if base else (0.0 if head == base else None)
    limit = (allowed if more_is_worse else -allowed) / base if base else 0.0
    return Change(kind, quantity, base, head, verdict, change, limit, note)


def judge_all(
    kind: str, base: dict[str, float | str], head: dict[str, float | str], limits: Limits, **options: Any
) -> list[Change]:
    """Two measurements of one kind; a text instead of a number says why there is none."""
    found = []
    for name in dict.fromkeys([*base, *head]):
        before, after = base.get(name, "not there"), head.get(name, "not there")
        if not isinstance(before, str) and not isinstance(after, str):
            found.append(judge(kind, name, before, after, limits.tolerance, **options))
        elif not isinstance(before, str):
            gone = name not in head
            verdict = ONLY_BASE if gone and limits.allow_missing else REGRESSION
            found.append(Change(kind, name, before, None, verdict, note=str(after)))
        elif not isinstance(after, str):
            found.append(Change(kind, name, None, after, ONLY_HEAD, note=before))
        else:
            found.append(Change(kind, name, None, None, NOT_COMPARED, note=after))
    return found


def compare_files(
    base: dict[str, Any], head: dict[str, Any], limits: Limits, kinds: Sequence[str] = KINDS
) -> tuple[list[Change], list[str]]:
    """Two result files, as `read_result` gives them: every quantity judged, and what is to be said about the comparison itself."""
    if base["preset"] != head["preset"]:
        raise InputError(f"two presets can't be compared: {base['preset']} and {head['preset']}")
    ours, theirs = base["environment"], head["environment"]
    differing = [key for key in ("cpu", "gpu", "torch", "threads") if ours.get(key) != theirs.get(key)]
    notes = []
    if differing:
        text = "; ".join(f"{key} {ours.get(key)} and {theirs.get(key)}" for key in differing)
        notes.append(f"the runs' environments differ ({text}): times are not compared")
    alike = _release(ours) == _release(theirs) and bool(ours.get("gpu")) == bool(theirs.get("gpu"))
    if not alike:
        notes.append("neither are bytes and operations: another kind of device, or another torch")
    found = []
    before, after = _by_key(base["rows"]), _by_key(head["rows"])
    for key in dict.fromkeys([*before, *after]):
        name, old, new = _name(key), before.get(key), after.get(key)
        if old is None:
            found.append(Change("rows", name, None, None, ONLY_HEAD))
        elif new is None:
            found.append(
                Change("rows", name, None, None, ONLY_BASE if limits.allow_missing else REGRESSION, note=ONLY_BASE)
            )
        elif old["status"] != new["status"]:
            found.append(_status_change(name, old, new))
        else:
            for kind, field in (("bytes", "peak_bytes"), ("flops", "flops")):
                # What a baseline takes is no concern of ours; torch changes it.
                if alike and kind in kinds and is_ours(key[2]):
                    before_it, after_it = (_counted(name, row.get(field)) for row in (old, new))
                    judged = judge_all(kind, before_it, after_it, limits)
                    found += [each for each in judged if each.verdict != NOT_COMPARED]
            if not differing and "times" in kinds and not (old["first"] or new["first"]):
                found += _ratio_change(name, old, new, limits.time_tolerance)
    return found, notes


def _counted(name: str, value: float | None) -> dict[str, float | str]:
    return {name: "not counted" if value is None else value}


def _release(environment: dict[str, Any]) -> list[str]:
    return str(environment.get("torch")).split(".")[:2]


Key = tuple[str, str, str, str]


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Rows by what identifies them; ``first`` marks ours, the one that ratios are over."""
    found: dict[Key, dict[str, Any]] = {}
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        group = (row["suite"], row["case"], row["mode"])
        found[row["suite"], row["case"], row["contender"], row["mode"]] = {**row, "first": group not in seen}
        seen.add(group)
    return found


def _name(key: Key) -> str:
    return f"{key[0]}: {key[1]}, {key[2]}, {key[3]}"


def _status_change(name: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    note = f"{old['status']} -> {new['status']}"
    ours = is_ours(old["contender"])
    if ours and old["status"] in ("ok", "predicted") and new["status"] not in ("ok", "predicted"):
        return Change("rows", name, None, None, REGRESSION, note=note)
    better = ours and new["status"] == "ok"
    return Change("rows", name, None, None, IMPROVED if better else NOT_COMPARED, note=note)


def _ratio_change(name: str, old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Change]:
    """Of theirs over our first: where it shrank, we got slower beside the same baseline. Of another of ours: where it grew."""
    before, after = old.get("ratio"), new.get("ratio")
    if not before or not after:
        return []
    change = after["median"] / before["median"] - 1
    shrank, grew = after["high"] < before["low"] * (1 - tolerance), after["low"] > before["high"] * (1 + tolerance)
    if is_ours(old["contender"]):  # another way of ours beside our first: less is better
        verdict = REGRESSION if grew else IMPROVED if shrank else UNCHANGED
        limit, note = tolerance, "times ours over our first"
    else:
        verdict = REGRESSION if shrank else IMPROVED if grew else UNCHANGED
        limit, note = -tolerance, "times theirs over ours"
    return [Change("ratio", name, before["median"], after["median"], verdict, change, limit, note)]


def count(changes: Iterable[Change], verdict: str) -> int:
    return sum(change.verdict == verdict for change in changes)


def summary(changes: Sequence[Change]) -> str:
    """One line."""
    parts = [f"{number} {verdict}" for verdict in ORDER if (number := count(changes, verdict))]
    return f"{len(changes)} quantities: {', '.join(parts) or 'none'}"


def result_of(changes: Sequence[Change], **facts: Any) -> dict[str, Any]:
    """The whole result, for JSON."""
    rows = [asdict(change) for change in _sorted(changes)]
    return {
        "rows": rows,
        "regressions": count(changes, REGRESSION),
        "inconclusive": count(changes, INCONCLUSIVE),
        **facts,
    }


def table(changes: Sequence[Change]) -> str:
    """Everything that isn't unchanged, the regressions first; "" where there is nothing."""
    rows = [
        [
            f"{change.kind}: {change.quantity}",
            _number(change.kind, change.base),
            _number(change.kind, change.head),
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


def _number(kind: str, value: float | None) -> str:
    if value is None:
        return "–"
    if kind == "times":
        return f"{1e3 * value:.3f} ms"
    return (
        f"{value:.3g}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}".replace(",", " ")
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"
