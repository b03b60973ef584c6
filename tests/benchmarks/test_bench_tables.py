"""Tables, CSV and lists of losses made from benchmark results: numbers against the rows they come from."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from bench_results import CLAIMS, HARDWARE, cells, imagenet, laptop, line_of, loss_rows, row

from sfm_fast.benchmarks.report import losing, tables
from sfm_fast.benchmarks.rows import BOOTSTRAP, Row
from sfm_fast.measure.timing import Ratio
from sfm_fast.units import digits, duration, memory, times


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (digits(0), "0"), (digits(0.01234), "0.0123"), (digits(1.234), "1.23"), (digits(123.4), "123"), (digits(12345), "12345"),
        (duration(0.0000765), "76.5 µs"), (duration(0.0235), "23.5 ms"), (duration(101.2), "101 s"),
        (memory(0), "0 B"), (memory(18_400), "18.4 kB"), (memory(7_319_292), "7.3 MB"), (memory(5_627_240_572), "5.63 GB"),
        (times(3.14, 2.9, 3.3), "3.1x (2.9–3.3)"), (times(0.987), "0.99x"), (times(2066.4), "2066x"),
    ],
)  # fmt: skip
def test_numbers(written: str, expected: str) -> None:
    assert written == expected


def test_markdown_holds_every_row_and_its_numbers() -> None:
    result = laptop()
    text = tables.markdown(result)
    for part in (HARDWARE.replace("<", "&lt;"), "4 cores, 3 threads", "torch 2.99.0", "commit abc1234", "float32"):
        assert part in text
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == ["Losses", "Rendering and augmenting", "Whole steps", "Data loading", "Scaling of whole steps", "Start-up", "Where we lose"]  # fmt: skip
    parts = dict(zip(headings, re.split(r"^## .*$", text, flags=re.M)[1:], strict=True))
    assert len(cells(parts["Losses"])) == 1 + len(loss_rows())
    header = cells(parts["Losses"])[0]
    # 1000 x 384 numbers, 1e-9 s each: 0.384 ms, of which 0.9 and 1.2 are the percentiles; eager has 16 bytes for each.
    eager = dict(zip(header, line_of(parts["Losses"], "global 1000x384", "eager"), strict=True))
    assert eager["ms"] == "1.19"
    assert eager["p20–p80"] == "1.07–1.43"
    assert eager["x first"] == "3.1x (2.9–3.3)"
    assert eager["memory"] == "6.1 MB"
    ours = dict(zip(header, line_of(parts["Losses"], "global 1000x384", "sfm_fast cpu"), strict=True))
    assert (ours["x first"], ours["of ceiling"], ours["memory"]) == ("1x", "copy 88 %", "1.5 MB")
    assert "out of memory" in line_of(parts["Losses"], "pair 1000x768", "C x C x D")
    assert "wrong result: gradient off by 3e-1" in line_of(parts["Losses"], "global 10x384", r"KeOps \| &lt;b>")
    assert "unsupported: not built" in parts["Start-up"]
    step = dict(
        zip(cells(parts["Whole steps"])[0], line_of(parts["Whole steps"], "laptop", "SFM one-shot"), strict=True)
    )
    assert (step["images/s"], step["first call"]) == ("500", "900 ms")
    # 17 MB in all, of which 10 MB of weights, pyramid and Adam stand before the step.
    assert (step["predicted memory"], step["predicted absolute"]) == ("7.0 MB", "17.0 MB")


def test_a_single_round_has_no_interval() -> None:
    one = row("losses", "c", "eager", "both", 60.0, (7.84, 7.84, 7.84), rounds=1)
    assert "| 7.8x |" in " ".join(tables.loss_table([one]).split())


def test_predicted_rows_have_their_own_columns() -> None:
    text = tables.markdown(imagenet())
    assert "Predicted, not measured" in text
    header = cells(text)[0]
    found = dict(zip(header, line_of(text, "imagenet-100", "LGM frozen"), strict=True))
    assert (found["ms"], found["predicted memory"], found["predicted absolute"]) == (
        "predicted",
        "51.72 GB",
        "51.89 GB",
    )
    assert "memory" not in header


def test_readme_tables() -> None:
    rows = laptop().rows
    losses = tables.loss_table(row for row in rows if row.suite == "losses")
    assert line_of(losses, "global 1000 x 768", "eager")[2:] == ["2.38", "3.1x (2.9–3.3)", "", "12.3 MB"]
    assert line_of(losses, "pair 1000 x 768", "C x C x D")[2:] == ["out of memory", "", "", ""]
    images = tables.image_table(row for row in rows if row.suite == "images")
    name = "10 x 3 x 256² to 224², bfloat16"
    assert line_of(images, name, "operation by operation")[2:] == ["2.00", "140", "11.8x (11.6–12.0)", "", "125.1 MB", "141.6 MB"]  # fmt: skip
    steps = tables.step_table(row for row in rows if row.suite == "step")
    assert line_of(steps, "SFM one-shot")[1:] == ["20.0", "1x", "500", "7.3 MB", "7.0 MB", "1.00"]
    assert line_of(steps, "LGM frozen")[1:] == ["180", "9.0x (8.7–9.4)", "55.6", "73.0 MB", "", "10.00"]
    assert line_of(steps, "LGM stock")[1] == "out of memory"
    claims = tables.claims_table(CLAIMS)
    assert line_of(claims, "memory")[3:] == ["10 (met)", "50 (met)", "54.6x less memory", "predicted"]
    assert line_of(claims, "accuracy")[3:] == ["-0.5 (missed)", "", "-3.21 ± 0.41 points above LGM", "measured"]


def test_images_a_second_of_several_steps() -> None:
    several = row("step", "laptop", "SFM one-shot", "steps", 0.1, (1, 1, 1), images=10, steps=5)
    assert line_of(tables.step_table([several]), "SFM one-shot")[3] == "500"


def test_where_we_lose_lists_what_was_lost_and_nothing_else() -> None:
    text = tables.where_we_lose(laptop())
    parts = dict(re.findall(r"\*\*([^*]+)\.\*\*(.*?)(?=\*\*|\Z)", text, re.DOTALL))
    # Ours on another backend is faster and smaller in every loss, and no competitor.
    assert list(parts) == ["Slower", "Micro-batches against one shot", "First call"]
    slower, micro, first = parts.values()
    assert cells(slower)[1:] == [["images: ten, forward", "sfm_fast cpu: 3.50 ms", "operation by operation: 2.00 ms", "1.75x (1.61–2.00)"]]  # fmt: skip
    assert cells(micro)[1:] == [["step: laptop, step", "SFM micro-batch 5: 30.0 ms", "SFM one-shot: 20.0 ms", "1.50x (1.40–1.60)"]]  # fmt: skip
    assert [line[-1] for line in cells(first)[1:]] == ["2.5x", "2.2x"]
    assert "images: ten, both" in first
    assert "step: laptop, step" in first


def test_where_we_lose_is_sure_sorted_and_complete() -> None:
    def group(case: str, ratio: tuple, ours: int, theirs: int, **facts: Any) -> list[Row]:
        return [
            row("losses", case, "sfm_fast cpu", "both", 1.0, (1, 1, 1), peak_bytes=ours),
            row("losses", case, "eager", "both", ratio[0], ratio, peak_bytes=theirs, **facts),
        ]

    result = replace(
        laptop(),
        rows=[
            *group("a draw", (0.9, 0.8, 1.01), 100, 100),
            *group("a loss", (0.8, 0.7, 0.99), 100, 101),
            *group("a larger loss", (0.5, 0.4, 0.6), 3_000_000, 2_000_000),
            *group("a win", (2.0, 1.9, 2.1), 0, 100),
            row("losses", "lost", "sfm_fast cpu", "both", None, status="failed: why"),
            row("losses", "lost", "eager", "both", 0.25),
            row("losses", "neither", "sfm_fast cpu", "both", None, status="out of memory"),
            row("losses", "neither", "eager", "both", None, status="out of memory"),
        ],
    )
    found = [line for line in cells(tables.where_we_lose(result)) if line[0] != "what"]
    assert found == [
        ["losses: lost, both", "sfm_fast cpu: failed: why", "eager: 250 ms", ""],
        ["losses: a larger loss, both", "sfm_fast cpu: 1.00 s", "eager: 500 ms", "2.0x (1.7–2.5)"],
        ["losses: a loss, both", "sfm_fast cpu: 1.00 s", "eager: 800 ms", "1.25x (1.01–1.43)"],
        ["losses: a larger loss, both", "sfm_fast cpu: 3.0 MB", "eager: 2.0 MB", "1.50x, 1.0 MB more"],
    ]
    nothing = replace(laptop(), rows=group("a win", (2.0, 1.9, 2.1), 0, 100))
    assert tables.where_we_lose(nothing) == losing.NOTHING_LOST
    assert losing.NOTHING_LOST in tables.markdown(nothing)


def test_csv_comes_back() -> None:
    result = laptop()
    result.rows[0].commit = 'a "quoted", line\nbroken | text'
    found = list(csv.DictReader(io.StringIO(tables.csv_text(result), newline="")))
    assert len(found) == len(result.rows)
    for line, source in zip(found, [one.to_json() for one in result.rows], strict=True):
        expected = {key: value for key, value in source.items() if key not in ("ratio", "by_category")}
        expected["preset"] = "laptop"
        expected |= {f"ratio_{key}": value for key, value in source.get("ratio", {}).items()}
        expected |= {f"by_category_{key}": value for key, value in source.get("by_category", {}).items()}
        assert {key: value for key, value in line.items() if value != ""} == {k: str(v) for k, v in expected.items()}
    assert list(found[0])[:7] == ["preset", "suite", "case", "contender", "mode", "status", "median"]
    both = list(csv.DictReader(io.StringIO(tables.csv_text(result, imagenet()), newline="")))
    assert [line["preset"] for line in both] == ["laptop"] * len(found) + ["imagenet-100"] * (len(both) - len(found))
    empty = tables.csv_text(replace(result, rows=[]))
    assert empty.startswith(
        "preset,suite,case,contender,mode,status,median,p20,p80,rounds,ratio_median,ratio_low,ratio_high,"
    )


def test_the_tables_say_which_interval_it_is() -> None:
    assert "interval by the sign test" in tables.markdown(laptop())
    assert "bootstrap interval" in tables.markdown(replace(laptop(), interval=BOOTSTRAP))


def test_an_open_interval_is_none_and_loses_nothing() -> None:
    """Too few rounds can't say that another contender is faster."""
    rows = [
        row("losses", "a", "sfm_fast cpu", "both", 1.0, (1, 1, 1)),
        row("losses", "a", "eager", "both", 0.5, rounds=3, ratio=(0.5, 0.0, math.inf)),
    ]
    assert rows[1].to_json()["ratio"] == {"median": 0.5, "low": 0.0, "high": None}
    assert losing.factor_of(rows[1]) == "0.50x"
    assert tables.where_we_lose(replace(laptop(), rows=rows)) == losing.NOTHING_LOST
    sure = [rows[0], replace(rows[1], ratio=Ratio(0.5, 0.4, 0.6))]
    assert "eager: 500 ms" in tables.where_we_lose(replace(laptop(), rows=sure))
