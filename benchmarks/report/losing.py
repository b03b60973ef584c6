"""Where we lose, from the rows of a benchmark result: slower, larger, longer to start, or not running at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sfm_fast.units import duration, memory, times

from ..rows import Result, Row, groups, rivals

HEADER = ("what", "ours", "theirs", "factor")
NOTHING_LOST = "Nothing to list: in no case was another contender surely faster, smaller, or quicker to start."
NOTHING_RUN = "Nothing was run, so nothing is known of times and first calls. What micro-batches cost in operations stands in the rows."
_SAME = 0.01  # memory that differs by less is the same
Cells = tuple[str, ...]
Group = list[Row]


@dataclass(frozen=True)
class Losses:
    """One kind of loss: a heading, one line of explanation, and its rows with `HEADER`, the worst first."""

    kind: str
    explanation: str
    rows: list[Cells]


def losses(result: Result) -> list[Losses]:
    """Every kind that has rows; empty where nothing was lost."""
    # Ours is first in a case; a case without ours, such as LGM's ways to load images, can't be a loss.
    ours = [group for group in groups(result.rows) if group[0].ours]
    kinds = []
    for kind, explanation, entries in _KINDS:
        rows = sorted(entries(ours), key=lambda entry: -entry[0])
        if rows:
            kinds.append(Losses(kind, explanation, [cells for _, cells in rows]))
    return kinds


def words(result: Result) -> str:
    """The text if `losses` finds none."""
    return NOTHING_RUN if result.only_predicted else NOTHING_LOST


def factor_of(row: Row) -> str:
    """The row's time over the first contender's, with its interval if it has one; 1x for the first itself."""
    spread = row.ratio
    if spread is None:
        return ""
    if spread.low == spread.high == spread.median == 1:
        return "1x"
    open_ended = row.rounds == 1 or spread.high == float("inf")  # too few rounds for an interval
    return times(spread.median) if open_ended else times(spread.median, spread.low, spread.high)


def _what(row: Row) -> str:
    return f"{row.suite}: {row.case}, {row.mode}"


def _sides(write: Callable[[float], str], name: str, *rows: Row) -> list[str]:
    return [f"{row.contender}: {write(getattr(row, name))}" for row in rows]


def _not_running(ours: Sequence[Group]) -> Iterator[tuple[float, Cells]]:
    for first, *rest in ours:
        others = [row for row in rivals(rest) if row.measured]
        if others and not first.measured and not first.predicted:
            theirs = _sides(duration, "median", min(others, key=lambda row: row.seconds))
            yield 0.0, (_what(first), f"{first.contender}: {first.status}", *theirs, "")


def _slower(ours: Sequence[Group]) -> Iterator[tuple[float, Cells]]:
    for first, *rest in ours:
        for row in rivals(rest):
            spread = row.ratio
            # The interval must be on one side of 1: a median below 1 with an interval around 1 is a draw.
            if row.measured and first.measured and spread is not None and spread.high < 1:
                inverse = [1 / max(value, 1e-12) for value in (spread.median, spread.high, spread.low)]
                yield inverse[0], (_what(row), *_sides(duration, "median", first, row), times(*inverse))


def _micro_batches(ours: Sequence[Group]) -> Iterator[tuple[float, Cells]]:
    seen: set[tuple[float, float]] = set()  # one measurement is on every axis of the scaling suite
    for group in ours:
        steps = [row for row in group if row.measured and row.ours and row.micro_batch is not None]
        whole = next((row for row in steps if not row.micro_batched), None)
        for row in steps:
            if whole is None or whole.p80 is None or row.p20 is None or not row.micro_batched:
                continue
            factor, surely, written = row.seconds / whole.seconds, row.p20 > whole.p80, ""
            if whole is group[0] and row.ratio is not None and row.ratio.high < float("inf"):
                factor, surely, written = row.ratio.median, row.ratio.low > 1, factor_of(row)
            if surely and (row.seconds, whole.seconds) not in seen:
                seen.add((row.seconds, whole.seconds))
                yield factor, (_what(row), *_sides(duration, "median", row, whole), written or times(factor))


def _first_call(ours: Sequence[Group]) -> Iterator[tuple[float, Cells]]:
    worst: dict[tuple[str, str], tuple[float, Cells]] = {}
    for first, *rest in ours:
        others = [row for row in rivals(rest) if row.first_seconds and not row.compiled]
        if not others or not first.first_seconds:
            continue
        best = min(others, key=lambda row: row.first_seconds or 0.0)
        factor = first.first_seconds / (best.first_seconds or 1.0)
        key = first.suite, first.case
        if factor > max(1.0, worst[key][0] if key in worst else 0.0):
            worst[key] = factor, (_what(first), *_sides(duration, "first_seconds", first, best), times(factor))
    yield from worst.values()


def _more_memory(ours: Sequence[Group]) -> Iterator[tuple[float, Cells]]:
    for first, *rest in ours:
        for row in rivals(rest):
            counted, both = first.predicted and row.predicted, first.measured and row.measured
            own, other = first.peak_bytes, row.peak_bytes
            if own is None or other is None or not (counted or both):
                continue
            if own >= (1 + _SAME) * other and own != other:
                factor = own / other if other else float("inf")
                more = (f"{times(factor)}, " if other else "") + f"{memory(own - other)} more"
                what = _what(row) + (" (predicted)" if counted else "")
                yield factor, (what, *_sides(memory, "peak_bytes", first, row), more)


_KINDS: tuple[tuple[str, str, Callable[[Sequence[Group]], Iterator[tuple[float, Cells]]]], ...] = (
    ("Not running", "Ours gave no result where another did; the fastest of the others.", _not_running),
    (
        "Slower",
        "Another contender is faster, and the whole 95 % interval of the ratio says so. Fixed costs of a call decide small shapes.",
        _slower,
    ),
    (
        "Micro-batches against one shot",
        "The price of less memory: a micro-batched step runs the forward pass twice, and small batches use the machine less well. "
        "It is compared with our own one-shot step.",
        _micro_batches,
    ),
    (
        "First call",
        "Our first call in a process (loading, warm-up, compiling, tuning) takes longer than that of the quickest contender that isn't compiled. "
        "One call each, so no interval; of a case's modes the worst is named.",
        _first_call,
    ),
    (
        "More memory",
        "Another contender needs less memory at its peak beyond what stood before the call, by more than 1 %.",
        _more_memory,
    ),
)
