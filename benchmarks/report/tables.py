"""Benchmark results as tables, Markdown and CSV: every row of every suite, where we lose, claims, and the smaller tables of the README."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sfm_fast.measure.starvation import ENOUGH
from sfm_fast.report.tables import text_table
from sfm_fast.units import digits, duration, megabytes, memory, milliseconds

from ..machine import Environment
from ..registry import suites
from ..rows import SIGN_TEST, Claim, Result, Row, groups
from .losing import HEADER as LOSING_HEADER
from .losing import factor_of, losses, words

_NO_ROWS = "This result has no measured row: nothing ran to its end, see the status of each row."
_PREDICTED = "Predicted, not measured: nothing of this result was run."
_LEGEND = (
    "ms: median time of a call, with the 20th and 80th percentile. Modes: both is forward + backward, step one step, steps five in a row. "
    "x first: time over the case's first contender's (ours, where ours takes part): the median of the rounds' ratios, not the quotient of the medians, with its 95 % "
    "{interval}. Of ceiling: share of the copy or matrix-product rate "
    "measured in the same run (above 100 %: what stays in the caches, or a kernel quicker than torch's product). Memory: peak beyond what stood before the call; "
    "saved: kept between forward and backward; absolute: everything the process held at that peak, other contenders' tensors too. images/s: synthetic images, in loading real ones. First call: at this size, with compiling and tuning; of a whole process: start-up."
)
_INTERVALS = {
    True: "interval by the sign test, which fewer than 6 rounds don't have",
    False: "bootstrap interval, which with fewer than 6 rounds is no more than their range",
}
_STATUS_LENGTH = 160  # a failure can have a whole traceback, which is complete in the CSV


@dataclass(frozen=True)
class Table:
    """Cells as plain text, not escaped yet."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def legend(result: Result) -> str:
    return _LEGEND.format(interval=_INTERVALS[result.interval == SIGN_TEST]) + _busy(result)


def _busy(result: Result) -> str:
    """A sentence about cases that were measured while other processes used the CPUs; empty if there is none."""
    known = [row for row in result.rows if row.cpu_share is not None and not row.workers]
    cases = {(row.suite, row.case) for row in known}
    busy = sorted({f"{row.suite}: {row.case}" for row in known if row.cpu_share is not None and row.cpu_share < ENOUGH})
    if not busy:
        return ""
    return (
        f" **The machine was busy** in {len(busy)} of {len(cases)} cases: the measuring thread computed in less than {ENOUGH:.0%} of their time, so "
        f"their ratios are less certain ({', '.join(busy[:5])}{', …' if len(busy) > 5 else ''})."
    )


def status(row: Row) -> str:
    """The row's status in one line of bounded length."""
    text = " ".join(row.status.split())
    return text if len(text) <= _STATUS_LENGTH else text[: _STATUS_LENGTH - 1] + "…"


def suite_tables(rows: Iterable[Row]) -> list[Table]:
    """One table per suite that has rows, known suites first; empty columns are left out."""
    rows, known = list(rows), suites()
    tables = []
    for name in dict.fromkeys([*known, *(row.suite for row in rows)]):
        cells = [_cells(row) for row in rows if row.suite == name]
        if cells:
            header = tuple(column for column in cells[0] if any(row[column] for row in cells))
            title = known[name].title if name in known else name
            tables.append(Table(title, header, [tuple(row[column] for column in header) for row in cells]))
    return tables


def _written(value: float | None, write: Callable[[float], str] = str) -> str:
    return "" if value is None else write(value)


def _cells(row: Row) -> dict[str, str]:
    """Every column of a row in the full tables."""
    timing = row.timing
    return {
        "case": row.case,
        "contender": row.contender,
        "mode": row.mode,
        "ms": status(row) if timing is None else milliseconds(timing.median),
        "p20–p80": "" if timing is None else f"{milliseconds(timing.p20)}–{milliseconds(timing.p80)}",
        "rounds": "" if timing is None else _written(row.rounds),
        "x first": "" if timing is None else factor_of(row),
        "of ceiling": "" if timing is None else ceiling(row),
        "images/s": images_a_second(row),
        "memory": "" if row.predicted else _written(row.peak_bytes, memory),
        "saved": _written(row.saved_bytes, memory),
        "absolute": "" if row.predicted else _written(row.absolute_bytes, memory),
        "predicted memory": _written(row.predicted_delta, memory),
        "predicted absolute": _written(row.predicted_total, memory),
        "GFLOP": _written(row.flops, lambda count: digits(count / 1e9)),
        "first call": _written(row.first_seconds, duration),
    }


def ceiling(row: Row) -> str:
    """The share of the limiting ceiling, the larger share: "copy 12 %" or "matmul 45 %"."""
    both = ((row.copy_fraction, "copy"), (row.matmul_fraction, "matmul"))
    shares = [(share, name) for share, name in both if share is not None]
    if not shares:
        return ""
    share, name = max(shares)
    return f"{name} {100 * share:.{0 if share >= 0.01 else 1}f} %"


def images_a_second(row: Row) -> str:
    """Throughput of a measured row of whole steps or of loading; empty elsewhere."""
    steps = row.suite in ("step", "backbones", "loading", "scaling")
    count = (row.images or 0) * (row.steps or 1)
    return digits(count / row.seconds) if steps and row.measured and count and row.seconds else ""


def warning(result: Result) -> str:
    """The warning about a result without a measured row; empty if there is one."""
    if any(row.measured for row in result.rows):
        return ""
    return _PREDICTED if result.only_predicted else _NO_ROWS


def hardware(environment: Environment) -> str:
    """The machine in a few words: the GPU if one was used, else the CPU, its cores and threads."""
    threads, cpu = environment.get("threads"), environment.get("cpu") or "CPU not recorded"
    counted = f", {threads} thread{'' if threads == 1 else 's'}" if threads is not None else ""
    if environment.get("gpu"):
        return f"{environment['gpu']} (host: {cpu}{counted})"
    cores = f", {environment['cores']} cores" if environment.get("cores") is not None else ""
    return f"{cpu}{cores}{counted}"


def describe(result: Result) -> str:
    """Hardware, versions and number format in one sentence."""
    environment = result.environment
    told = [
        f"torch {environment.get('torch')}",
        f"triton {environment.get('triton')}",
        f"python {environment.get('python')}",
    ]
    commit = f" at commit {environment['commit']}" if environment.get("commit") else ""
    changed = " with uncommitted changes" if environment.get("dirty") else ""
    own = f"sfm_fast {environment.get('sfm_fast') or 'of unknown version'}{commit}{changed}"
    known = [text for text in told if not text.endswith(" None")]
    return f"{hardware(environment)}; {', '.join([*known, own])}; {dtypes(result.rows)}."


def dtypes(rows: Iterable[Row]) -> str:
    """The number formats of the rows, or a text that they have none."""
    long = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    names = {row.dtype or row.precision for row in rows} - {None}
    return ", ".join(sorted({long.get(str(name), str(name)) for name in names})) or "dtype not recorded"


def environment_rows(result: Result) -> list[tuple[str, str]]:
    """The machine and the versions of the result, name by name."""
    rows = [("preset", result.preset)]
    for name, value in result.environment.items():
        if name == "dirty":
            rows.append(("uncommitted changes", "yes" if value else "no"))
        elif name.endswith("_bytes") and isinstance(value, int | float):
            rows.append((name.removesuffix("_bytes"), memory(value)))
        elif value is not None:
            rows.append((name, str(value)))
    return rows


# --- Markdown and CSV --------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    # A | would end the cell, a < would start raw HTML, and a line break would end the row.
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return text_table(header, [[_cell(text) for text in row] for row in rows])


def markdown(result: Result) -> str:
    """All of one result: its machine, one table per suite, and where we lose."""
    parts = [f"# Benchmarks: {_cell(result.preset)}", _cell(describe(result)), legend(result)]
    if warning(result):
        parts.append(f"**{warning(result)}**")
    for table in suite_tables(result.rows):
        parts += [f"## {_cell(table.title)}", _markdown_table(table.header, table.rows)]
    return "\n\n".join([*parts, "## Where we lose", where_we_lose(result)]) + "\n"


def rows_table(rows: Iterable[Row]) -> str:
    """Any rows as full tables, one per suite."""
    return "\n\n".join(_markdown_table(table.header, table.rows) for table in suite_tables(rows))


def where_we_lose(result: Result) -> str:
    """What is slower, larger or longer to start than another contender, kind by kind, the worst first; or a text that nothing is."""
    parts = []
    for kind in [] if result.only_predicted else losses(result):
        parts += [f"**{kind.kind}.** {kind.explanation}", _markdown_table(LOSING_HEADER, kind.rows)]
    return "\n\n".join(parts) or words(result)


def csv_text(*results: Result) -> str:
    """Every row of every result as a line of CSV, with its preset; ``ratio`` becomes ratio_median, ratio_low and ratio_high, other objects likewise.

    Columns: those of every result, then all other keys by name. Missing values are empty.
    """
    first = (
        "preset", "suite", "case", "contender", "mode", "status", "median", "p20", "p80", "rounds", "ratio_median", "ratio_low",
        "ratio_high", "first_seconds", "peak_bytes", "absolute_bytes", "flops", "copy_fraction", "matmul_fraction",
    )  # fmt: skip
    rows = [_flat({"preset": result.preset, **row.to_json()}) for result in results for row in result.rows]
    others = sorted({key for row in rows for key in row} - set(first))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *others], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}_")
        else:
            # A spreadsheet would read it as a formula.
            formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
            flat[prefix + key] = f"'{value}" if formula else value
    return flat


# --- the README's tables -----------------------------------------------------------------------------------------------


def loss_table(rows: Iterable[Row]) -> str:
    """Forward + backward of every contender on every shape: time, times the first, share of the ceiling, memory."""
    lines = []
    for row in rows:
        if row.mode != "both":
            continue
        several = f", ipc {row.ipc}" if (row.ipc or 1) > 1 else ""
        name = f"{row.alignment} {row.classes} x {row.dim}{several}" if row.alignment else row.case
        cells = [status(row), "", "", ""]
        if row.measured:
            cells = [milliseconds(row.seconds), factor_of(row), ceiling(row), _written(row.peak_bytes, megabytes)]
        lines.append([name, row.contender, *cells])
    return _markdown_table(("loss, C x D", "contender", "ms", "x ours", "of ceiling", "memory"), lines)


def image_table(rows: Iterable[Row]) -> str:
    """Every contender of the image path: forward, forward + backward, times the first, share of the ceiling, memory."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.contender), {})[row.mode] = row
    lines = []
    for (name, contender), modes in cases.items():
        some = next(iter(modes.values()))
        if some.canvas is not None:
            name = f"{some.images} x {some.channels} x {some.canvas}² to {some.size}², {some.dtype}"
        both, forward = modes.get("both", some), modes.get("forward")
        alone = "" if forward is None else milliseconds(forward.seconds) if forward.measured else status(forward)
        cells = [status(both), "", "", "", ""]
        if both.measured:
            sizes = (_written(size, megabytes) for size in (both.extra_bytes, both.peak_bytes))
            cells = [milliseconds(both.seconds), factor_of(both), ceiling(both), *sizes]
        lines.append([name, contender, alone, *cells])
    header = ("images", "contender", "forward ms", "both ms", "x ours", "of ceiling", "extra memory", "with results")
    return _markdown_table(header, lines)


def step_table(rows: Iterable[Row]) -> str:
    """Whole steps: time, images a second, memory beyond weights and state measured and predicted, each with its ratio to the first's."""
    every, lines = groups(rows), []
    for group in every:
        first = next((row for row in group if row.measured), None)
        for row in group:
            name = row.contender if len(every) == 1 else f"{row.case}, {row.mode}: {row.contender}"
            predicted = _written(row.predicted_delta, megabytes)
            if not row.measured or first is None:
                lines.append([name, status(row), "", "", "", predicted, ""])
                continue
            share = (
                f"{row.peak_bytes / first.peak_bytes:.2f}" if row.peak_bytes is not None and first.peak_bytes else ""
            )
            size = _written(row.peak_bytes, megabytes)
            lines.append(
                [name, milliseconds(row.seconds), factor_of(row), images_a_second(row), size, predicted, share]
            )
    header = ("one step", "ms", "time x", "images/s", "memory of a step", "predicted", "memory x")
    filled = [place for place in range(len(header)) if any(line[place] for line in lines)]
    return _markdown_table([header[place] for place in filled], [[line[place] for place in filled] for line in lines])


def backbone_table(rows: Iterable[Row]) -> str:
    """Forward and backward of each backbone, as loaded and prepared: time with the ratio's interval, and what is kept in between."""
    lines = []
    for prepared, loaded in (group for group in groups(rows) if len(group) == 2):
        batch = f"{prepared.images} x {prepared.image_size} px"
        if not (prepared.measured and loaded.measured):
            lines.append([prepared.backbone or "", batch, status(loaded), status(prepared), "", "", "", ""])
            continue
        sizes = [_written(row.saved_bytes, megabytes) for row in (loaded, prepared)]
        share = (prepared.saved_bytes or 0) / (loaded.saved_bytes or 1)
        lines.append(
            [prepared.backbone or "", batch, milliseconds(loaded.seconds), milliseconds(prepared.seconds), factor_of(loaded), *sizes, f"{share:.2f}"]
        )  # fmt: skip
    header = (
        "backbone",
        "images",
        "as loaded, ms",
        "prepared, ms",
        "faster by",
        "kept, as loaded",
        "kept, prepared",
        "share",
    )
    return _markdown_table(header, lines)


CLAIMS_HEADER = ("claim", "setting", "contender", "paper: at least", "own goal", "result", "how")


def claim_cells(claims: Iterable[Claim]) -> list[tuple[str, ...]]:
    """The cells of claims for `CLAIMS_HEADER`."""
    met = {None: "", True: " (met)", False: " (missed)"}
    return [
        (
            one.claim, one.setting, one.contender,
            *("" if wish is None else f"{wish:g}{met[reached]}" for wish, reached in ((one.paper, one.met_paper), (one.goal, one.met_goal))),
            _amount(one), one.kind,
        )
        for one in claims
    ]  # fmt: skip


def _amount(claim: Claim) -> str:
    """ "54.6x less memory", "-0.31 ± 0.12 points": three digits, and the standard error if there is one."""
    if claim.measured is None:
        return ""
    error = f" ± {claim.standard_error:.2g}" if claim.standard_error is not None else ""
    return f"{claim.measured:.3g}{error}{'' if claim.unit[:1] in ('', 'x') else ' '}{claim.unit}"


def claims_table(claims: Iterable[Claim]) -> str:
    """Each claim with the paper's figure, our goal, and what was measured, predicted or counted."""
    return _markdown_table(CLAIMS_HEADER, claim_cells(claims))
