"""The figures of a benchmark page: the curves, bars of whole steps, and dots of predicted memory, each with its caption."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .curves import DELTA, Drawing, against_classes, against_dim, machine, scaling
from .plots import Bar, Style, bars, dots, styles
from .rows import (
    dtypes,
    groups,
    hardware,
    is_measured,
    is_ours,
    is_predicted,
    memory,
    milliseconds,
    of_suite,
    predicted_delta,
    predicted_total,
    times,
)


def looks_of(results: Iterable[dict[str, Any]]) -> dict[str, Style]:
    """One style for each contender of all results, so that a colour means the same throughout a page.

    Contenders of single operations and of whole steps never share a plot, so each kind starts from the first colours.
    """
    rows = [row for result in results for row in result["rows"]]
    small = [row for row in rows if row["suite"] in ("losses", "images")]
    large = [row for row in rows if row["suite"] not in ("losses", "images")]
    found: dict[str, Style] = {}
    for part in (large, small):
        found |= styles((row["contender"], is_ours(row["contender"])) for row in part)
    return found


def drawings(result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    """All plots that the rows of a checked result allow. ``salt``: a text that tells this result from others of the page."""
    found: list[Drawing] = []
    for make in (against_classes, against_dim, scaling, _step_bars, _predicted):
        for one in make(result, looks, f"{salt} {make.__name__}"):
            found.append(one)
    return found


def _step_bars(result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    every = of_suite(result["rows"], "step")
    found = []
    for place, group in enumerate(groups(row for row in every if not is_predicted(row))):
        first = next((row for row in group if is_measured(row)), None)
        if first is None:
            continue
        guesses = {row["contender"]: row for row in every if is_predicted(row) and row["case"] == first["case"]}
        left, right = [], []
        for row in group:
            name = row["contender"]
            guess = predicted_delta(row)
            if guess is None and name in guesses:
                guess = predicted_delta(guesses[name])
            if not is_measured(row):
                words = " ".join(row["status"].split())[:60]
                left.append(Bar(name, None, f"✕ {words}"))
                right.append(
                    Bar(
                        name,
                        None,
                        f"✕ {words}" + ("" if guess is None else f", predicted {memory(guess)}"),
                        predicted=guess,
                    )
                )
                continue
            # Two decimals below 2 are for the tables' intervals; the first has nothing to be compared with.
            factor = "" if row is first or not row.get("ratio") else f", {times(row['ratio']['median'])}"
            left.append(
                Bar(
                    name,
                    row["median"] * 1e3,
                    f"{milliseconds(row['median'])} ms{factor}",
                    (row["p20"] * 1e3, row["p80"] * 1e3),
                )
            )
            size, base = row.get("peak_bytes"), first.get("peak_bytes")
            share = f", {times(size / base)}" if size is not None and base and row is not first else ""
            text = "not measured" if size is None else f"{memory(size)}{share}"
            right.append(Bar(name, size, text, predicted=guess))
        scale, unit = (1e9, "GB") if max([bar.value or bar.predicted or 0 for bar in right]) >= 1e9 else (1e6, "MB")
        right = [
            Bar(b.name, b.value and b.value / scale, b.text, None, b.predicted and b.predicted / scale) for b in right
        ]
        hatched = " (hatched: predicted without running)" if any(bar.predicted for bar in right) else ""
        labels = ("time, ms", f"memory, {unit}{hatched}")
        several = first.get("steps") or 1
        what = "one distillation step" if several == 1 else f"{several} distillation steps in a row"
        caption = (
            f"Measured: {what}, {first['case']}. Left: median time, black line: 20th to 80th percentile. Right: {DELTA}"
            f"{', beside its prediction' if hatched else ''}. Factors are those over {first['contender']}. {machine(result, group)}"
        )
        found.append(Drawing(bars(left, right, labels, looks, f"{salt} {place}"), caption))
    return found


def _predicted(result: dict[str, Any], looks: dict[str, Style], salt: str) -> list[Drawing]:
    """Cases nobody ran: a dot for the predicted peak of each method."""
    ran = {(row["suite"], row["case"]) for row in result["rows"] if is_measured(row)}
    rows = [row for row in result["rows"] if is_predicted(row) and (row["suite"], row["case"]) not in ran]
    found = []
    for place, group in enumerate(groups(row for row in rows if row["suite"] != "scaling" and predicted_total(row))):
        sizes = [predicted_total(row) or 0.0 for row in group]
        entries = [
            Bar(
                row["contender"],
                size / 1e9,
                f"{memory(size)}" + (f", {times(size / sizes[0])}" if row is not group[0] else ""),
            )
            for row, size in zip(group, sizes, strict=True)
        ]
        caption = (
            f"Predicted, not measured: peak memory of one step, {group[0]['case']}, everything in memory at that moment, counted with tensors that "
            f"hold no data ({dtypes(group)}, torch {result['environment'].get('torch') or 'of unknown version'}; counted on {hardware(result['environment'])}). "
            f"Factors are those over {group[0]['contender']}."
        )
        found.append(Drawing(dots(entries, "predicted peak memory, GB", looks, f"{salt} {place}"), caption))
    return found
