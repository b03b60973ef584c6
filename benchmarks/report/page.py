"""The page of `sfm-fast bench`: claims, figures, tables and where we lose of one or several results, in one file."""

from __future__ import annotations

import base64
import importlib.util
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sfm_fast.errors import InputError
from sfm_fast.files import write_text
from sfm_fast.report import html

from ..rows import Claim, Result
from .drawing import Styles, styles_of
from .figures import Drawing, drawings
from .losing import HEADER as LOSING_HEADER
from .losing import losses, words
from .tables import (
    CLAIMS_HEADER,
    claim_cells,
    csv_text,
    describe,
    environment_rows,
    hardware,
    legend,
    markdown,
    suite_tables,
    warning,
)

_FOLDED = 30  # tables with more rows are closed at first


def write_page(path: str | os.PathLike[str], results: Sequence[Result], claims: Sequence[Claim] | None = None) -> None:
    """Write the page of ``results`` to ``path``, atomically: without scripts or requests, one section per result."""
    write_text(path, page_text(results, claims))


def write_all(folder: str | os.PathLike[str], stem: str, result: Result) -> Path:
    """Write ``stem``.md, .csv and .html of one result to ``folder``; returns the page's path, or without matplotlib the tables'."""
    write_text(Path(folder) / f"{stem}.md", markdown(result))
    write_text(Path(folder) / f"{stem}.csv", csv_text(result))
    if importlib.util.find_spec("matplotlib") is None:  # as on a machine that only measures
        return Path(folder) / f"{stem}.md"
    write_page(Path(folder) / f"{stem}.html", [result])
    return Path(folder) / f"{stem}.html"


def page_text(results: Sequence[Result], claims: Sequence[Claim] | None = None) -> str:
    """The page's HTML; equal input gives equal bytes."""
    if isinstance(results, Result) or not results:
        raise InputError("results: wanted a list of at least one benchmark result")
    styles = styles_of(results)
    sections = [] if claims is None else [("The claims", _claims(claims))]
    for place, result in enumerate(results):
        counted = ", predicted" if result.only_predicted else ""
        heading = f"{result.preset}{counted} on {hardware(result.environment)}"
        sections.append((heading, _section(result, styles, f"{place} {result.preset}")))
    lead = (
        "Time and memory of statistical flow matching and of linear gradient matching, and of each operation against plain torch: every contender "
        "checked for a right result first, then taken in turn in one run. What we lose stands here too."
    )
    return html.page("sfm_fast: benchmarks", lead, sections)


def _claims(claims: Sequence[Claim]) -> str:
    text = (
        "The paper's figures and our own goals beside what was found. Found how: measured in a run, predicted (memory counted without running), "
        "or counted (operations)."
    )
    cells = claim_cells(claims)
    return html.note(text) + (html.table(CLAIMS_HEADER, cells) if cells else html.note("No claim was checked."))


def _section(result: Result, styles: Styles, salt: str) -> str:
    parts = [html.note(describe(result))]
    if warning(result):
        parts.append(f"<p><strong>{escape(warning(result))}</strong></p>")
    figures = drawings(result, styles, salt)
    if figures:
        parts.append("<h3>Figures</h3>")
        parts += [_figure(one, f"{result.preset}-{place + 1}.svg") for place, one in enumerate(figures)]
    parts.append("<h3>Where we lose</h3>")
    lost = [] if result.only_predicted else losses(result)
    for kind in lost:
        parts.append(html.note(f"{kind.kind}. {kind.explanation}"))
        parts.append(_folded(html.table(LOSING_HEADER, kind.rows), kind.kind, len(kind.rows)))
    if not lost:
        parts.append(html.note(words(result)))
    tables = suite_tables(result.rows)
    if tables:
        parts += ["<h3>All rows</h3>", html.note(legend(result))]
    for table in tables:
        parts.append(_folded(html.table(table.header, table.rows), table.title, len(table.rows)))
    parts += ["<h3>Made on</h3>", html.table(("what", "value"), environment_rows(result))]
    parts.append(f"<h3>Make it again</h3>\n<p>{_command(result)}</p>")
    return "\n".join(parts)


def _figure(drawing: Drawing, name: str) -> str:
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    # A download inside the page, for papers, since browsers can't save a plot that is part of the page.
    data = base64.b64encode(f'<?xml version="1.0" encoding="utf-8"?>\n{drawing.svg}'.encode()).decode()
    link = f'<p class="note"><a download="{safe}" href="data:image/svg+xml;base64,{data}">Save this figure</a></p>'
    return f'<div style="margin: 1.4rem 0 2.2rem">{html.figure(drawing.svg, drawing.caption)}{link}</div>'


def _folded(table: str, title: str, count: int) -> str:
    state = "" if count > _FOLDED else " open"
    rows = f"{count} row{'' if count == 1 else 's'}"
    return f'<details{state} style="margin: .8rem 0; font-size: .85rem"><summary>{escape(title)}, {rows}</summary>{table}</details>'


def _command(result: Result) -> str:
    environment = result.environment
    where = f" at commit <code>{escape(str(environment.get('commit')))}</code>" if environment.get("commit") else ""
    changed = ", with changes that were not committed" if environment.get("dirty") else ""
    predict, machine = (" --predict", "any machine") if result.only_predicted else ("", "the machine above")
    return f"<code>sfm-fast bench --preset {escape(result.preset)}{predict}</code>{where}{changed}, on {machine}."
