"""The rows of a benchmark result (contender, case, outcome), the claims made from them, and their JSON files."""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sfm_fast.errors import InputError
from sfm_fast.files import parse_json
from sfm_fast.measure.timing import Ratio, Timing
from sfm_fast.schema import check

from .machine import Environment

FORMAT = "sfm_fast bench 2"
STANDING = (
    "parameters",
    "pyramid",
    "adam",
)  # allocated before a step and kept after it; a step's own memory is the rest
SIGN_TEST, BOOTSTRAP = "sign test", "bootstrap"  # the kinds of interval that a result's ratios have
_MOST = 1e30  # above all seconds, bytes and operations, but small enough to compute with


@dataclass
class Row:
    """One contender in one mode of a case. Seconds, bytes and operations are per call; None: not measured, or not known.

    status: "ok" (it has times), "predicted" (memory and operations counted, nothing run), or the reason why it has no times.
    ours: this package's method, not a baseline. compiled: its first call compiles, so its time can't be compared. micro_batch:
    images per backward pass of a step. ratio: time relative to the case's first contender, round by round.
    """

    suite: str
    case: str
    contender: str = ""
    mode: str = ""
    status: str = "ok"
    ours: bool = False
    compiled: bool = False
    # Measured values.
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int | None = None
    ratio: Ratio | None = None
    first_seconds: float | None = None
    images_per_second: float | None = None
    graph_microseconds: float | None = None  # of a single call in a CUDA graph, with a cold cache
    graph50_microseconds: float | None = None  # of one of 50 calls in a graph
    peak_bytes: int | None = None  # beyond the memory allocated before the call
    cpu_share: float | None = (
        None  # on a CPU: part of the measurement in which the measuring thread computed; below 0.7 the machine was busy
    )
    absolute_bytes: int | None = None  # all memory of the process at that peak
    saved_bytes: int | None = None  # kept between the forward and the backward pass, beyond inputs and weights
    extra_bytes: int | None = None  # the peak beyond inputs and results
    # Counted or predicted values.
    predicted_bytes: int | None = None
    host_bytes: int | None = None
    by_category: dict[str, int] | None = None
    flops: int | None = None
    # The machine's rates measured with the case, and the share of them that the call reached.
    copy_bandwidth: float | None = None
    matmul_rate: float | None = None
    tf32_rate: float | None = None
    bf16_rate: float | None = None
    matmul_ceiling: str | None = None  # the rate of which this is the share, if not matmul_rate
    copy_fraction: float | None = None
    matmul_fraction: float | None = None
    # The case's numbers.
    alignment: str | None = None
    classes: int | None = None
    dim: int | None = None
    ipc: int | None = None
    dtype: str | None = None
    precision: str | None = None
    backbone: str | None = None
    image_size: int | None = None
    images: int | None = None
    views: int | None = None
    steps: int | None = None
    micro_batch: int | None = None
    channels: int | None = None
    canvas: int | None = None
    size: int | None = None
    varied: str | None = None  # of the scaling suite: the number that the case varies, and its value
    value: int | None = None
    workers: int | None = None
    file_bytes: int | None = None
    file_type: str | None = None
    commit: str | None = None

    @property
    def timing(self) -> Timing | None:
        """The times of a measured row; None for any other."""
        if self.status != "ok" or self.median is None or self.p20 is None or self.p80 is None:
            return None
        return Timing(self.median, self.p20, self.p80, self.rounds or 0)

    @property
    def seconds(self) -> float:
        """The median of a measured row; NaN for any other."""
        return math.nan if self.status != "ok" or self.median is None else self.median

    @property
    def measured(self) -> bool:
        return self.status == "ok"

    @property
    def predicted(self) -> bool:
        return self.status == "predicted"

    @property
    def lacks_memory(self) -> bool:
        return self.status.startswith("out of memory")

    @property
    def micro_batched(self) -> bool:
        """Whether a step takes several backward passes."""
        return self.micro_batch is not None and self.images is not None and self.micro_batch < self.images

    @property
    def predicted_total(self) -> int | None:
        """Predicted peak of all memory, for a predicted row or one with a prediction next to its measurement."""
        if not self.predicted:
            return self.predicted_bytes
        return self.peak_bytes if self.absolute_bytes is None else self.absolute_bytes

    @property
    def predicted_delta(self) -> int | None:
        """Predicted peak beyond the memory allocated before the step; None if the row doesn't have that."""
        if self.predicted and self.absolute_bytes is not None and self.peak_bytes is not None:
            return self.peak_bytes
        total, parts = self.predicted_total, self.by_category
        if total is None or parts is None or not all(name in parts for name in STANDING):
            return None
        return total - sum(parts[name] for name in STANDING)

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for rows that were measured against each other."""
        return self.suite, self.case, self.mode

    def take(self, timing: Timing) -> None:
        self.median, self.p20, self.p80, self.rounds = timing.median, timing.p20, timing.p80, timing.rounds

    def to_json(self) -> dict[str, object]:
        """The known values, for JSON; the open end of an interval of too few rounds is null."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        if self.ratio is not None and math.isinf(self.ratio.high):
            known["ratio"] = {**asdict(self.ratio), "high": None}
        return known


@dataclass
class Result:
    """The results of a preset's suites on one machine. ``interval``: the kind of interval of the ratios."""

    preset: str
    environment: Environment
    rows: list[Row] = field(default_factory=list)
    interval: str = SIGN_TEST

    def to_json(self) -> dict[str, object]:
        return {"format": FORMAT, "preset": self.preset, "interval": self.interval, "environment": self.environment,
                "rows": [row.to_json() for row in self.rows]}  # fmt: skip

    @property
    def only_predicted(self) -> bool:
        """Whether the result has predictions and nothing that was run."""
        return any(row.predicted for row in self.rows) and not any(row.measured for row in self.rows)


def _amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _ratio_part(value: object) -> bool:
    return _amount(value) and bool(value)


@dataclass
class Claim:
    """One figure of a contender against the paper's claim and our goal. kind: "measured", "predicted" or "counted". measured: the figure or None.

    stands_for: "paper" or "goal" if missing that is an error. scores: top-1 per seed, of a claim on accuracy.
    """

    claim: str
    setting: str
    contender: str
    measured: float | None
    kind: str
    unit: str
    paper: float | None = None
    goal: float | None = None
    stands_for: str = ""
    standard_error: float | None = None
    scores: list[float] | None = None
    lgm_scores: list[float] | None = None

    @property
    def met_paper(self) -> bool | None:
        return self._meets(self.paper)

    @property
    def met_goal(self) -> bool | None:
        return self._meets(self.goal)

    def _meets(self, wanted: float | None) -> bool | None:
        return None if wanted is None else self.measured is not None and self.measured >= wanted

    def to_json(self) -> dict[str, object]:
        optional = ("standard_error", "scores", "lgm_scores")
        known = {name: value for name, value in asdict(self).items() if value is not None or name not in optional}
        return known | {"met_paper": self.met_paper, "met_goal": self.met_goal}


_NUMBER, _NUMBERS = (float, None), ([float], None)
_CLAIM = {
    "claim": _text, "setting": _text, "contender": _text, "measured": _NUMBER, "kind": _text, "unit": str, "paper": _NUMBER,
    "goal": _NUMBER, "stands_for": str, "standard_error?": _NUMBER, "scores?": _NUMBERS, "lgm_scores?": _NUMBERS,
}  # fmt: skip


def read_claims(path: str | os.PathLike[str]) -> list[Claim]:
    """The claims in the JSON file ``path``. Raises ``InputError`` with the file and the fault in it."""
    content = check(path, _read_json(path), {"claims": [_CLAIM]}, "claims")
    names = [one.name for one in fields(Claim)]
    return [Claim(**{name: one[name] for name in names if name in one}) for one in content["claims"]]


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were measured against each other: of one suite, case and mode, the first contender's row first."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.key, []).append(row)
    return list(grouped.values())


def rivals(group: Iterable[Row]) -> list[Row]:
    """The baselines of a group."""
    return [row for row in group if not row.ours]


_RATIO = {"median": _ratio_part, "low": _amount, "high": (_amount, None)}
_SPECS: dict[object, object] = {
    str: _text, bool: bool, int | None: (_amount, None), float | None: (_amount, None), str | None: (_text, None),
    Ratio | None: (_RATIO, None), dict[str, int] | None: ({str: _amount}, None),
}  # fmt: skip


def _row_spec() -> dict[str, object]:
    hints = typing.get_type_hints(Row)
    needed = ("suite", "case", "contender", "mode", "status", "ours", "compiled")
    return {name if name in needed else f"{name}?": _SPECS[hint] for name, hint in hints.items()}


SPEC: dict[str, object] = {
    "format": lambda value: value == FORMAT,
    "preset": _text,
    "interval": lambda value: value in (SIGN_TEST, BOOTSTRAP),
    "environment": {str: (str, int, float, bool, None)},
    "rows": [_row_spec()],
}
_NAMES = {one.name for one in fields(Row)}


def read_result(path: str | os.PathLike[str]) -> Result:
    """The result in the JSON file ``path``. Raises ``InputError`` with the file and the fault in it."""
    value = _read_json(path)
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise InputError(f"{path}: key 'format': wanted {FORMAT!r}, got {value.get('format')!r}")
    content = check(path, value, SPEC, "benchmark result")
    rows = [_row(one, f"{path}: damaged benchmark result (rows[{place}]") for place, one in enumerate(content["rows"])]
    return Result(content["preset"], content["environment"], rows, content["interval"])


def _read_json(path: str | os.PathLike[str]) -> object:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from error
    try:
        value: object = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON ({error})") from error
    return value


def _row(value: Mapping[str, typing.Any], where: str) -> Row:
    if unknown := value.keys() - _NAMES:
        raise InputError(f"{where}: {min(unknown)!r:.60} is no part of a row)")
    row = Row(**value)
    if row.measured and row.timing is None:
        missing = next(name for name in ("median", "p20", "p80") if value.get(name) is None)
        raise InputError(f"{where} has no {missing}, though its status is ok)")
    if isinstance(ratio := value.get("ratio"), dict):
        row.ratio = Ratio(ratio["median"], ratio["low"], math.inf if ratio["high"] is None else ratio["high"])
    return row
