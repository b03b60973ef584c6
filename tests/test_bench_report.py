"""Tables, CSV, lists of losses and pages made from benchmark results: numbers against the rows they come from."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sfm_fast.benchmarks.report import curves, figures, tables
from sfm_fast.benchmarks.report.page import page_text, write_all, write_page
from sfm_fast.benchmarks.report.rows import digits, duration, memory, read_result, times
from sfm_fast.errors import InputError

pytest.importorskip("matplotlib")

HARDWARE = "Testing CPU <i>9000</i>"
ENVIRONMENT = {
    "cpu": HARDWARE, "cores": 4, "threads": 3, "memory_bytes": 8_000_000_000, "gpu": None, "python": "3.11.7",
    "torch": "2.99.0", "triton": None, "sfm_fast": "1.2.3", "commit": "abc1234", "dirty": False,
}  # fmt: skip
PARTS = {"parameters": 9_000_000, "pyramid": 500_000, "adam": 500_000, "activations": 6_000_000, "workspace": 1_000_000}


def row(
    suite: str, case: str, contender: str, mode: str, median: float | None, ratio: Any = None, **facts: Any
) -> dict:
    """A row; ``median``: seconds, or None with ``status`` among the facts; ``ratio``: (median, low, high)."""
    found: dict[str, Any] = {"suite": suite, "case": case, "contender": contender, "mode": mode, "status": "ok"}
    if median is not None:
        found |= {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, "rounds": 11}
    if ratio is not None:
        found["ratio"] = dict(zip(("median", "low", "high"), ratio, strict=True))
    return found | facts


def loss_rows() -> list[dict]:
    rows = []
    for alignment in ("global", "pair"):
        for classes, dim in ((10, 384), (100, 384), (1000, 384), (1000, 768), (10, 768)):
            case = {"alignment": alignment, "classes": classes, "dim": dim, "ipc": 1, "dtype": "float32"}
            name = f"{alignment} {classes}x{dim}"
            base = classes * dim * 1e-9
            rows += [
                row(
                    "losses",
                    name,
                    "sfm_fast cpu",
                    "both",
                    base,
                    (1, 1, 1),
                    peak_bytes=classes * dim * 4,
                    copy_fraction=0.88,
                    **case,
                ),
                row("losses", name, "sfm_fast torch", "both", 0.5 * base, (0.5, 0.4, 0.6), peak_bytes=8, **case),
                row(
                    "losses", name, "eager", "both", 3.1 * base, (3.1, 2.9, 3.3), peak_bytes=classes * dim * 16, **case
                ),
            ]
            lost = alignment == "pair" and classes == 1000
            status = {"status": "out of memory"} if lost else {"peak_bytes": classes**2 * dim * 4}
            rows.append(
                row(
                    "losses",
                    name,
                    "C x C x D",
                    "both",
                    None if lost else 9 * base,
                    None if lost else (9, 8, 10),
                    **status,
                    **case,
                )
            )
    wrong = {"status": "wrong result: gradient off by 3e-1", "alignment": "global", "classes": 10, "dim": 384, "ipc": 1}
    return [*rows, row("losses", "global 10x384", "KeOps | <b>", "both", None, **wrong)]


def step_rows() -> list[dict]:
    case = {"backbone": "vit", "classes": 10, "ipc": 1, "dtype": "float32", "images": 10}
    guess = {"predicted_bytes": 17_000_000, "by_category": PARTS}
    return [
        row("step", "laptop", "SFM one-shot", "step", 0.02, (1, 1, 1), peak_bytes=7_300_000, first_seconds=0.9, views=1, **guess, **case),
        row("step", "laptop", "SFM micro-batch 5", "step", 0.03, (1.5, 1.4, 1.6), peak_bytes=3_700_000, views=1, **case),
        row("step", "laptop", "LGM frozen", "step", 0.18, (9.0, 8.7, 9.4), peak_bytes=73_000_000, first_seconds=0.4, views=10, **case),
        row("step", "laptop", "LGM stock", "step", None, status="out of memory", views=10, **case),
    ]  # fmt: skip


def scaling_rows() -> list[dict]:
    rows = []
    for axis, values in (("classes", (10, 20, 40)), ("ipc", (2, 5)), ("dim", (384,))):
        for value in values:
            case = {"classes": 10, "ipc": 1, "dim": 192, "precision": "fp32"} | {axis: value}
            name = f"C {case['classes']} ipc {case['ipc']} D {case['dim']}"
            rows.append(
                row(
                    "scaling",
                    name,
                    "SFM one-shot",
                    "step",
                    0.001 * value,
                    (1, 1, 1),
                    peak_bytes=value * 1000,
                    views=1,
                    **case,
                )
            )
            rows.append(
                row(
                    "scaling",
                    name,
                    "LGM frozen",
                    "step",
                    0.01 * value,
                    (10, 9, 11),
                    peak_bytes=value * 9000,
                    views=10,
                    **case,
                )
            )
    for views in (1, 5):
        case = {"classes": 10, "ipc": 1, "dim": 192, "precision": "fp32", "views": views}
        rows.append(row("scaling", f"A {views}", "LGM frozen", "step", 0.01 * views, peak_bytes=views * 900, **case))
    rows.append(row("scaling", "C 80", "LGM frozen", "step", None, status="out of memory", classes=80, ipc=1))
    return rows


def laptop() -> dict[str, Any]:
    image = {"images": 10, "canvas": 256, "size": 224, "channels": 3, "dtype": "bfloat16"}
    other = [
        row("images", "ten", "sfm_fast cpu", "forward", 0.0035, (1, 1, 1), peak_bytes=16_500_000, **image),
        row("images", "ten", "operation by operation", "forward", 0.002, (0.57, 0.5, 0.62), peak_bytes=141_000_000, **image),
        row("images", "ten", "sfm_fast cpu", "both", 0.0118, (1, 1, 1), peak_bytes=16_500_000, extra_bytes=0, first_seconds=0.5, **image),
        row("images", "ten", "operation by operation", "both", 0.14, (11.8, 11.6, 12.0), peak_bytes=141_600_000, extra_bytes=125_100_000, first_seconds=0.2, **image),
        row("loading", "ImageNet JPEGs", "LGM, DataLoader", "load", 0.25, (1, 1, 1), images=100, first_seconds=9, peak_bytes=9),
        row("loading", "ImageNet JPEGs", "LGM, works ahead", "load", 0.1, (0.4, 0.3, 0.5), images=100, first_seconds=1, peak_bytes=1),
        row("startup", "import", "sfm_fast", "once", 1.5),
        row("startup", "import sfm_fast.extra", "sfm_fast", "once", None, status="unsupported: not built"),
    ]  # fmt: skip
    rows = [*loss_rows(), *step_rows(), *scaling_rows(), *other]
    return {"format": "sfm_fast bench 1", "preset": "laptop", "environment": dict(ENVIRONMENT), "rows": rows}


def imagenet() -> dict[str, Any]:
    case = {"classes": 100, "ipc": 1, "dtype": "bf16", "by_category": PARTS}
    rows = [
        row("step", "imagenet-100", "SFM one-shot", "step", None, status="predicted", peak_bytes=5_460_000_000, absolute_bytes=5_630_000_000, **case),
        row("step", "imagenet-100", "LGM frozen", "step", None, status="predicted", peak_bytes=51_720_000_000, absolute_bytes=51_890_000_000, **case),
    ]  # fmt: skip
    gpu = ENVIRONMENT | {"gpu": "Testing GPU 200"}
    return {"format": "sfm_fast bench 1", "preset": "imagenet-100", "environment": gpu, "rows": rows}


CLAIMS = [
    {"claim": "memory", "setting": "ImageNet-100", "contender": "SFM one-shot", "paper": 10, "goal": 50, "measured": 54.61,
     "kind": "predicted", "unit": "x less memory", "met_paper": True, "met_goal": True},
    {"claim": "accuracy", "setting": "laptop", "contender": "sfm", "paper": -0.5, "goal": None, "measured": -3.214,
     "kind": "measured", "unit": "points above LGM", "met_paper": False, "met_goal": None, "standard_error": 0.41},
]  # fmt: skip


def cells(table: str) -> list[list[str]]:
    """The body of every Markdown table in the text, cell by cell."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def line_of(table: str, *wanted: str) -> list[str]:
    """The one row whose first cells are those wanted."""
    found = [line for line in cells(table) if tuple(line[: len(wanted)]) == wanted]
    assert len(found) == 1, (wanted, found)
    return found[0]


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
    rows = laptop()["rows"]
    losses = tables.loss_table(row for row in rows if row["suite"] == "losses")
    assert line_of(losses, "global 1000 x 768", "eager")[2:] == ["2.38", "3.1x (2.9–3.3)", "", "12.3 MB"]
    assert line_of(losses, "pair 1000 x 768", "C x C x D")[2:] == ["out of memory", "", "", ""]
    images = tables.image_table(row for row in rows if row["suite"] == "images")
    name = "10 x 3 x 256² to 224², bfloat16"
    assert line_of(images, name, "operation by operation")[2:] == ["2.00", "140", "11.8x (11.6–12.0)", "", "125.1 MB", "141.6 MB"]  # fmt: skip
    steps = tables.step_table(row for row in rows if row["suite"] == "step")
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
    def group(case: str, ratio: tuple, ours: int, theirs: int, **facts: Any) -> list[dict]:
        return [
            row("losses", case, "sfm_fast cpu", "both", 1.0, (1, 1, 1), peak_bytes=ours),
            row("losses", case, "eager", "both", ratio[0], ratio, peak_bytes=theirs, **facts),
        ]

    result = laptop() | {
        "rows": [
            *group("a draw", (0.9, 0.8, 1.01), 100, 100),
            *group("a loss", (0.8, 0.7, 0.99), 100, 101),
            *group("a larger loss", (0.5, 0.4, 0.6), 3_000_000, 2_000_000),
            *group("a win", (2.0, 1.9, 2.1), 0, 100),
            row("losses", "lost", "sfm_fast cpu", "both", None, status="failed: why"),
            row("losses", "lost", "eager", "both", 0.25),
            row("losses", "neither", "sfm_fast cpu", "both", None, status="out of memory"),
            row("losses", "neither", "eager", "both", None, status="out of memory"),
        ]
    }
    found = [line for line in cells(tables.where_we_lose(result)) if line[0] != "what"]
    assert found == [
        ["losses: lost, both", "sfm_fast cpu: failed: why", "eager: 250 ms", ""],
        ["losses: a larger loss, both", "sfm_fast cpu: 1.00 s", "eager: 500 ms", "2.0x (1.7–2.5)"],
        ["losses: a loss, both", "sfm_fast cpu: 1.00 s", "eager: 800 ms", "1.25x (1.01–1.43)"],
        ["losses: a larger loss, both", "sfm_fast cpu: 3.0 MB", "eager: 2.0 MB", "1.50x, 1.0 MB more"],
    ]
    nothing = laptop() | {"rows": group("a win", (2.0, 1.9, 2.1), 0, 100)}
    assert tables.where_we_lose(nothing) == tables.NO_LOSSES
    assert tables.NO_LOSSES in tables.markdown(nothing)


def test_csv_comes_back() -> None:
    result = laptop()
    result["rows"][0]["note"] = 'a "quoted", line\nbroken | text'
    found = list(csv.DictReader(io.StringIO(tables.csv_text(result), newline="")))
    assert len(found) == len(result["rows"])
    for line, source in zip(found, result["rows"], strict=True):
        expected = {key: value for key, value in source.items() if key not in ("ratio", "by_category")}
        expected["preset"] = "laptop"
        expected |= {f"ratio_{key}": value for key, value in source.get("ratio", {}).items()}
        expected |= {f"by_category_{key}": value for key, value in source.get("by_category", {}).items()}
        assert {key: value for key, value in line.items() if value != ""} == {k: str(v) for k, v in expected.items()}
    assert list(found[0])[:7] == ["preset", "suite", "case", "contender", "mode", "status", "median"]
    both = list(csv.DictReader(io.StringIO(tables.csv_text(result, imagenet()), newline="")))
    assert [line["preset"] for line in both] == ["laptop"] * len(found) + ["imagenet-100"] * (len(both) - len(found))
    empty = tables.csv_text(result | {"rows": []})
    assert empty.startswith(
        "preset,suite,case,contender,mode,status,median,p20,p80,rounds,ratio_median,ratio_low,ratio_high,"
    )


class Balance(HTMLParser):
    """Fails where a tag is closed that isn't the innermost open one."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return page_text([laptop(), imagenet()], CLAIMS)


def test_page_is_well_formed_and_self_contained(page: str, tmp_path: Path) -> None:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not {"script", "link", "iframe", "i", "b"} & set(parser.seen)  # i and b would come from names not escaped
    assert len(parser.ids) == len(set(parser.ids))
    saved = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for text in (page, *saved):
        assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= names
        assert set(re.findall(r"url\((.)", text)) <= {"#"}
        assert not re.search(r"@import|<script|src=|javascript:", text)
    assert len(saved) == parser.seen.count("svg") == parser.seen.count("figure")
    write_page(tmp_path / "page.html", [laptop(), imagenet()], CLAIMS)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page  # equal input, equal bytes


def test_page_has_every_figure_with_its_hardware(page: str) -> None:
    captions = [unescape(caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    starts = (
        "Measured: time (above) and memory (below) of the losses, forward + backward, against the number of classes C; D = 384, ipc = 1.",
        "Measured: time (above) and memory (below) of the losses, forward + backward, against the feature dimension D; C = 1000, ipc = 1.",
        "Measured: time (above) and memory (below) of one distillation step. Held fixed against number of classes C: D = 192, ipc = 1;",
        "Measured: one distillation step, laptop.",
        "Predicted, not measured: peak memory of one step, imagenet-100,",
    )  # fmt: skip
    assert len(captions) == len(starts)
    for caption, start in zip(captions, starts, strict=True):
        assert caption.startswith(start)
        assert HARDWARE in caption
        assert "torch 2.99.0" in caption
        assert "3 threads" in caption
    assert all("median" in caption and "20th to 80th" in caption for caption in captions[:4])
    assert ["float32" in captions[0], "float32" in captions[2], "bfloat16" in captions[4]] == [True] * 3
    assert "Not drawn: KeOps | <b> (wrong result: gradient off by 3e-1)" in captions[0]
    assert "Testing GPU 200 (host: " in captions[4]


def test_page_says_what_failed_what_was_lost_and_how_to_repeat_it(page: str) -> None:
    words = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    for part in (
        "wrong result: gradient off by 3e-1", "unsupported: not built", "✕ out of memory", "10 (met)", "-0.5 (missed)",
        "3.1x (2.9–3.3)", "1.75x (1.61–2.00)", "51.89 GB, 9.2x", f"laptop on {HARDWARE}", "imagenet-100, predicted on Testing GPU 200",
        "Predicted, not measured: nothing of this result was run.", "sfm-fast bench --preset imagenet-100 --predict",
        "sfm-fast bench --preset laptop", "abc1234",
    ):  # fmt: skip
        assert part in words, part
    # The plots hold text that can be searched, and the bars their factors.
    assert "7.3 MB" in words
    assert "180 ms, 9.0x" in words


def test_curves_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(curves, "line_grid", lambda panels, looks, salt: drawn.append(panels) or "")
    result = laptop()
    looks = figures.looks_of([result])
    curves.against_classes(result, looks, "")
    curves.scaling(result, looks, "")
    (times_, sizes), (step_times, _) = drawn
    assert [panel.title for panel in times_] == ["global alignment", "pair alignment"]
    eager = next(series for series in times_[0].series if series.name == "eager")
    medians = [3.1 * classes * 384 * 1e-6 for classes in (10, 100, 1000)]
    expected = [(c, m, 0.9 * m, 1.2 * m) for c, m in zip((10, 100, 1000), medians, strict=True)]
    assert eager.points == [pytest.approx(point) for point in expected]
    large = next(series for series in sizes[1].series if series.name == "C x C x D")
    assert [(x, y) for x, y, *_ in large.points] == [(10, pytest.approx(0.1536)), (100, pytest.approx(15.36))]
    assert large.out_of_memory == [1000]
    # Columns: classes, ipc, views and dimension; LGM keeps its ten views but where views are what varies.
    lgm = [next(series for series in panel.series if series.name == "LGM frozen") for panel in step_times]
    assert [[x for x, *_ in series.points] for series in lgm] == [[10, 20, 40], [1, 2, 5], [10, 1, 5], [192, 384]]
    assert lgm[0].out_of_memory == [80]


def test_predicted_scaling_is_drawn_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(curves, "line_grid", lambda panels, looks, salt: drawn.append(panels) or "")
    rows = []
    for varied, values in (("classes", (10, 100)), ("ipc", (1, 5))):
        for value in values:
            case = {"classes": 10, "ipc": 1, "dim": 768, "varied": varied, "value": value} | {varied: value}
            size = {"peak_bytes": value * 10**9, "absolute_bytes": value * 10**9 + 7, "status": "predicted"}
            rows.append(row("scaling", f"{varied} {value}", "LGM frozen", "step", None, views=10, **size, **case))
    result = imagenet() | {"rows": rows}
    (found,) = figures.drawings(result, figures.looks_of([result]), "")
    assert found.caption.startswith("Predicted, not measured: memory of one distillation step.")
    ((classes, ipc),) = drawn[0]
    assert [(series.predicted, series.points) for series in classes.series] == [
        (True, [(10, 10, 10, 10), (100, 100, 100, 100)])
    ]
    assert classes.ylabel == "memory, GB"
    assert [x for x, *_ in ipc.series[0].points] == [1, 5]


def test_one_contender_looks_the_same_everywhere_and_like_no_other() -> None:
    looks = figures.looks_of([laptop(), imagenet()])
    losses = {looks[name] for name in ("sfm_fast cpu", "sfm_fast torch", "eager", "C x C x D", "KeOps | <b>")}
    assert len(losses) == 5
    assert looks == figures.looks_of([laptop(), imagenet()])
    assert looks["LGM frozen"] != looks["SFM one-shot"]


@pytest.mark.parametrize("suite", ["losses", "images", "step", "loading", "scaling", "startup"])
def test_a_page_of_one_suite(suite: str) -> None:
    result = laptop()
    result["rows"] = [row for row in result["rows"] if row["suite"] == suite]
    parser = Balance()
    parser.feed(page_text([result]))
    assert parser.open == []
    assert parser.seen.count("figure") == {"losses": 2, "step": 1, "scaling": 1}.get(suite, 0)


@pytest.mark.parametrize("rows", [[], [row("losses", "a", "sfm_fast cpu", "both", None, status="out of memory")]])
def test_a_result_without_measurements_says_so(rows: list[dict], tmp_path: Path) -> None:
    result = laptop() | {"rows": rows}
    assert "This result has no measured row" in page_text([result])
    assert "This result has no measured row" in tables.markdown(result)
    write_all(tmp_path, "empty", result)
    assert {path.name for path in tmp_path.iterdir()} == {"empty.md", "empty.csv", "empty.html"}


def test_everything_out_of_memory_but_one_point_can_be_drawn() -> None:
    """Ranges of no width, zeros that a log axis can't show, names with signs that mean something to plots and pages."""
    case = {"alignment": "pair", "classes": 10, "dim": 384, "ipc": 1}
    rows = [row("losses", "x", "sfm_fast $cpu$ & <b>", "both", 1e-5, (1, 1, 1), peak_bytes=0, **case)]
    lost = case | {"classes": 20, "status": "out of memory"}
    rows += [row("losses", "y", f"_{place}", "both", None, **lost) for place in range(12)]
    text = page_text([laptop() | {"rows": rows}])
    assert text.count("<figure>") == 1  # nothing differs in dimension
    assert "sfm_fast $cpu$ &amp; &lt;b&gt;" in text
    assert "<b>" not in text
    assert "can&#x27;t show: sfm_fast $cpu$ &amp; &lt;b&gt;." in text
    parser = Balance()
    parser.feed(text)
    assert parser.open == []


def broken(**changes: Any) -> dict[str, Any]:
    result = laptop()
    for key, value in changes.items():
        if key in result:
            result[key] = value
        else:
            result["rows"][0][key] = value
    return result


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ([], "wanted a benchmark result"),
        (broken(format="other"), "key 'format'"),
        (broken(preset=None), "key 'preset'"),
        (broken(environment="a laptop"), "key 'environment'"),
        (broken(rows={}), "key 'rows'"),
        (broken(rows=[3]), r"rows\[0\]: wanted an object"),
        (broken(contender=None), r"rows\[0\]: key 'contender'"),
        (broken(median=None), r"rows\[0\]: key 'median'"),
        (broken(median=float("nan")), r"(rows\[0\]: key 'median'|NaN is no number)"),
        (broken(p80="fast"), r"rows\[0\]: key 'p80'"),
        (broken(peak_bytes=-1), r"rows\[0\]: key 'peak_bytes'"),
        (broken(dtype=["float32"]), r"rows\[0\]: key 'dtype'"),
        (broken(ratio={"median": 1}), r"rows\[0\]: key 'ratio'"),
        (broken(by_category=[1]), r"rows\[0\]: key 'by_category'"),
    ],
)
def test_malformed_results_are_refused(result: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match=rf"damaged\.json: .*{named}"):
        read_result(path)
    for make in (tables.markdown, tables.csv_text, tables.where_we_lose):
        with pytest.raises(InputError, match=named):
            make(result)
    with pytest.raises(InputError, match=rf"results\[1\]: .*{named}"):
        write_page(tmp_path / "page.html", [laptop(), result])
    assert not (tmp_path / "page.html").exists()


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "torn.json"
    with pytest.raises(InputError, match=r"torn\.json: can't be read"):
        read_result(path)
    path.write_text('{"format": ')
    with pytest.raises(InputError, match=r"torn\.json: no JSON"):
        read_result(path)
    path.write_text(json.dumps(laptop()))
    assert read_result(path) == laptop()


@pytest.mark.parametrize(
    ("claims", "named"),
    [
        ({"rows": []}, "claims: wanted a list"),
        ([CLAIMS[0], {"claim": "memory"}], r"claims\[1\]: key 'setting' is missing"),
        ([CLAIMS[0] | {"paper": [1]}], r"claims\[0\]: key 'paper'"),
        ([CLAIMS[0] | {"met_goal": "maybe"}], r"claims\[0\]: key 'met_goal'"),
    ],
)
def test_malformed_claims_are_refused(claims: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        page_text([laptop()], claims)


def test_a_page_wants_results() -> None:
    for results in ([], laptop()):
        with pytest.raises(InputError, match="results: wanted a list"):
            page_text(results)  # type: ignore[arg-type]


def test_without_matplotlib_there_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert write_all(tmp_path, "laptop", laptop()) == tmp_path / "laptop.md"
    assert {path.name for path in tmp_path.iterdir()} == {"laptop.md", "laptop.csv"}
